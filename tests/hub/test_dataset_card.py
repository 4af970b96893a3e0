"""Cards: what of the source survives, what is ours, and that strangers' text stays text."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard, DatasetCardData
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_ecif.data.columns import COLUMNS
from hf_ecif.data.summary import Summary
from hf_ecif.errors import UserError
from hf_ecif.hub.dataset_card import (
    Layout,
    Picture,
    _shorten,
    _size_category,
    count_rows,
    public_report,
    write_card,
)
from hf_ecif.hub.markdown import _INVISIBLE, BEGIN, END, escape, merge_card, read_card
from hf_ecif.hub.model_card import EDITED, INFLUENCE, write_model_card
from hf_ecif.utils.hub_paths import hide_folders
from tests.support.hub.audits import README, fake_summary

SUMMARY = fake_summary("me/birds@v1", 1200, 150, 7)
COUNTS = {
    "kept": 1043,
    "removed": 157,
    "removed, flagged as probably misaligned": 150,
    "removed, unreadable": 7,
}
LAYOUT = Layout({"train": 1043, "test": 300}, 157, COLUMNS, COUNTS)
NASTY = "<script>alert(1)</script> | **bold** ![x](http://e.vil/p.png) `code` [l](javascript:a) $x$"


def card(before: str | None = None, own: bool = False, **changes) -> str:
    layout = replace(
        LAYOUT,
        removed=changes.pop("removed", LAYOUT.removed),
        has_report=changes.pop("has_report", True),
    )
    pictures = changes.pop("pictures", [])
    summary = Summary.from_dict(SUMMARY | changes)
    return write_card(before, "me/clean", summary, layout, pictures, own=own)


def metadata(text: str) -> dict:
    return DatasetCard(text).data.to_dict()


class _Page(HTMLParser):
    """The elements and the text that a reader's browser gets."""

    def __init__(self, card: str) -> None:
        super().__init__()
        _, markdown = read_card(card)
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(MarkdownIt("commonmark").enable("table").render(markdown))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


class TestMetadata:
    def test_of_the_source_survives(self):
        data = metadata(card(README))
        assert data["license"] == "cc-by-4.0"
        assert data["language"] == "no"  # Norwegian, not false
        assert data["tags"] == ["birds", "hf-ecif", "data-valuation"]

    def test_is_what_the_loaders_need(self):
        data = yaml.safe_load(card().split("---\n")[1])
        assert data["configs"] == [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": "data/train/*.parquet"},
                    {"split": "test", "path": "data/test/*.parquet"},
                ],
            },
            {
                "config_name": "removed",
                "data_files": [{"split": "train", "path": "removed/train/*.parquet"}],
            },
        ]
        assert data["size_categories"] == ["1K<n<10K"]
        assert data["source_datasets"] == ["me/birds"]

    def test_what_the_source_says_of_its_files_goes(self):
        data = metadata(card(README))
        assert [config["config_name"] for config in data["configs"]] == ["default", "removed"]
        assert "dataset_info" not in data

    def test_what_the_repository_says_of_its_other_files_stays(self):
        data = metadata(card(README, own=True))
        names = [config["config_name"] for config in data["configs"]]
        assert names == ["default", "removed", "extra"]

    def test_no_removed_rows(self):
        data = metadata(card(README, removed=0))
        assert [config["config_name"] for config in data["configs"]] == ["default"]

    @pytest.mark.parametrize(
        ("given", "tags"),
        [
            ("tags: one", ["one"]),
            ("tags:", []),
            ("tags: [hf-ecif, 7]", ["hf-ecif", "7"]),
            ("", []),
            ("configs: default\ndataset_info: 3\n1: 2\ntrue: x", []),
        ],
    )
    def test_odd_values(self, given, tags):
        data = metadata(card(f"---\n{given}\n---\nText\n"))
        assert set(data["tags"]) == {*tags, "hf-ecif", "data-valuation"}
        assert len(data["tags"]) == len(set(data["tags"]))

    @pytest.mark.parametrize(
        "broken", ["a: [1", "- a\n- b", "just text", "a: b: c", "a: !!python/x"]
    )
    def test_no_mapping(self, broken):
        with pytest.raises(UserError, match="the metadata between the lines"):
            card(f"---\n{broken}\n---\nText\n")

    @pytest.mark.parametrize(
        ("rows", "category"),
        [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**5, "100K<n<1M"), (10**9, "1B<n<10B")],
    )
    def test_size(self, rows, category):
        assert _size_category(rows) == category


class TestText:
    def test_of_the_source_survives(self):
        assert card(README).endswith("# Birds of Oslo\n\nTaken by **Kari**. Please cite her.\n")

    def test_new_card_has_a_title(self):
        assert "\n# clean\n" in card()

    def test_is_replaced_where_it_stands(self):
        first = card(README)
        moved = first.replace("# Birds of Oslo", "# Birds of Bergen") + "\nAdded.\n"
        second = card(moved, own=True, warnings=["New warning"])
        assert second.count(BEGIN) == second.count(END) == 1
        assert "New warning" in _Page(second).text
        assert "everything is a guess" not in _Page(second).text
        assert "# Birds of Bergen" in second
        assert second.endswith("Added.\n")

    @pytest.mark.parametrize(
        "before", [None, README, "Text only", "\ufeff---\r\na: b\r\n---\r\nx\r\n"]
    )
    def test_again_is_the_same(self, before):
        first = card(before)
        assert card(first, own=True) == first

    def test_stray_marks_cost_no_text(self):
        stray = f"Before\n\n{BEGIN}\n\nlost end\n\n{BEGIN}\nold\n{END}\n\nAfter\n"
        text = card(stray)
        for kept in ("Before", "lost end", "After"):
            assert kept in text
        assert "\nold\n" not in text
        assert card(text, own=True) == text

    def test_numbers_add_up(self):
        text = _Page(card()).text
        cells = [cell.strip() for cell in text.split("\n") if cell.strip()]
        for name, count in (("audited", 1200), ("kept", 1043), ("removed", 157)):
            assert cells[cells.index(name) + 1] == f"{count:,}"

    def test_names_every_column_and_setting(self):
        text = _Page(card()).text
        for name, meaning in COLUMNS.items():
            assert name in text
            assert meaning in text
        for fact in (
            "some/clip (revision c0ffee, dtype float32, fingerprint e115)",
            "8.0e-04",
            "hf_ecif 0.1.0",
            "0.5 (30 mean",
        ):
            assert fact in text

    def test_report_that_is_not_there_is_not_named(self):
        assert "report.html" in card()
        assert "report.html" not in card(has_report=False)

    def test_groups_have_thresholds_of_their_own(self):
        group = {"group": "no", "rows": 60, "noise_rate": 0.1, "threshold": 0.5}
        table = [group | {"flagged": 3, "borderline": 0}]
        groups = {"column": "language", "smallest": 50, "other_rows": 9, "table": table}
        assert "above the threshold of their group by language." in card(groups=groups)

    def test_strangers_text_stays_text(self):
        picture = Picture("hf_ecif/removed/00.webp", b"", NASTY, 0.93, f"because {NASTY}")
        page = _Page(card(pictures=[picture], warnings=[NASTY], dataset=NASTY, model=NASTY))
        assert page.text.count(NASTY) == 6
        plain = _Page(card(pictures=[Picture(picture.path, b"", "a", 0.93, "b")]))
        assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
        images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
        assert images == ["hf_ecif/histogram.png", "hf_ecif/removed/00.webp"]

    def test_a_caption_cannot_end_the_section(self):
        picture = Picture("hf_ecif/removed/00.webp", b"", f"{END} {BEGIN}", 0.9, "x")
        text = card(pictures=[picture])
        assert text.count(END) == 1
        assert card(text, own=True, pictures=[picture]) == text

    def test_a_caption_stays_on_its_line(self):
        shown = str(escape("one\n\n# two\u202e\x00three"))
        assert shown == "one &#35; two three"


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text("-1.) #*`<w\n|&"))
def test_any_text_shows_as_itself(text):
    shown = " ".join(_INVISIBLE.sub(" ", text).split())
    for place in ("{}", "- {}", "a {} b", "| x |\n|---|\n| {} |"):
        plain, escaped = (_Page(place.format(inside)) for inside in ("placeholder", escape(text)))
        expected = " ".join(plain.text.replace("placeholder", shown).split())
        assert " ".join(escaped.text.split()) == expected
        assert escaped.tags == plain.tags or not shown


class TestFolders:
    def test_only_their_names_are_told(self, tmp_path):
        folder = str(tmp_path / "secret" / "birds")
        facts = {
            "model": folder,
            "n": 3,
            "query": {"source": f"{folder}, split test"},
            "l": [folder],
        }
        hidden = hide_folders(facts)
        assert str(tmp_path) not in json.dumps(hidden)
        assert hidden == {
            "model": "birds",
            "n": 3,
            "query": {"source": "birds, split test"},
            "l": ["birds"],
        }

    def test_names_on_the_hub_stay(self):
        assert hide_folders("me/birds@v1") == "me/birds@v1"
        assert hide_folders("hf://datasets/me/birds/a") == "hf://datasets/me/birds/a"

    def test_of_the_report(self):
        summary = Summary.from_dict(fake_summary("/home/me/a & b", 10, 1, 0))
        page = "<dd>/home/me/a &amp; b</dd> <dd>/home/me/a &amp; b, split validation</dd>"
        assert (
            public_report(page, summary)
            == "<dd>a &amp; b</dd> <dd>a &amp; b, split validation</dd>"
        )


class TestCounts:
    def test_every_row_is_in_one_part(self, tmp_path):
        flags = {
            "kept": [True, False, False, None],
            "removed": [True, True, False, None, None],
        }
        for name, values in flags.items():
            pq.write_table(pa.table({"ecif_flag": values}), tmp_path / name)
        assert count_rows([tmp_path / "kept"], [tmp_path / "removed"]) == {
            "kept": 4,
            "kept, flagged as probably misaligned": 1,
            "kept, unreadable": 1,
            "removed": 5,
            "removed, flagged as probably misaligned": 2,
            "removed, not flagged": 1,
            "removed, unreadable": 2,
        }

    def test_reasons_end_with_a_whole_part(self):
        long = f"misaligned: {'a' * 150}; {'b' * 100}"
        assert _shorten(long, "; ") == f"misaligned: {'a' * 150}…"
        assert len(_shorten("c" * 300, "; ")) == 200
        assert _shorten("short; text", "; ") == "short; text"


SOLVE = fake_summary("", 1, 0, 0)["solvers"][0]
REMOVAL = {
    "model": "openai/clip-vit-base-patch32@abc",
    "dataset": "me/birds",
    "split": "train",
    "where": "ecif_flag",
    "rows": 1200,
    "predicted_change": -0.1,
    "measures": {
        "query": {
            "before": {"loss": 1.5, "zero_shot_accuracy": 0.25},
            "after": {"loss": 1.41, "zero_shot_accuracy": 0.75},
        }
    },
    "removal": {"removed": 150, "change": 0.1, "solvers": [SOLVE]},
    "warnings": ["memorised"],
    "config": {"damping": 30.0, "curvature": "ggn", "fit_epochs": 10},
}
FIT = {
    "model": "a/b",
    "seed": 0,
    "curvature": "ggn",
    "fitted": {
        "train_count": 1200,
        "query_loss_before": 1.5,
        "query_loss": 1.25,
        "solvers": {"task score": SOLVE},
    },
}


class TestModelCard:
    def test_edited(self):
        text = write_model_card(None, "me/edited", EDITED, REMOVAL)
        data, body = read_card(text)
        assert data["base_model"] == ["openai/clip-vit-base-patch32"]
        assert data["library_name"] == "transformers"
        assert "hf-ecif" in data["tags"]
        page = _Page(body).text
        assert "without 150 of 1,200 image-text pairs" in page
        cells = [cell.strip() for cell in page.split("\n") if cell.strip()]
        start = cells.index("query: loss (nats)")
        assert cells[start - 2 : start + 6] == [
            *("fitted on all rows", "edited: without them", "query: loss (nats)", "1.5", "1.41"),
            *("query: zero shot accuracy", "0.25", "0.75"),
        ]
        assert "by -0.1 nats" in page
        assert "relative residual 8.0e-04" in page
        assert "memorised" in page
        assert 'from_pretrained("me/edited")' in page

    def test_local_base_is_no_metadata(self):
        data, _ = read_card(
            write_model_card(None, "me/x", EDITED, REMOVAL | {"model": "spaces_demo/model"})
        )
        assert "base_model" not in data

    def test_influence(self):
        text = write_model_card("---\nlicense: mit\n---\nMine\n", "me/x", INFLUENCE, FIT)
        data, body = read_card(text)
        assert data["license"] == "mit"
        assert data["library_name"] == "hf_ecif"
        assert "Influence.from_pretrained" in body
        assert body.endswith("Mine\n")
        for fact in ("1,200", "1.5, 1.25 nats", "relative residual 8.0e-04"):
            assert fact in _Page(body).text
        assert write_model_card(text, "me/x", INFLUENCE, FIT) == text

    def test_new_card_inherits_the_licence(self):
        theirs = "---\nlicense: other\nlicense_name: own\ntags: [x]\n---\nTheirs\n"
        data, body = read_card(write_model_card(None, "me/x", EDITED, REMOVAL, base_card=theirs))
        assert (data["license"], data["license_name"]) == ("other", "own")
        assert "x" not in data["tags"]
        assert "Theirs" not in body

    def test_base_named_as_a_path_on_the_hub(self):
        text = write_model_card(None, "me/x", EDITED, REMOVAL | {"model": "hf://models/a/b@v1"})
        assert read_card(text)[0]["base_model"] == ["a/b"]


def test_merge_card_keeps_the_order_of_metadata():
    text = merge_card(
        "---\nz: 1\na: 2\n---\n", "s", "t", lambda data: data | {"b": 3}, DatasetCardData
    )
    assert list(read_card(text)[0]) == ["z", "a", "b"]
