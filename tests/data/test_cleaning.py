import io
import json
from dataclasses import replace
from pathlib import Path

import datasets.config
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from hf_ecif.applications.clean import CleanRequest, run_clean
from hf_ecif.data.cleaning import clean
from hf_ecif.data.parquet import ROWS_PER_GROUP, write_shards
from hf_ecif.errors import UserError
from hf_ecif.utils.files import write_json
from tests.support.hub.audits import fake_summary

FEATURES = Features(
    {
        "image": Image(decode=False),
        "text": Value("string"),
        "ecif_flag": Value("bool"),
        "ecif_reason": Value("string"),
    }
)


def encode(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def scored(flags: list, reasons: list) -> Dataset:
    count = len(flags)
    columns = {
        "image": [{"bytes": encode("red"), "path": None}] * count,
        "text": [str(row) for row in range(count)],
        "ecif_flag": flags,
        "ecif_reason": reasons,
    }
    return Dataset.from_dict(columns, features=FEATURES)


def reload(folder: Path) -> Dataset:
    return load_dataset(str(folder), split="train")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def with_findings(flags: list, kinds: list, chances: list) -> Dataset:
    rows = scored(flags, ["flagged" if flag else None for flag in flags])
    rows = rows.add_column("ecif_finding", kinds, feature=Value("string"))
    return rows.add_column("ecif_noise_probability", chances, feature=Value("float32"))


class TestFindings:
    """Of six rows: right, wrong, a placeholder, and three stock phrases, two of them judged."""

    ROWS = (
        [False, True, True, False, True, False],
        [None, None, "placeholder_image", *["stock_phrase"] * 3],
        [0.1, 0.9, 0.95, 0.5, 1.0, 0.0],
    )

    @pytest.mark.parametrize(
        ("findings", "removed"),
        [
            (None, ["1", "2", "4"]),
            ((), ["1", "4"]),
            (("stock_phrase",), ["1", "3", "4"]),
            (("placeholder_image", "stock_phrase"), ["1", "2", "3", "4"]),
        ],
    )
    def test_they_decide_on_their_rows_but_not_on_verdicts(self, findings, removed):
        result = clean(with_findings(*self.ROWS), findings=findings)
        assert result.removed["text"][:] == removed
        assert sorted(result.kept["text"][:] + removed) == list("012345")
        assert all(result.removed["ecif_reason"][:])

    def test_removed_rows_are_counted_by_finding(self):
        result = clean(with_findings(*self.ROWS), findings=("stock_phrase",))
        assert result.removed_findings() == {"stock_phrase": 2}
        assert result.counts()["removed_not_flagged"] == 1
        reason = result.removed["ecif_reason"][1]
        assert "nothing in common" in reason
        assert "not flagged" in reason

    def test_other_strategies_leave_them_alone(self):
        rows = with_findings(*self.ROWS)
        rows = rows.add_column("ecif_suggested_text", [None, "new", "new", *[None] * 3])
        rows = rows.add_column("ecif_suggested_probability", [None, 0.9, 0.9, *[None] * 3])
        rows = rows.add_column("ecif_score", [0.0] * 6)
        relabelled = clean(rows, "relabel", findings=("placeholder_image",))
        assert relabelled.removed["text"][:] == ["2", "4"]
        assert relabelled.kept["text"][:] == ["0", "new", "3", "5"]
        worst = clean(rows, "worst", share=0.5, findings=())
        assert worst.removed["text"][:] == [
            "1",
            "4",
        ]  # half of the four without a finding or judged

    def test_none_without_their_column(self):
        with pytest.raises(UserError, match="'ecif_finding'"):
            clean(scored([False], [None]), findings=())


class TestClean:
    def test_flagged_and_unscored_rows_are_removed(self):
        result = clean(scored([False, True, None, False], [None, "harmful", "image missing", None]))
        assert result.kept["text"][:] == ["0", "3"]
        assert result.removed["text"][:] == ["1", "2"]
        assert result.removed["ecif_reason"][:] == ["harmful", "image missing"]

    @pytest.mark.parametrize(("flag", "reason"), [(True, "harmful"), (False, None)])
    def test_empty_parts_keep_their_schema(self, flag, reason):
        result = clean(scored([flag] * 3, [reason] * 3))
        assert {result.kept.num_rows, result.removed.num_rows} == {0, 3}
        assert result.kept.features == result.removed.features == FEATURES

    def test_nothing_to_clean(self):
        result = clean(scored([], []))
        assert result.kept.features == result.removed.features == FEATURES

    @pytest.mark.parametrize("column", ["ecif_flag", "ecif_reason"])
    def test_missing_column(self, column):
        with pytest.raises(UserError, match=f"no column '{column}'. Run 'hf-ecif audit'"):
            clean(scored([False], [None]).remove_columns(column))

    @pytest.mark.parametrize("flag", [True, None])
    def test_removal_needs_a_reason(self, flag):
        with pytest.raises(UserError, match=r"1 rows would be removed without .* row 1"):
            clean(scored([False, flag], [None, None]))


def with_probability(rows: list[tuple]) -> Dataset:
    """Rows of probability, score, flag, suggestion; None everywhere where unreadable."""
    probability, score, flags, suggested = zip(*rows, strict=True)
    reasons = ["" if flag is False else "because" for flag in flags]
    dataset = scored(list(flags), [reason or None for reason in reasons])
    for name, values, dtype in (
        ("ecif_noise_probability", probability, "float32"),
        ("ecif_score", score, "float32"),
        ("ecif_suggested_text", suggested, "string"),
        ("ecif_suggested_probability", [text and 0.9 for text in suggested], "float32"),
    ):
        dataset = dataset.add_column(name, list(values), feature=Value(dtype))
    return dataset


SUSPECTS = [
    (0.9, -2.0, True, "a cat"),
    (0.1, 1.0, False, None),
    (0.6, -1.0, True, None),
    (0.3, -1.0, False, None),
    (0.3, -5.0, False, None),
    (None, None, None, None),
]


class TestStrategies:
    def test_where_the_model_cannot_tell_rows_keep_their_weight(self):
        """Readable rows have no probability then, and unreadable ones still go."""
        blind = with_probability([(None, 1.0, False, None)] * 3 + [(None, None, None, None)])
        assert clean(blind, "weight").kept["ecif_weight"][:] == [1.0, 1.0, 1.0, 0.0]
        assert clean(blind).removed.num_rows == 1
        with pytest.raises(UserError, match="cannot tell right from wrong"):
            clean(blind, "worst", share=0.3)

    @pytest.mark.parametrize(
        ("strategy", "share", "removed"),
        [
            ("drop", None, [0, 2, 5]),
            ("worst", 0.2, [0, 5]),
            ("worst", 0.4, [0, 2, 5]),
            ("worst", 0.6, [0, 2, 4, 5]),  # of equal probabilities, the lower score
            ("worst", 0.8, [0, 2, 3, 4, 5]),
            ("weight", None, []),
            ("relabel", None, [2, 5]),
        ],
    )
    def test_who_goes(self, strategy, share, removed):
        result = clean(with_probability(SUSPECTS), strategy, share=share)
        assert sorted(result.removed["text"]) == [str(row) for row in removed]
        kept = [row for row in range(6) if row not in removed]
        texts = ["a cat" if strategy == "relabel" and row == 0 else str(row) for row in kept]
        assert result.kept["text"][:] == texts
        assert all(result.removed["ecif_reason"])

    def test_worst_says_why_it_takes_rows_that_are_not_flagged(self):
        removed = clean(with_probability(SUSPECTS), "worst", share=0.6).removed
        reasons = dict(zip(removed["text"], removed["ecif_reason"], strict=True))
        assert reasons["0"] == "because"
        assert reasons["4"] == "among the worst 60 % of the rows, at 30 %; not flagged"

    def test_weights(self):
        result = clean(with_probability(SUSPECTS), "weight")
        assert result.kept["ecif_weight"][:] == pytest.approx([0.1, 0.9, 0.4, 0.7, 0.7, 0.0])
        assert result.kept.features["ecif_weight"] == Value("float32")
        assert result.removed.features == result.kept.features

    def test_how_many_new_captions_should_be_right(self):
        rows = with_probability(SUSPECTS)
        result = clean(rows, "relabel")
        assert result.expected_right == pytest.approx(0.9 * result.counts()["relabelled"])
        assert result.expected_right > 0
        assert clean(rows, "drop").expected_right is None

    def test_a_suggestion_of_unknown_precision_is_not_taken(self):
        rows = with_probability(SUSPECTS).remove_columns("ecif_suggested_probability")
        unknown = [None] * len(rows)
        rows = rows.add_column("ecif_suggested_probability", unknown, feature=Value("float32"))
        result = clean(rows, "relabel")
        assert result.counts()["relabelled"] == 0
        assert len(result.removed) == len(clean(rows, "drop").removed)

    def test_relabelled_rows_keep_their_old_caption(self):
        before = with_probability(SUSPECTS)
        result = clean(before, "relabel")
        assert result.kept["ecif_original_text"][:] == ["0", None, None, None]
        assert result.kept.column_names == [*before.column_names, "ecif_original_text"]
        assert result.kept["image"][:] == before.select([0, 1, 3, 4])["image"][:]

    def test_a_suggestion_for_a_row_that_is_not_flagged_changes_nothing(self):
        result = clean(with_probability([(0.1, 0.0, False, "other")]), "relabel")
        assert result.kept["text"][:] == ["0"]
        assert result.kept["ecif_original_text"][:] == [None]

    def test_counts(self):
        assert clean(with_probability(SUSPECTS), "relabel").counts() == {
            "kept": 4,
            "relabelled": 1,
            "removed": 2,
            "removed_flagged": 1,
            "removed_not_flagged": 0,
            "removed_unreadable": 1,
        }
        assert clean(with_probability(SUSPECTS), "worst", share=0.6).counts() == {
            "kept": 2,
            "removed": 4,
            "removed_flagged": 2,
            "removed_not_flagged": 1,
            "removed_unreadable": 1,
        }

    @pytest.mark.parametrize(
        ("strategy", "options", "words"),
        [
            ("nonsense", {}, "`strategy=nonsense`: must be one of drop, worst, weight, relabel"),
            ("worst", {}, "share = None: the strategy worst needs one between 0 and 1"),
            ("worst", {"share": 1.0}, "share = 1.0"),
            ("drop", {"share": 0.1}, "only the strategy worst takes one"),
            ("relabel", {"text_column": "caption"}, "no text column 'caption'.*`text_column`"),
        ],
    )
    def test_mistakes(self, strategy, options, words):
        with pytest.raises(UserError, match=words):
            clean(with_probability(SUSPECTS), strategy, **options)

    @pytest.mark.parametrize(
        ("strategy", "column"),
        [
            ("worst", "ecif_noise_probability"),
            ("worst", "ecif_score"),
            ("weight", "ecif_noise_probability"),
            ("relabel", "ecif_suggested_text"),
        ],
    )
    def test_missing_column_of_a_strategy(self, strategy, column):
        with pytest.raises(UserError, match=f"no column '{column}'"):
            clean(with_probability(SUSPECTS).remove_columns(column), strategy, share=0.5)

    def test_captions_are_strings(self):
        with pytest.raises(UserError, match="'ecif_score' must hold strings"):
            clean(with_probability(SUSPECTS), "relabel", text_column="ecif_score")

    @pytest.mark.parametrize("strategy", ["weight", "relabel"])
    @pytest.mark.parametrize("again", ["drop", "weight", "relabel"])
    def test_cleaned_rows_are_not_cleaned_again(self, strategy, again):
        once = clean(with_probability(SUSPECTS), strategy).kept
        with pytest.raises(UserError, match="cleaned before"):
            clean(once, again)


class TestRunClean:
    @pytest.fixture
    def audit(self, tmp_path):
        rows = with_probability(SUSPECTS).rename_column("text", "caption")
        write_shards(rows, tmp_path / "audit" / "scored")
        columns = {"image": "image", "text": "caption"}
        summary = fake_summary("birds", len(rows), 2, 1) | {"columns": columns}
        write_json(summary, tmp_path / "audit" / "summary.json")
        return tmp_path / "audit"

    @pytest.mark.parametrize("inside", ["", "scored"])
    def test_files(self, audit, tmp_path, inside):
        request = CleanRequest(audit=audit / inside, output=tmp_path / "new", strategy="relabel")
        result = run_clean(request).result
        kept, removed = (reload(tmp_path / "new" / part) for part in ("kept", "removed"))
        assert kept["caption"][:] == ["a cat", "1", "3", "4"]
        assert removed["caption"][:] == ["2", "5"]
        summary = json.loads((tmp_path / "new" / "cleaning.json").read_text())
        assert summary["counts"] == result.counts()
        assert (summary["strategy"], summary["share"]) == ("relabel", None)

    def test_findings_by_name(self, tmp_path):
        rows = with_findings(*TestFindings.ROWS)
        write_shards(rows, tmp_path / "audit" / "scored")
        request = CleanRequest(
            audit=tmp_path / "audit" / "scored",
            output=tmp_path / "new",
            findings=["placeholder_image,stock_phrase"],
        )
        run_clean(request)
        told = json.loads((tmp_path / "new" / "cleaning.json").read_text())
        assert told["findings"] == {"placeholder_image": 1, "stock_phrase": 2}
        assert told["counts"]["removed"] == 4
        assert (
            run_clean(replace(request, output=None, findings=["none"])).result.counts()["removed"]
            == 2
        )
        with pytest.raises(UserError, match=r"no finding 'stock_fish'. Name some of placeholder"):
            run_clean(replace(request, output=None, findings=["stock_fish"]))

    def test_without_output_nothing_is_written(self, audit, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert run_clean(CleanRequest(audit=audit)).result.counts()["removed"] == 3
        assert sorted(tmp_path.rglob("*")) == before

    def test_further_strategies_are_counted_and_not_written(self, audit, tmp_path):
        request = CleanRequest(
            audit=audit, output=tmp_path / "new", beside=("worst", "relabel"), share=0.2
        )
        cleaning = run_clean(request)
        removed = {name: result.counts()["removed"] for name, result in cleaning.results.items()}
        assert removed == {"drop": 3, "worst": 2, "relabel": 2}
        assert len(reload(tmp_path / "new" / "kept")) == 3
        summary = json.loads((tmp_path / "new" / "cleaning.json").read_text())
        assert (summary["strategy"], summary["comparison"]) == ("drop", None)

    def test_a_share_that_no_strategy_takes(self, audit):
        with pytest.raises(UserError, match="only the strategy worst takes one"):
            run_clean(CleanRequest(audit=audit, beside=("relabel",), share=0.2))

    def test_output_in_use(self, audit, tmp_path):
        with pytest.raises(UserError, match="not empty"):
            run_clean(CleanRequest(audit=audit, output=tmp_path))

    def test_no_audit(self, tmp_path):
        with pytest.raises(UserError, match="none"):
            run_clean(CleanRequest(audit=tmp_path / "none"))


class TestWriteShards:
    def test_bytes_stay_equal(self, tmp_path):
        contents = [encode("red", kind) for kind in ("PNG", "JPEG", "WEBP")]
        lone = tmp_path / "lone.jpg"
        lone.write_bytes(encode("blue", "JPEG"))
        cells = [{"bytes": content, "path": "somewhere/x"} for content in contents]
        cells.append({"bytes": None, "path": str(lone)})
        dataset = Dataset.from_dict({"image": cells}, features=Features({"image": Image()}))
        write_shards(dataset, tmp_path / "out")
        lone.unlink()

        opened = reload(tmp_path / "out")
        assert opened.features["image"] == Image()
        assert [row["image"].format for row in opened] == ["PNG", "JPEG", "WEBP", "JPEG"]
        raw = opened.cast_column("image", Image(decode=False))["image"][:]
        assert [cell["bytes"] for cell in raw] == [*contents, encode("blue", "JPEG")]
        assert [cell["path"] for cell in raw] == ["x", "x", "x", "lone.jpg"]

    def test_missing_images_stay_missing(self, tmp_path):
        """No other file comes in, and no name of a folder of this machine."""
        (tmp_path / "secret").write_text("password")
        cells = [None, *({"bytes": None, "path": str(tmp_path / n)} for n in ("none", "secret"))]
        features = Features({"image": Image(decode=False)})
        dataset = Dataset.from_dict({"image": cells}, features=features)
        write_shards(dataset, tmp_path / "out")
        read = reload(tmp_path / "out").cast_column("image", features["image"])["image"][:]
        assert read == [None, *({"bytes": None, "path": name} for name in ("none", "secret"))]

    def test_images_that_are_not_scored_are_kept(self, tmp_path):
        contents = {
            "a.svg": b'<?xml version="1.0"?>\n<svg width="9"/>',
            "b.heic": b"\0\0\0\x18ftypheic..",
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        cells = [{"bytes": None, "path": str(tmp_path / name)} for name in contents]
        features = Features({"image": Image(decode=False)})
        write_shards(Dataset.from_dict({"image": cells}, features=features), tmp_path / "out")
        read = reload(tmp_path / "out").cast_column("image", features["image"])["image"][:]
        assert read == [{"bytes": content, "path": name} for name, content in contents.items()]

    def test_no_rows(self, tmp_path):
        write_shards(scored([], []), tmp_path / "out")
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["README.md", "data-00000-of-00001.parquet"]
        with pytest.raises(ValueError, match="corresponds to no data") as refused:
            load_dataset(str(tmp_path / "out"))
        told = (tmp_path / "out/README.md").read_text()
        assert "corresponds to no data" in str(refused.value)
        assert "corresponds to no data" in told
        assert "streaming=True" in told
        opened = load_dataset(str(tmp_path / "out"), split="train", streaming=True)
        assert list(opened) == []
        assert opened.features == Features({**FEATURES, "image": Image()})

    def test_shards_split(self, tmp_path):
        count = 2 * ROWS_PER_GROUP + 1
        write_shards(scored([False] * count, [None] * count), tmp_path / "out", max_shard_bytes=1)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            f"data-0000{number}-of-00003.parquet" for number in range(3)
        ]
        assert reload(tmp_path / "out")["text"][:] == [str(row) for row in range(count)]

    def test_one_shard_where_there_is_room(self, tmp_path):
        count = 2 * ROWS_PER_GROUP + 1
        write_shards(scored([False] * count, [None] * count), tmp_path / "out")
        assert len(list((tmp_path / "out").iterdir())) == 1

    def test_selected_rows(self, tmp_path):
        write_shards(clean(scored([False, True], [None, "harmful"])).removed, tmp_path / "out")
        assert reload(tmp_path / "out")["text"][:] == ["1"]

    def test_folder_in_use(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match="already exists"):
            write_shards(scored([], []), tmp_path)
        assert (tmp_path / "mine.txt").read_text() == "mine"

    def test_failure_leaves_nothing(self, tmp_path):
        count = ROWS_PER_GROUP + 1
        with pytest.raises(TypeError):
            write_shards(scored([False] * count, [None] * count), tmp_path / "out", "256 MiB")
        assert list(tmp_path.iterdir()) == []
