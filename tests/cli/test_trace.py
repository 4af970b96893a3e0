"""The command ``trace``, as a user types it: rows, summary and page."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from hf_ecif.applications.trace import TASKS
from hf_ecif.reports.trace import COLUMNS
from tests.support import DEMO
from tests.support.commands import MODEL, Run

QUICK = ["--batch-size", 16, "--probes", 1, "--partitions", 2, "--fit-epochs", 2, "--quiet"]
KINDS = pytest.mark.parametrize("kind", TASKS)


@pytest.fixture
def query(tmp_path: Path) -> Path:
    """40 pairs of the demo; row 3 has no caption, and row 5 one that is no HTML."""
    rows = load_dataset("parquet", data_files=str(DEMO / "data/validation.parquet"), split="train")
    rows = rows.select(range(40))
    texts = list(rows["text"])
    texts[3], texts[5] = "", "<script>alert(1)</script> & co"
    rows.remove_columns("text").add_column("text", texts).save_to_disk(tmp_path / "query")
    return tmp_path / "query"


@pytest.fixture
def trace(run: Run, data: Path, query: Path, tmp_path: Path) -> Run:
    """Of 30 rows, into ``out``."""

    def command(*options: object) -> tuple[int, str]:
        return run(
            "trace", "--model", MODEL, "--dataset", data / "30", "--split", "train",
            "--query", query, "--query-split", "train", "--output", tmp_path / "out",
            *QUICK, *options,
        )  # fmt: skip

    return command


@KINDS
def test_errors_are_found_and_traced(trace: Run, tmp_path: Path, kind: str) -> None:
    status, output = trace("--errors", kind, "--top-k", 3, "--most", 4)
    assert status == 0, output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    errors = summary["errors"]
    assert errors["kind"] == kind
    assert 0 < errors["traced"] == min(4, errors["wrong"])
    assert errors["of"] == 39
    asked = "captions" if kind == "retrieval-text" else "images"
    assert f"{errors['wrong']} of 39 {asked} of the query" in output
    rows = Dataset.from_parquet(str(tmp_path / "out/trace.parquet"))
    assert rows.column_names == list(COLUMNS)
    assert len(rows) == 3 * errors["traced"]
    assert rows["rank"][:3] == [0, 1, 2]
    assert 3 not in rows["error_row"][:]  # it cannot be read, and is still counted
    for row in rows:
        assert row["error_text"] != row["predicted_text"]
        assert row["margin"] > -5
        assert row["score"] == pytest.approx(row["positive"] + row["negative"], rel=1e-4, abs=1e-9)
        assert row["role"] in ("positive", "negative")
        assert (row["partner_text"] is None) == (row["partner_row"] is None)
        assert row["partner_row"] != row["cause_row"]


def test_page(trace: Run, tmp_path: Path) -> None:
    assert trace("--rows", 5, "--rows", 0, "--top-k", 20)[0] == 0
    page = (tmp_path / "out/trace.html").read_text()
    rows = Dataset.from_parquet(str(tmp_path / "out/trace.parquet"))
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "2 chosen rows, traced" in page
    assert sorted(set(rows["error_row"])) == [0, 5]
    assert page.count('class="error"') == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    shown = [row for row in rows if row["score"] < 0 and row["rank"] < 5]
    roles = {row["role"] for row in shown}
    assert ("As a positive:" in page) == ("positive" in roles)
    assert ("As a hard negative:" in page) == ("negative" in roles)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--errors", "typo"], "must be one of retrieval-text, retrieval-image, zero-shot"),
        (["--top-k", 0], "--top-k 0: must be at least 1"),
        (["--rows", 99], "--rows 99: the query has rows 0 to 39"),
        (["--rows", 3], "--rows 3: caption empty"),
    ],
)
def test_mistakes(trace: Run, tmp_path: Path, options: list[object], words: str) -> None:
    status, output = trace(*options)
    assert (status, words in output) == (2, True), output
    assert not (tmp_path / "out/summary.json").exists()


def test_an_audit_shows_the_errors_of_its_query(
    run: Run,
    data: Path,
    query: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "audit"
    sources = ["--model", MODEL, "--dataset", data / "30", "--output", out]
    status, output = run("audit", *sources, "--trace", 2, "--plantings", 1, *QUICK)
    assert (status, "give one (--query)" in output) == (2, True)
    asked = ["--query", query, "--query-split", "train", "--trace", 2, "--plantings", 1]
    status, output = run("audit", *sources, *asked, *QUICK)
    assert status == 0, output
    traced = json.loads((out / "summary.json").read_text())["trace"]
    assert traced["errors"]["traced"] == len(traced["worst"]) == 2
    report = (out / "report.html").read_text()
    assert "Behind the errors on the query" in report
    assert f"row {traced['worst'][0]['causes'][0]['cause_row']}" in report
    assert (out / "trace.html").exists()
    assert len(Dataset.from_parquet(str(out / "trace.parquet"))) == 20
