"""``hf-ecif value``, as a user types it, its files and its page."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image, load_dataset

from hf_ecif.data.summary import ValueSummary
from hf_ecif.reports.value import write_value_page
from tests.support.commands import MODEL, Run
from tests.support.pages import Page

QUICK = ["--batch-size", 16, "--probes", 1, "--partitions", 2, "--fit-epochs", 2, "--quiet"]
SLICES = ["faces", "hands"]


@pytest.fixture(scope="module")
def rows(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ten rows to train on, one of them unreadable, a query in slices, and three candidates."""
    folder = tmp_path_factory.mktemp("rows")
    all_rows = Dataset.load_from_disk(str(data / "30"))
    texts = ["" if row == 4 else text for row, text in enumerate(all_rows["text"])]
    train = all_rows.remove_columns("text").add_column("text", texts)
    names = [*[SLICES[0]] * 6, *[SLICES[1]] * 4, "lonely", None]
    query = all_rows.select(range(10, 22)).add_column("slice", names)
    parts = {
        "train": train.select(range(10)),
        "query": query,
        "new": all_rows.select(range(25, 28)),
    }
    for name, part in parts.items():
        part.save_to_disk(folder / name)
    return {name: folder / name for name in parts}


@pytest.fixture(scope="module")
def options(rows: dict[str, Path]) -> list[object]:
    query = ["--query", rows["query"], "--query-split", "train"]
    return ["--model", MODEL, "--dataset", rows["train"], *query, *QUICK]


def table(path: Path) -> list[dict[str, Any]]:
    return load_dataset("parquet", data_files=str(path), split="train").to_list()


def test_everything_at_once(
    run: Run,
    rows: dict[str, Path],
    options: list[object],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    status, output = run(
        "value", *options, "--output", out, "--slice-column", "slice", "--curves", "--repeats", 1,
        "--test", rows["new"], "--test-split", "train", "--candidates", rows["new"], "--leverage",
    )  # fmt: skip
    assert status == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert [one["name"] for one in summary["slices"]] == ["all", *SLICES]
    assert summary["skipped"].keys() == {"lonely"}
    assert "No ranking for lonely" in output
    assert summary["query"]["unnamed"] == 1
    assert (summary["rows"], summary["scored"], summary["unreadable"]) == (10, 9, 1)

    valued = table(out / "value.parquet")
    assert "image" not in valued[0]
    assert [row["ecif_row"] for row in valued] == list(range(10))
    assert valued[4]["ecif_score"] is None
    assert valued[4]["ecif_reason"]
    scores = {row["ecif_row"]: row["ecif_score"] for row in valued if row["ecif_row"] != 4}
    assert all(
        row["ecif_score:hands"] != scores[row["ecif_row"]] for row in valued if row["ecif_score"]
    )
    leverage = [row["ecif_leverage"] for row in valued if row["ecif_row"] != 4]
    assert all(0 <= value < 1 for value in leverage)
    assert valued[4]["ecif_leverage"] is None
    assert all(0 < summary["leverage"][name] < 1 for name in ("median", "sample_median"))

    ranked = summary["slices"][0]["rankings"]["lowest"]
    harmful = sorted((row for row in scores if scores[row] < 0), key=scores.__getitem__)
    assert [entry["row"] for entry in ranked] == harmful
    assert summary["harmful"] == len(harmful)

    assert [curve["name"] for curve in summary["curves"]["curves"]] == [
        "most harmful", "random", "most valuable",
    ]  # fmt: skip
    assert summary["curves"]["held_out"]
    candidates = table(out / "candidates.parquet")
    assert len(candidates) == summary["candidates"]["valued"] == 3
    assert all(row["ecif_added_score"] is not None for row in candidates)

    page = Page((out / "value.html").read_text())
    for words in (
        "Slice by slice",
        "Does the ranking hold?",
        "Pairs to get",
        "worth having",
        *SLICES,
    ):
        assert words in page.text
    identifiers = page.attributes("id")
    assert len(identifiers) == len(set(identifiers))
    links = page.attributes("src", "href")
    assert all(link.startswith("data:") or link[1:] in identifiers for link in links)


def test_what_was_not_asked_for_is_left_out(
    run: Run,
    options: list[object],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    status, output = run("value", *options, "--output", out, "--json")
    assert status == 0, output
    assert json.loads(output) == json.loads((out / "summary.json").read_text())
    assert {path.name for path in out.iterdir()} == {"summary.json", "value.html", "value.parquet"}
    text = Page((out / "value.html").read_text()).text
    for words in ("Slice by slice", "Does the ranking hold?", "Pairs to get", "Conflicts"):
        assert words not in text


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--test", "anywhere"], "nothing without --curves"),
        (["--curves", "--repeats", 0], "--repeats 0"),
        (["--curves", "--fit-epochs", 0], "refits nothing"),
        (["--leverage", "--fit-epochs", 0], "--leverage is of a fit"),
        (["--slice-column", "nowhere"], "--slice-column 'nowhere' is not in the query"),
        (["--candidates", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(
    run: Run,
    options: list[object],
    tmp_path: Path,
    extra: list[object],
    words: str,
) -> None:
    status, output = run("value", *options, "--output", tmp_path / "o", *extra)
    assert status == 2
    assert words in " ".join(output.split())
    assert not (tmp_path / "o").exists()


def entry(row: int, score: float) -> dict[str, Any]:
    return {"row": row, "score": score, "positive": score, "negative": 0.0, "stderr": 1e-4}


def test_page_shows_html_as_text_and_a_conflict_in_both_slices(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    dataset = Dataset.from_dict({"image": [None, None], "text": [attack, "b"]}).cast_column(
        "image", Image(decode=False)
    )
    one = {
        "name": "all", "rows": 2, "loss_before": 1.0, "loss": 0.5, "harmful_share": 0.5,
        "agreement": 1.0, "rankings": {"lowest": [entry(0, -2e-3)], "highest": [entry(1, 1e-3)]},
    }  # fmt: skip
    sides = {
        "helps": {"slice": attack} | entry(1, 3e-3),
        "hurts": {"slice": "b"} | entry(1, -4e-3),
    }
    values = {
        **{"model": "m", "dataset": "d", "split": "train", "config": {}},
        **{"rows": 2, "scored": 2, "unreadable": 0, "unreadable_reasons": {}},
        **{"harmful": 1, "clearly_harmful": 1, "skipped": {}, "solvers": []},
        "columns": {"image": "image", "text": "text"},
        "slices": [one, one | {"name": attack}],
        "conflicts": [{"row": 1, "strength": 1.0} | sides],
        **{"curves": None, "candidates": None, "leverage": None},
        "query": {"source": "q", "rows": 2, "chosen": False, "slice_column": "s"},
    }
    summary = ValueSummary.from_dict(values)
    write_value_page(summary, dataset, None, tmp_path / "value.html")
    page = Page((tmp_path / "value.html").read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert attack in page.text
    assert "3.00 ± 0.10" in page.text
    assert "−4.00 ± 0.10" in page.text
    assert "No picture: no image in this row" in page.text
