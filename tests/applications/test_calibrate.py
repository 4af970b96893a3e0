"""From an audit and verdicts to a calibrated audit, on rows whose truth is known."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from scipy.special import logit

from hf_ecif.applications.calibrate import (
    CalibrateRequest,
    run_calibration,
    write_sheet,
)
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.cleaning import clean
from hf_ecif.data.columns import set_column
from hf_ecif.data.loading import load_scored
from hf_ecif.data.summary import CalibrationFacts, Summary
from hf_ecif.errors import UserError
from tests.support.hub import audits

ROWS, UNREADABLE = 300, 7
WRONG = set(range(0, ROWS, 5))  # a fifth


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit that flags 60 rows, half of them wrong, and misses as many wrong ones."""
    flagged = [row for row in range(ROWS) if row % 10 in (0, 1)]
    place = tmp_path_factory.mktemp("calibrate")
    return audits.write_audit(
        place / "audit",
        "some/birds",
        data=audits.rows(ROWS),
        flagged=flagged,
        unreadable=[UNREADABLE],
    )


@pytest.fixture
def audit(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(template, tmp_path / "audit"))


def judge(sheet: Path, answers: dict[int, str] | None = None) -> Path:
    """Fill in a sheet by the truth, or else by answers."""
    with sheet.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        row = int(line["row"])
        truth = "wrong" if row in WRONG else "right"
        line["verdict"] = truth if answers is None else answers.get(row, "")
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return sheet


def load(folder: Path, part: str) -> list[dict]:
    return list(load_dataset(str(folder / part), split="train").remove_columns("image"))


def calibrate(audit: Path, size: int = 60, seed: int = 0, **options: object) -> Summary:
    sheet = judge(write_sheet(audit, size, seed=seed).csv)
    return run_calibration(CalibrateRequest(audit=audit, verdicts=sheet, **options))


def facts(summary: Summary) -> CalibrationFacts:
    assert summary.calibration is not None
    return summary.calibration


class TestSheet:
    def test_shows_pairs_and_nothing_of_the_audit(self, audit):
        sheet = write_sheet(audit, 30)
        (split,) = load_dataset("parquet", data_files=str(sheet.parquet)).values()
        assert split.column_names == ["row", "verdict", "caption", "image"]
        assert split["row"][:] == sheet.rows
        assert split[0]["caption"] == f"bird number {sheet.rows[0]}"
        assert split[0]["image"].size == (12, 12)
        with sheet.csv.open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [int(line["row"]) for line in lines] == sheet.rows
        assert {line["verdict"] for line in lines} == {""}
        assert set(lines[0]) == {"row", "verdict", "caption"}

    def test_half_are_flagged_mixed_and_none_is_unreadable(self, audit):
        sheet = write_sheet(audit, 200)
        flagged = [row % 10 in (0, 1) for row in sheet.rows]
        assert sum(flagged) == 60  # all there are
        assert sheet.rows != sorted(sheet.rows)
        assert UNREADABLE not in sheet.rows
        design = json.loads((audit / "calibration" / "sample.json").read_text())
        assert [s["inclusion_probability"] for s in design["strata"]] == [1.0, 140 / 239]

    def test_is_not_overwritten_by_accident(self, audit):
        first = write_sheet(audit, 30)
        with pytest.raises(UserError, match="perhaps filled in"):
            write_sheet(audit, 60)
        more = write_sheet(audit, 60, overwrite=True)
        assert set(first.rows) < set(more.rows)

    @pytest.mark.parametrize("size", [-1, 0, 9])
    def test_too_few(self, audit, size):
        with pytest.raises(UserError, match=f"`sample={size}`: it takes at least 10"):
            write_sheet(audit, size)

    def test_of_no_audit(self, tmp_path):
        with pytest.raises(UserError, match="holds no finished audit"):
            write_sheet(tmp_path, 30)


def silence(audit: Path) -> Path:
    """The audit as one that abstains: an order, but neither probabilities nor flags."""
    folder = AuditFolder(audit)
    scored = load_scored(folder, folder.read_summary().columns)
    chance = np.array(scored["ecif_noise_probability"][:], dtype=float)
    odds = [None if np.isnan(value) else value for value in logit(chance)]
    scored = set_column(scored, "ecif_suspicion", odds)
    scored = set_column(scored, "ecif_noise_probability", [None] * len(scored))
    flags = scored.with_format(None)["ecif_flag"][:]
    scored = set_column(scored, "ecif_flag", [None if flag is None else False for flag in flags])
    result = clean(scored)
    for part in ("scored", "kept", "removed"):
        shutil.rmtree(audit / part)
    folder.write_rows(result, scored)
    before = folder.read_summary()
    folder.finish(
        before.replace(
            flagged=0,
            kept=len(result.kept),
            removed=len(result.removed),
            noise=before.noise.replace(abstains="it cannot tell", interval=(0.0, 0.7)),
        )
    )
    return audit


def test_verdicts_make_an_abstaining_audit_speak(audit, tmp_path):
    assert silence(audit)
    found = calibrate(audit, 120, output=tmp_path / "new")
    assert found.noise.abstains is None
    low, high = found.noise.interval
    assert low < 60 / 299 < high
    assert (low, high) == (facts(found).noise_rate.low, facts(found).noise_rate.high)
    assert found.kept + found.removed == ROWS
    assert found.removed == found.flagged + 1
    for number, row in enumerate(load(tmp_path / "new", "scored")):
        assert (row["ecif_noise_probability"] is None) == (number == UNREADABLE)


class TestCalibration:
    def test_figures_are_near_the_truth(self, audit, tmp_path):
        found = facts(calibrate(audit, 80, seed=2, output=tmp_path / "new"))
        for one, true in (
            (found.noise_rate, 60 / 299),
            (found.before.precision, 30 / 60),
            (found.before.recall, 30 / 60),
        ):
            assert one.low < true < one.high
        counts = found.verdicts
        assert counts.drawn == counts.right + counts.wrong == 80

    def test_all_rows_are_kept_or_removed_and_judged_ones_as_the_verdict_says(
        self, audit, tmp_path
    ):
        found = calibrate(audit, output=tmp_path / "new")
        scored, kept, removed = (load(tmp_path / "new", p) for p in ("scored", "kept", "removed"))
        assert sorted(row["text"] for row in kept + removed) == sorted(r["text"] for r in scored)
        assert (len(kept), len(removed)) == (found.kept, found.removed)
        verdicts = {"right": 0, "wrong": 0}
        for number, row in enumerate(scored):
            verdict = row["ecif_verdict"]
            if verdict is not None:
                verdicts[verdict] += 1
                assert (verdict == "wrong") == (number in WRONG) == row["ecif_flag"]
                assert row["ecif_noise_probability"] == float(number in WRONG)
        counts = facts(found).verdicts
        assert verdicts == {"right": counts.right, "wrong": counts.wrong}
        assert all(row["ecif_reason"] for row in removed)
        assert scored[UNREADABLE]["ecif_flag"] is None
        assert scored[UNREADABLE]["ecif_reason"] == "image unreadable"

    def test_probabilities_are_where_the_verdicts_have_them(self, audit, tmp_path):
        calibrate(audit, 100, output=tmp_path / "new")
        rows = [row for row in load(tmp_path / "new", "scored") if row["ecif_verdict"] is None]
        by_audit: dict[float, float] = {
            round(row["ecif_audit_probability"], 3): row["ecif_noise_probability"]
            for row in rows
            if row["ecif_audit_probability"] is not None
        }
        assert by_audit[0.9] == pytest.approx(30 / 60, abs=0.12)
        assert by_audit[0.1] == pytest.approx(30 / 239, abs=0.06)

    def test_the_result_is_an_audit_with_a_report(self, audit, tmp_path):
        found = calibrate(audit, output=tmp_path / "new")
        folder = AuditFolder(tmp_path / "new")
        assert folder.read_summary() == found
        folder.check_counts(found)
        page = (tmp_path / "new" / "report.html").read_text()
        assert "What the verdicts say" in page
        assert "60 pairs were drawn at random" in page

    def test_flags_agree_with_the_threshold(self, audit, tmp_path):
        found = calibrate(audit, 100, output=tmp_path / "new")
        threshold = found.noise.threshold
        for row in load(tmp_path / "new", "scored"):
            if row["ecif_flag"] is not None:
                assert row["ecif_flag"] == (row["ecif_noise_probability"] > threshold)

    def test_in_place_and_again_changes_nothing_more(self, audit):
        first = calibrate(audit, overwrite=True)
        before = load(audit, "scored")
        sheet = audit / "calibration" / "sheet.csv"
        again = run_calibration(CalibrateRequest(audit=audit, verdicts=sheet, overwrite=True))
        assert load(audit, "scored") == before
        assert again == first
        assert {p.name for p in audit.iterdir()} == {
            *("scored", "kept", "removed", "summary.json", "report.html", "calibration")
        }
        assert not list(audit.parent.glob(".*"))

    def test_later_verdicts_are_added_to_earlier_ones(self, audit):
        calibrate(audit, 30, overwrite=True)
        more = write_sheet(audit, 60, overwrite=True)
        with more.csv.open(newline="") as file:
            known = [line for line in csv.DictReader(file) if line["verdict"]]
        assert len(known) == 30
        judged = run_calibration(
            CalibrateRequest(audit=audit, verdicts=judge(more.csv), overwrite=True)
        )
        counts = facts(judged).verdicts
        assert counts.right + counts.wrong == 60

    def test_what_nobody_asked_for_moves_no_figure(self, audit, tmp_path):
        sheet = judge(write_sheet(audit, 40).csv)
        plain = run_calibration(
            CalibrateRequest(audit=audit, verdicts=sheet, output=tmp_path / "one")
        )
        drawn = {int(line.split(",")[0]) for line in sheet.read_text().splitlines()[1:]}
        other = next(row for row in range(ROWS) if row not in drawn)
        with sheet.open("a") as file:
            file.write(f"{other},wrong,\n")
        found = run_calibration(
            CalibrateRequest(audit=audit, verdicts=sheet, output=tmp_path / "two")
        )
        assert facts(found).before == facts(plain).before
        assert facts(found).verdicts.unasked == 1
        assert load(tmp_path / "two", "scored")[other]["ecif_flag"] is True


class TestPromise:
    def test_is_kept(self, audit, tmp_path):
        found = calibrate(audit, 120, output=tmp_path / "new", precision=0.35)
        told = facts(found)
        assert told.promise is not None
        assert told.promise.holds
        assert told.after.precision.value > 0.35
        assert told.warnings == []

    def test_that_cannot_be_made_flags_only_what_was_judged_wrong(self, audit, tmp_path):
        found = calibrate(audit, 30, output=tmp_path / "new", precision=0.9)
        told = facts(found)
        assert told.promise is not None
        assert not told.promise.holds
        assert found.flagged == told.verdicts.wrong
        (warning,) = told.warnings
        assert "cannot be promised" in warning
        assert "at least 22 verdicts" in warning
        assert "`sample=52`" in warning
        assert np.isnan(told.after.precision.value)

    @pytest.mark.parametrize("name", ["precision", "confidence"])
    def test_of_no_share(self, audit, tmp_path, name):
        with pytest.raises(UserError, match=f"`{name}=1.5`: must be between 0 and 1"):
            calibrate(audit, output=tmp_path / "new", **{name: 1.5})


class TestRefused:
    def test_without_a_place_to_write_to(self, audit):
        with pytest.raises(UserError, match="`overwrite` to calibrate it in place"):
            calibrate(audit)

    def test_without_a_sample(self, audit, tmp_path):
        (tmp_path / "v.csv").write_text("row,verdict\n1,right\n")
        request = CalibrateRequest(
            audit=audit, verdicts=tmp_path / "v.csv", output=tmp_path / "new"
        )
        with pytest.raises(UserError, match="Draw some first"):
            run_calibration(request)

    def test_too_few_verdicts(self, audit, tmp_path):
        sheet = write_sheet(audit, 30)
        judge(sheet.csv, dict.fromkeys(sheet.rows[:9], "right"))
        request = CalibrateRequest(audit=audit, verdicts=sheet.csv, output=tmp_path / "new")
        with pytest.raises(UserError, match="9 have a verdict of right or wrong"):
            run_calibration(request)

    def test_a_sample_of_another_audit(self, audit, tmp_path):
        sheet = judge(write_sheet(audit, 30).csv)
        design = audit / "calibration" / "sample.json"
        values = json.loads(design.read_text())
        values["strata"][0]["drawn"][0] += 1
        design.write_text(json.dumps(values))
        request = CalibrateRequest(audit=audit, verdicts=sheet, output=tmp_path / "new")
        with pytest.raises(UserError, match="was drawn from another audit"):
            run_calibration(request)

    def test_many_that_cannot_be_told_are_told_of(self, audit, tmp_path):
        sheet = write_sheet(audit, 30)
        answers = dict.fromkeys(sheet.rows[:15], "right")
        judge(sheet.csv, answers | dict.fromkeys(sheet.rows[15:], "unsure"))
        found = run_calibration(
            CalibrateRequest(audit=audit, verdicts=sheet.csv, output=tmp_path / "new")
        )
        assert "15 of 30 pairs could not be told" in found.warnings[-1]
