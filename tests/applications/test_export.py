"""``hf-ecif export`` and its like in Python, from folders of audits and of cleanings."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

import hf_ecif
from hf_ecif.applications.calibrate import write_sheet
from hf_ecif.applications.export import run_export
from hf_ecif.applications.requests import ExportRequest
from hf_ecif.applications.review import apply_review
from hf_ecif.data.review import Decision, Review
from hf_ecif.errors import UserError
from tests.support.commands import Run
from tests.support.exports import read_tar
from tests.support.hub.audits import rows, write_audit

COUNT, FLAGGED, UNREADABLE = 30, [*range(1, 30, 5)], [7]
KEPT = [row for row in range(COUNT) if row not in (*FLAGGED, *UNREADABLE)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export") / "audit"
    return write_audit(
        place, "some/birds", data=rows(COUNT), flagged=FLAGGED, unreadable=UNREADABLE,
        suggestions={1: "a crow"},
    )  # fmt: skip


@pytest.fixture
def audit(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "audit"))


def ids(folder: Path) -> list[int]:
    read: list[int] = pq.read_table(folder / "ids.parquet")["ecif_row"].to_pylist()
    return read


def tasks(folder: Path) -> list[dict]:
    read: list[dict] = json.loads((folder / "tasks-001.json").read_text())
    return read


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", [*range(COUNT)]),
        ("kept", KEPT),
        ("removed", sorted([*FLAGGED, *UNREADABLE])),
        ("flagged", FLAGGED),
    ],
)
def test_which_rows(run: Run, audit: Path, tmp_path: Path, which: str, expected: list[int]) -> None:
    out = tmp_path / "out"
    status, printed = run(
        "export", audit, "--to", "parquet-ids", "--rows", which, "--output", out, "--quiet"
    )
    assert status == 0, printed
    assert f"{len(expected)} rows in ids.parquet." in printed
    assert ids(out) == expected


def test_json_for_programs(run: Run, audit: Path, tmp_path: Path) -> None:
    status, printed = run(
        "export", audit, "--to", "webdataset", "--output", tmp_path / "out", "--json"
    )
    assert (status, json.loads(printed)["rows"]) == (0, len(KEPT))


def test_in_python(audit: Path, tmp_path: Path) -> None:
    opened = hf_ecif.load_audit(audit)
    done = opened.export("parquet-ids", tmp_path / "ids", rows="flagged")
    assert (done.rows, ids(tmp_path / "ids")) == (len(FLAGGED), FLAGGED)
    opened.clean("weight").export("parquet-ids", tmp_path / "weights", repeats=2)
    weights = opened.clean("weight").kept["ecif_weight"][:]
    expected = sum(round(2 * weight) for weight in weights)
    assert pq.read_metadata(tmp_path / "weights/ids.parquet").num_rows == expected


def test_a_sample_goes_before_the_flagged_rows(audit: Path, tmp_path: Path) -> None:
    opened = hf_ecif.load_audit(audit)
    opened.export("label-studio", tmp_path / "flagged")
    assert [task["data"]["row"] for task in tasks(tmp_path / "flagged")] == FLAGGED
    sheet = write_sheet(audit, 12)
    hf_ecif.load_audit(audit).export("label-studio", tmp_path / "sample")
    request = ExportRequest(audit=audit, to="label-studio", output=tmp_path / "command")
    run_export(request)
    for folder in (tmp_path / "sample", tmp_path / "command"):
        assert [task["data"]["row"] for task in tasks(folder)] == sheet.rows
        assert not any("predictions" in task for task in tasks(folder))


def test_of_a_cleaning(run: Run, audit: Path, tmp_path: Path) -> None:
    """New captions are in the tars, and every other column beside them."""
    clean, out = tmp_path / "clean", tmp_path / "out"
    assert run("clean", audit, "--strategy", "relabel", "--output", clean, "--quiet")[0] == 0
    status, printed = run("export", clean, "--to", "webdataset", "--output", out, "--quiet")
    assert status == 0, printed
    kept = load_dataset(str(clean / "kept"), split="train")
    members = read_tar(out / "00000.tar")
    texts = [content.decode() for name, content in members.items() if name.endswith(".txt")]
    assert texts == kept["text"][:]
    assert "a crow" in texts
    kinds = [json.loads(members[name])["kind"] for name in members if name.endswith(".json")]
    assert kinds == kept["kind"][:]


def test_decisions_of_a_review_count(audit: Path, tmp_path: Path) -> None:
    review = Review().decide(Decision(1, "keep")).decide(Decision(2, "remove"))
    apply_review(audit, review, tmp_path / "reviewed")
    hf_ecif.load_audit(tmp_path / "reviewed").export("parquet-ids", tmp_path / "out", rows="kept")
    assert ids(tmp_path / "out") == sorted({*KEPT, 1} - {2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tfrecord"], "--to tfrecord: must be one of parquet-ids, uids, keys"),
        (["--to", "uids"], "There is no column 'uid' of ids.*Name the right one with --id-column"),
        (["--to", "uids", "--id-column", "text"], "Row 0: text = 'bird number 0' is no uid"),
        (["--to", "keys"], "These rows have no '__key__': they were not read from tars"),
        (["--to", "cleanlab", "--rows", "sample"], "--rows sample: no rows .* --sample 30"),
        (["--to", "fiftyone", "--repeats", 2], "--repeats 2: fiftyone has each row once"),
    ],
)
def test_what_cannot_be(run: Run, audit: Path, tmp_path: Path, options: list, message: str) -> None:
    status, printed = run("export", audit, *options, "--output", tmp_path / "out", "--quiet")
    assert status == 2
    assert re.search(message, printed), printed
    assert not (tmp_path / "out").exists()


def test_places(audit: Path, tmp_path: Path) -> None:
    def export(audit: Path, output: Path) -> None:
        run_export(ExportRequest(audit=audit, to="cleanlab", output=output))

    with pytest.raises(UserError, match="holds no finished audit"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="holds the input"):
        export(audit, tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        export(audit, tmp_path / "full")
