"""The report of an audit: self-contained, safe, bounded, and true to its summary."""

from __future__ import annotations

import base64
import io
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pytest
from PIL import Image

from hf_ecif.data.columns import WRONG_WORDS
from hf_ecif.data.images import thumbnail
from hf_ecif.reports import audit as report
from hf_ecif.reports import figures as viz
from hf_ecif.reports.html import write_page
from hf_ecif.utils import formatting as words
from tests.support.pages import Page
from tests.support.reports import make_scored, make_summary, picture


def render(scored: datasets.Dataset, folder: Path, **parts: Any) -> str:
    path = folder / "report.html"
    report.write_report(scored, make_summary(scored, **parts), path)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures out, which take most of the time, where a test is not about them."""
    monkeypatch.setattr(report, "_plots", lambda *_: dict.fromkeys(report.PLOTS, "figure"))


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = render(make_scored(40, unreadable=(3,)), tmp_path)
    links = Page(page).attributes("src", "href", "xlink:href", "action", "data", "srcset")
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|@import|<script|url\((?!#)", without_namespaces)
    assert "default-src 'none'" in page
    assert "<title>hf_ecif audit</title>" in page


def test_references_within_the_page_resolve_and_identifiers_are_unique(tmp_path: Path) -> None:
    page = render(make_scored(40, unreadable=(3,)), tmp_path)
    identifiers = Page(page).attributes("id")
    assert len(identifiers) == len(set(identifiers))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', page)
    targets += Page(page).attributes("aria-labelledby")
    assert set(targets) <= set(identifiers)


@pytest.mark.usefixtures("undrawn")
def test_pictures_have_alternative_texts(tmp_path: Path) -> None:
    page = Page(render(make_scored(5), tmp_path))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images
    assert all(attributes.get("alt") for attributes in images)


@pytest.mark.usefixtures("undrawn")
def test_html_in_captions_reasons_and_warnings_is_shown_as_text(tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>'
    scored = make_scored(
        4, unreadable=(3,), text=[attack, "", None, attack], ecif_reason=[attack] * 4
    )
    page = Page(render(scored, tmp_path, warnings=[attack], model=attack, config={"x": attack}))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not page.attributes("onerror")
    assert attack in page.text
    assert "(no caption)" in page.text


@pytest.mark.usefixtures("undrawn")
def test_counts_are_those_of_the_summary(tmp_path: Path) -> None:
    truth = {"column": "is_wrong", "misaligned": 1301, "found": 1270, "precision": 0.934}
    scored = make_scored(6)
    counts = {"rows": 1506, "scored": 1498, "flagged": 290, "unreadable": 8}
    counts |= {"kept": 1208, "removed": 298}
    summary = make_summary(scored, truth=truth, **counts)
    report.write_report(scored, summary, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "About 19.5 % of the 1,506 pairs look misaligned; 290 are flagged" in page.text
    for sentence in (
        "Pairs 1,506 1,498 scored",
        "Flagged 290",
        "Estimated noise 19.5 % 3 borderline",
        "Unreadable 8",
        "Found 1,270 of 1,301",
        "Precision 93.4 %",
        "pairs kept 1,208 pairs left out 298",
        "did not converge",
        "The query is small.",
    ):
        assert sentence in page.text


@pytest.mark.usefixtures("undrawn")
def test_truth_column_marks_cards(tmp_path: Path) -> None:
    scored = make_scored(4, is_wrong=[True, False, False, False])
    truth = {"column": "is_wrong", "misaligned": 1, "found": 1, "precision": 1.0}
    cards = re.findall(r'<li class="card">.*?</li>', render(scored, tmp_path, truth=truth), re.S)
    assert cards
    assert all(("truly wrong" in card) == ("row 0<" in card) for card in cards)
    assert "truly wrong" not in render(scored, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_unreadable_image_gets_a_placeholder_with_its_reason(tmp_path: Path) -> None:
    images = [
        {"bytes": b"no image at all", "path": None},
        {"bytes": picture((64, 64))[:60], "path": None},
        {"bytes": None, "path": str(tmp_path / "absent.png")},
        None,
    ]
    page = Page(render(make_scored(4, image=images), tmp_path))
    assert "No picture: not a known image format" in page.text
    assert "No picture: file not found" in page.text
    assert "No picture: no image in this row" in page.text
    assert str(tmp_path) not in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


@pytest.mark.parametrize(
    ("size", "mode", "kind"),
    [
        ((6000, 4000), "RGB", "JPEG"),
        ((3000, 20), "RGBA", "PNG"),
        ((500, 900), "P", "PNG"),
        ((300, 300), "CMYK", "JPEG"),
        ((300, 300), "L", "PNG"),
    ],
)
def test_thumbnails_are_small(tmp_path: Path, size: tuple[int, int], mode: str, kind: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(picture(size, mode, kind))
    uri, problem = thumbnail({"bytes": None, "path": str(path)})
    assert problem is None
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))) as small:
        assert max(small.size) == 160


@pytest.mark.usefixtures("undrawn")
def test_page_holds_the_thumbnail_of_a_huge_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG", compress_level=1)
    page = render(make_scored(1, image=[{"bytes": stream.getvalue(), "path": None}]), tmp_path)
    assert "data:image/webp;base64," in page
    assert len(page) < 300_000 < len(stream.getvalue())


@pytest.mark.usefixtures("undrawn")
def test_galleries_are_bounded(tmp_path: Path) -> None:
    page = render(make_scored(200, unreadable=tuple(range(40))), tmp_path)
    sections = dict(re.findall(r'<section class="gallery" id="(\w+)"(.*?)</section>', page, re.S))
    assert set(sections) == {"misaligned", "harmful", "valuable", "borderline"}
    assert all(section.count('<li class="card">') == 24 for section in sections.values())


@pytest.mark.usefixtures("undrawn")
def test_galleries_are_ordered_by_their_question(tmp_path: Path) -> None:
    scored = make_scored(5, ecif_score=[0.5, -2.0, 3.0, -1.0, 0.1])
    page = render(scored, tmp_path)
    sections = dict(re.findall(r'<section class="gallery" id="(\w+)"(.*?)</section>', page, re.S))
    order = {name: re.findall(r">row (\d+)<", section) for name, section in sections.items()}
    assert order == {
        "misaligned": ["4", "3"],
        "harmful": ["1", "3"],
        "valuable": ["2", "0", "4"],
        "borderline": ["2", "1", "3"],
    }


@pytest.mark.usefixtures("undrawn")
def test_flagged_cards_show_suggestion_and_reason(tmp_path: Path) -> None:
    attack = "<b>a cat</b>"
    scored = make_scored(
        4,
        ecif_suggested_text=[None, None, None, attack],
        ecif_suggested_margin=[None, None, None, 2.5],
        ecif_suggested_probability=[None, None, None, 0.83],
        ecif_reason=[None, None, "possibly misaligned (62 %): a; b; its loss is high", attack],
    )
    page = render(
        scored,
        tmp_path,
        suggestions={
            "count": 10,
            "expected_right": 8.4,
            "least_probability": 0.7,
            "least_margin": 0.0,
        },
    )
    cards = page.split('<li class="card">')[1:]
    cards[-1] = cards[-1].partition("</ol>")[0]
    assert all(("(right with 83 %)" in card) == ("row 3<" in card) for card in cards)
    assert all(('class="why"><summary' in card) == ("row 2<" in card) for card in cards)
    text = " ".join(Page(page).text.split())
    assert f"better caption (right with 83 %): {attack}" in text
    assert "10 with a better caption, about 8 right" in text
    assert "2.5 nats above the next best" in page
    assert "on captions that were exchanged on purpose; about 8 of 10 are right." in text
    facts = [re.findall(r'<li dir="auto">(.*?)</li>', card) for card in cards if "row 2<" in card]
    assert facts
    assert all(fact == ["a", "b", "its loss is high"] for fact in facts)


@pytest.mark.usefixtures("undrawn")
def test_a_suggestion_of_unknown_precision_is_none(tmp_path: Path) -> None:
    """As version 0.1 wrote them, of which most are wrong."""
    scored = make_scored(2, ecif_suggested_text=[None, "a cat"], ecif_suggested_margin=[None, 2.5])
    page = render(scored, tmp_path)
    assert "a cat" not in page
    assert "better caption" not in page


@pytest.mark.usefixtures("undrawn")
def test_no_path_of_this_machine_is_told(tmp_path: Path) -> None:
    home = "/home/someone/secret"
    query = {"source": f"{home}/query, split test", "rows": 20, "chosen": False, "loss": 1.9}
    page = render(
        make_scored(3),
        tmp_path,
        model=f"{home}/model",
        dataset=f"{home}/pairs",
        query=query,
        warnings=[f"3 images of {home}/test are in the data, too."],
        config={"vocabulary": f"{home}/words.txt"},
    )
    assert "someone" not in page
    assert all(name in page for name in ("query, split test", "3 images of test", "words.txt"))


@pytest.mark.usefixtures("undrawn")
def test_the_first_screen_has_pictures_and_what_to_do(tmp_path: Path) -> None:
    page = render(make_scored(60), tmp_path)
    first = page[: page.index('<section id="meaning"')]
    assert first.count('alt="Image of row') == report.STRIP
    assert "hf-ecif calibrate OUT --sample 30" in first
    reason = "it ranks a pair above another in 52 % of cases."
    noise = {"rate": 0.3, "threshold": 1.0, "abstains": reason}
    suspicion = [float(row % 7) for row in range(60)]
    none = {"ecif_noise_probability": [None] * 60, "ecif_borderline": [False] * 60}
    flag = {"ecif_flag": [False] * 60, "ecif_suspicion": suspicion}
    page = render(make_scored(60, **none, **flag), tmp_path, noise=noise)
    first = page[: page.index('<section id="meaning"')]
    assert "Three remedies, in order" in first
    assert re.findall(r"row (\d+)</span>", first)[:3] == ["6", "13", "20"]
    text = first[first.index("Three remedies") :]
    places = [text.index(word) for word in ("ANOTHER_MODEL", "RIGHT_PAIRS", "calibrate OUT")]
    assert places == sorted(places)


@pytest.mark.usefixtures("undrawn")
def test_borderline_cards_are_marked(tmp_path: Path) -> None:
    cards = re.findall(r'<li class="card">.*?</li>', render(make_scored(5), tmp_path), re.S)
    marked = {re.findall(r"row (\d)<", card)[0] for card in cards if ">borderline<" in card}
    assert marked == {"1", "2", "3"}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("count", [2, 40])
def test_table_of_groups(tmp_path: Path, count: int) -> None:
    group = {"rows": 80, "noise_rate": 0.25, "threshold": 0.41, "flagged": 17, "borderline": 3}
    table = [{"group": f"<i>{number}</i>", **group} for number in range(count)]
    groups = {"column": "language", "smallest": 50, "other_rows": 7, "table": table}
    text = Page(render(make_scored(5), tmp_path, groups=groups)).text
    assert "By the column language" in text
    assert "the other 7 rows are judged by those of all data" in text
    for number in range(count):
        assert f"<i>{number}</i> 80 25 % 41 % 17 3" in text
    assert ("Show 10 more" in text) == (count == 40)
    assert "Group by group" not in Page(render(make_scored(5), tmp_path)).text


def test_no_flagged_rows(tmp_path: Path) -> None:
    page = Page(render(make_scored(5, flagged=2.0), tmp_path))
    assert "none is sure enough to be flagged" in page.text
    assert "No pair was flagged." in page.text


def test_where_hardly_anything_is_wrong(tmp_path: Path) -> None:
    noise = {"rate": 0.004, "threshold": 1 / 3, "borderline": 0}
    truth = {"column": "is_wrong", "misaligned": 0, "found": 0, "precision": None, "recall": None}
    page = render(make_scored(5, flagged=2.0), tmp_path, noise=noise, truth=truth)
    text = Page(page).text
    assert "Less than one of the 5 pairs is estimated to be misaligned" in text
    assert "Precision – none is flagged" in text


def test_every_row_unreadable(tmp_path: Path) -> None:
    page = Page(render(make_scored(3, unreadable=(0, 1, 2)), tmp_path))
    assert "None of the 3 pairs could be read, so nothing was scored." in page.text
    assert "Rows that cannot be read 3 rows" in " ".join(page.text.split())
    assert "Most harmful" not in page.text


def test_one_row_and_one_constant_score(tmp_path: Path) -> None:
    zeros = {name: [0.0] for name in ("ecif_score", "ecif_positive", "ecif_negative")}
    page = Page(render(make_scored(1, **zeros), tmp_path))
    assert "No pair has a negative score." in page.text
    assert "Borderline" in page.text


@pytest.mark.usefixtures("undrawn")
def test_what_a_rate_is_worth_is_told(tmp_path: Path) -> None:
    noise = {"rate": 0.195, "threshold": 0.5, "interval": [0.15, 0.24]}
    page = Page(render(make_scored(5), tmp_path, format_version=2, noise=noise))
    assert "Estimated noise 19.5 % 15 % to 24 %; 0 borderline" in page.text
    assert "About 19.5 % (15 % to 24 %) of the 5 pairs look misaligned" in page.text
    page = Page(render(make_scored(5), tmp_path, noise=noise | {"rate_is_bound": True}))
    assert "Estimated noise 19.5 % at most 24 %; 0 borderline" in page.text
    assert "About 19.5 % (at most 24 %) of the 5 pairs look misaligned" in page.text
    reason = "the model cannot tell right from wrong here."
    page = Page(render(make_scored(5, flagged=2.0), tmp_path, noise=noise | {"abstains": reason}))
    assert "Nothing is flagged: the model cannot tell right from wrong pairs here." in page.text
    assert reason in page.text
    assert "Estimated noise unknown" in page.text


def test_without_probabilities_no_histogram_is_drawn(tmp_path: Path) -> None:
    unknown = [None] * 5
    scored = make_scored(5, flagged=2.0).remove_columns("ecif_noise_probability")
    kind = datasets.Value("float32")
    scored = scored.add_column("ecif_noise_probability", unknown, feature=kind)
    noise = {"rate": 0.4, "threshold": 0.5, "abstains": "the model cannot tell."}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(render(scored, tmp_path, noise=noise))
    assert "Influence score" in page.text
    assert "Probability of being misaligned" not in page.text


@pytest.mark.usefixtures("undrawn")
def test_a_name_that_a_page_does_not_know_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="'tiles' is undefined"):
        write_page(tmp_path / "page.html", "outcome.html.j2", command="", verdict="", about={})
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_failure_leaves_the_old_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = make_scored(2)
    before = render(scored, tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(scored, make_summary(scored), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_same_audit_gives_the_same_page(tmp_path: Path) -> None:
    scored = make_scored(10)
    assert render(scored, tmp_path) == render(scored, tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1506, "1,506"),
        (-3, "−3"),
        (0.012345, "0.0123"),
        (12345.6, "12,346"),
        (999.7, "1,000"),
        (3.2e-5, "3.20 × 10⁻⁵"),
        (-4e7, "−4.00 × 10⁷"),
        (0.0, "0"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_histograms_lose_no_pair() -> None:
    score = np.array([-1e6, -1.0, 0.0, 1.0, 1e6] * 300)
    flag = score < 0.0
    for figure in (
        viz.score_histogram(score, flag),
        viz.probability_histogram(np.linspace(0.0, 1.0, score.size), flag, 0.5),
    ):
        top = max(bar.get_y() + bar.get_height() for bar in figure.axes[0].patches)
        total = sum(bar.get_height() for bar in figure.axes[0].patches)
        assert top > 0
        assert total == score.size


@pytest.mark.usefixtures("undrawn")
def test_contradicted_words_are_underlined_and_escaped(tmp_path: Path) -> None:
    caption = "a <b>blue</b> cat, 鳥"
    words = [[{"word": "blue", "start": 5, "end": 9}, {"word": "鳥", "start": 19, "end": 20}]]
    scored = make_scored(2).remove_columns("text").add_column("text", ["plain", caption])
    scored = scored.add_column("ecif_wrong_words", [None, *words], feature=WRONG_WORDS)
    page = render(scored, tmp_path)
    underlined = re.findall(r'<u class="wrong"[^>]*>(.*?)</u>', page)
    assert set(underlined) == {"blue", "鳥"}
    assert "a &lt;b&gt;<u" in page
    assert "<b>" not in page
    relabelled = scored.add_column("ecif_original_text", [None, caption])
    assert "<u class" not in render(relabelled, tmp_path)
