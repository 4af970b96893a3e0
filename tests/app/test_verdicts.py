"""A few verdicts: what is kept of them, what they say, and the audit by them."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from hf_ecif.app import calibrate
from hf_ecif.app.calibrate import PEOPLE, Stored, compare_people, show_pairs, take_verdicts, tell
from hf_ecif.app.selection import open_audit
from hf_ecif.applications.calibrate import draw_rows
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.verdicts import read_verdicts

SIZE = 30


def key(folder: str) -> str:
    return open_audit(folder).key


def sent(**data: Any) -> gr.EventData:
    return gr.EventData(None, data)


@pytest.fixture
def rows(many: str) -> list[int]:
    """The rows to judge, in their order."""
    return draw_rows(Path(many), SIZE).rows


@pytest.fixture
def judged(many: str, rows: list[int]) -> Stored:
    """All are judged: two of three are wrong."""
    verdicts = {str(row): ("right" if n % 3 == 0 else "wrong") for n, row in enumerate(rows)}
    return {key(many): {PEOPLE[0]: verdicts}}


def test_pairs_are_shown_blind_and_in_the_order_of_the_sheet(many: str, rows: list[int]) -> None:
    page = show_pairs(many, SIZE, PEOPLE[0], None)
    shown = [int(part.partition('"')[0]) for part in page.split('<li data-row="')[1:]]
    assert shown == rows
    assert "%" not in page
    assert "flag" not in page.lower().replace("flag:", "")


def test_what_was_judged_before_is_marked_for_its_person_alone(many: str, judged: Stored) -> None:
    mine, theirs = (show_pairs(many, SIZE, person, judged) for person in PEOPLE)
    assert mine.count('data-verdict="wrong"') == 20
    assert theirs.count('data-verdict=""') == SIZE


def test_verdicts_are_kept_by_audit_and_person() -> None:
    kept = take_verdicts(None, sent(audit="a", person=PEOPLE[0], verdicts={"3": "wrong"}))
    kept = take_verdicts(kept, sent(audit="a", person=PEOPLE[1], verdicts={"3": "right"}))
    kept = take_verdicts(kept, sent(audit="b", person=PEOPLE[0], verdicts={"9": "right"}))
    assert kept == {
        "a": {PEOPLE[0]: {"3": "wrong"}, PEOPLE[1]: {"3": "right"}},
        "b": {PEOPLE[0]: {"9": "right"}},
    }
    for number in range(calibrate.MOST_AUDITS):
        kept = take_verdicts(kept, sent(audit=str(number), person=PEOPLE[0], verdicts={}))
    assert list(kept) == [str(number) for number in range(calibrate.MOST_AUDITS)]


@pytest.mark.parametrize(
    "told", [{"x": "wrong", "999999": "wrong", "0": "perhaps"}, None, 3, ["a"], "text"]
)
def test_a_browser_may_say_anything(many: str, told: Any) -> None:
    kept: Any = {key(many): {PEOPLE[0]: told}}
    assert "appear here with the first verdict" in tell(many, SIZE, kept, False, 0.9)
    assert "data-row" in show_pairs(many, SIZE, PEOPLE[0], kept)


def test_intervals_narrow(many: str, rows: list[int], judged: Stored) -> None:
    sample = draw_rows(Path(many), SIZE)
    widths = []
    for count in (4, 12, 30):
        some = dict(list(judged[key(many)][PEOPLE[0]].items())[:count])
        found = sample.judge({int(row): verdict for row, verdict in some.items()}).facts
        widths.append(found.noise_rate.high - found.noise_rate.low)
        page = tell(many, SIZE, {key(many): {PEOPLE[0]: some}}, False, 0.9)
        assert f"After {count} of 30 verdicts" in " ".join(page.split())
        assert 'aria-label="Share judged wrong' in page
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.5 * widths[0]


def test_agreement_is_that_of_an_oracle() -> None:
    random = np.random.default_rng(0)
    one, two = (random.choice(["right", "wrong", "cannot tell"], 40).tolist() for _ in range(2))
    first = {str(row): verdict for row, verdict in enumerate(one)}
    second = {str(row): verdict for row, verdict in enumerate(two) if row % 4}
    found = compare_people(first, second)
    common = [row for row in range(40) if row % 4]
    pairs = [one[row] for row in common], [two[row] for row in common]
    alike = np.mean([a == b for a, b in zip(*pairs, strict=True)])
    assert found == pytest.approx((30, alike, cohen_kappa_score(*pairs)))
    assert compare_people(first, {"0": "right"}) is None
    same = dict.fromkeys(first, "right")
    assert compare_people(same, same) == pytest.approx((40, 1, np.nan), nan_ok=True)


def test_where_two_persons_disagree_it_cannot_be_told(many: str, judged: Stored) -> None:
    mine = judged[key(many)][PEOPLE[0]]
    flipped = {"right": "wrong", "wrong": "right"}
    other = {row: flipped[v] if n < 6 else v for n, (row, v) in enumerate(mine.items())}
    page = tell(many, SIZE, {key(many): {PEOPLE[0]: mine, PEOPLE[1]: other}}, False, 0.9)
    text = " ".join(page.split())
    assert "Two persons judged 30 of these pairs and agree on 80 %; Cohen's kappa is 0." in text
    assert "After 24 of 30 verdicts" in text


def test_a_sheet_is_saved_and_read_by_another(many: str, rows: list[int], judged: Stored) -> None:
    path = calibrate.save_sheet(many, SIZE, PEOPLE[0], judged)
    count = len(open_audit(many).rows.readable)
    assert {str(row): v for row, v in read_verdicts(Path(path), count).items()} == (
        judged[key(many)][PEOPLE[0]]
    )
    kept, said = calibrate.read_sheet(many, PEOPLE[1], path, judged)
    assert said == ""
    assert kept[key(many)][PEOPLE[1]] == kept[key(many)][PEOPLE[0]]
    Path(path).write_text("row,verdict\n1,perhaps\n")
    kept, said = calibrate.read_sheet(many, PEOPLE[1], path, judged)
    assert kept == judged
    assert "no verdict" in said
    assert str(Path(path).parent) not in said


@pytest.mark.parametrize("precision", [None, 0.5])
def test_what_is_applied_is_what_the_command_writes(
    many: str, judged: Stored, precision: float | None, tmp_path: Path
) -> None:
    asked = (many, SIZE, judged, precision is not None, precision or 0.9)
    opened, said = calibrate.apply_verdicts(*asked, True, str(tmp_path / "new"))
    assert opened == str(tmp_path / "new")
    assert "The calibrated audit is open" in said
    summary = AuditFolder(tmp_path / "new").read_summary()
    assert summary.calibration is not None
    assert (summary.calibration.verdicts.wrong, summary.calibration.verdicts.right) == (20, 10)
    from hf_ecif.applications.calibrate import CalibrateRequest, run_calibration

    again = run_calibration(
        CalibrateRequest(
            audit=tmp_path / "new",
            verdicts=AuditFolder(tmp_path / "new").calibration / "sheet.csv",
            precision=precision,
            output=tmp_path / "again",
        )
    )
    assert again.calibration == summary.calibration
    assert (again.flagged, again.kept) == (summary.flagged, summary.kept)


def test_too_few_verdicts_write_nothing(many: str, judged: Stored, tmp_path: Path) -> None:
    few = dict(list(judged[key(many)][PEOPLE[0]].items())[:5])
    asked = (many, SIZE, {key(many): {PEOPLE[0]: few}}, False, 0.9)
    opened, said = calibrate.apply_verdicts(*asked, True, str(tmp_path / "new"))
    assert opened == many
    assert "5 have a verdict of right or wrong" in said
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    opened, said = calibrate.apply_verdicts(*asked, True, str(tmp_path / "full"))
    assert opened == many
