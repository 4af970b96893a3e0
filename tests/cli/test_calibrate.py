"""``hf-ecif calibrate``, as a user types it."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_ecif.cli.main import main
from tests.support.hub import audits

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 rows, of which every fifth is flagged."""
    place = tmp_path_factory.mktemp("calibrate")
    flagged = list(range(0, 100, 5))
    rows = audits.rows(100)
    return audits.write_audit(place / "audit", "some/birds", data=rows, flagged=flagged)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hf-ecif", "calibrate", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out + err

    return command


def test_from_a_sheet_to_a_calibrated_audit(run: Run, audit: Path, tmp_path: Path) -> None:
    status, printed = run(audit, "--sample", 40)
    assert status == 0, printed
    sheet = audit / "calibration" / "sheet.csv"
    assert str(sheet) in printed
    lines = list(csv.DictReader(sheet.open(newline="")))
    for line in lines:
        line["verdict"] = "wrong" if int(line["row"]) % 5 == 0 else "right"
    filled = tmp_path / "filled.csv"
    with filled.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    new = tmp_path / "new"
    status, printed = run(audit, "--verdicts", filled, "--output", new, "--precision", 0.8)
    assert status == 0, printed
    words = " ".join(printed.split())
    assert "With 90 % confidence, at least 80 % of the flagged rows are wrong." in words
    assert "precision" in words
    assert "100 % (100 % to 100 %)" in words  # all flagged rows are judged
    status, printed = run(audit, "--verdicts", filled, "--output", tmp_path / "other", "--json")
    assert json.loads(printed)["verdicts"]["drawn"] == 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Give either --sample, to draw rows to judge, or --verdicts"),
        (["--sample", 30, "--verdicts", "x.csv"], "Give either --sample"),
        (["--sample", 5], "--sample 5: it takes at least 10 verdicts"),
        (["--verdicts", "none.csv"], "Give an --output folder for the calibrated audit"),
    ],
)
def test_mistakes(run: Run, audit: Path, options: list[object], words: str) -> None:
    status, printed = run(audit, *options)
    assert status == 2
    assert words in " ".join(printed.split())
