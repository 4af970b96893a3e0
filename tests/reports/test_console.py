"""What a console shows: nothing in it is markup, paths stay whole, flags take arguments' place."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from hf_ecif.cli.flags import name_flags
from hf_ecif.data.summary import ComparisonFacts, Summary
from hf_ecif.reports.console import (
    Place,
    Shown,
    Warned,
    audit_lines,
    cleaning_lines,
    print_lines,
    scoring_lines,
)
from hf_ecif.reports.measures import judge_cleaning, tell_gains
from tests.support.hub.audits import fake_summary
from tests.support.reports import compare_by, outcome

HOSTILE = "[red]x[/red] [/] :smile:"


def printed(*lines: Shown, width: int = 60) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    print_lines(console, lines, name_flags)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", [str, Warned], ids=["sentence", "warning"])
def test_nothing_is_markup(kind: type) -> None:
    assert HOSTILE in printed(kind(HOSTILE))


def test_a_path_is_not_broken() -> None:
    path = Path("a" * 100) / HOSTILE
    assert printed(Place("Page", path)) == f"Page: {path}\n"


def test_arguments_are_flags() -> None:
    assert printed(Warned("A smaller `batch_size`.")) == "Warning: A smaller --batch-size.\n"


def test_an_audit() -> None:
    values = fake_summary("birds", count=1234, flagged=200, unreadable=3)
    values["truth"] = {"column": "wrong", "misaligned": 250, "found": 150, "precision": 0.75}
    summary = Summary.from_dict(values | {"warnings": ["look"]})
    text = printed(*audit_lines(summary, Path("out")), width=200)
    assert "1,234 rows: 200 flagged as misaligned" in text
    assert "Of 250 rows known to be misaligned, 150 are flagged (precision 75 %)." in text
    assert text.splitlines()[-2:] == ["Warning: look", "Report: out/report.html"]


def test_a_cleaning() -> None:
    """Gains are those over all rows, repeat by repeat; what is before them is no gain."""
    outcomes = [outcome("as given", 0.1, 0.1), outcome("all rows", 0.2, 0.3)]
    comparison = ComparisonFacts(
        test="birds",
        test_rows=40,
        outcomes=[*outcomes, outcome("drop", 0.25, 0.36)],
        warnings=["few"],
    )
    counts = {"drop": {"kept": 27, "removed": 3}, "weight": {"kept": 30}}
    lines = list(cleaning_lines(Path("audit"), counts, comparison, None))
    assert isinstance(lines[0], Table)
    text = printed(*lines, width=200)
    assert "removed" in text
    gain, sampling = 0.055, 0.055 * 0.945 / 40
    error = (0.005**2 + sampling) ** 0.5
    assert comparison.gain("drop", "all rows") == pytest.approx((gain, error))
    assert "Zero-shot accuracy, drop over all rows: 5.50 ± 3.64 points." in text
    assert "as given over" not in text
    assert "Rows:" not in text


def test_what_is_printed_of_a_gain_is_what_the_page_says() -> None:
    compared = compare_by(0.1, [0.2, 0.3], [0.25, 0.36])
    (printed_line,) = tell_gains(compared)
    headline = judge_cleaning(compared, "drop")
    figure = "5.50 ± 0.62 points"
    assert figure in printed_line
    assert headline.startswith("Fine-tuned on the cleaned rows, the model is " + figure)


def test_a_headline_says_that_no_fine_tuning_is_best() -> None:
    headline = judge_cleaning(compare_by(0.4, [0.2, 0.3], [0.25, 0.36]), "drop")
    assert headline.startswith("No fine-tuning at all is best, at 40 % of zero-shot accuracy.")
    assert "No clear difference" in judge_cleaning(compare_by(0.1, [0.2, 0.3], [0.3, 0.2]), "drop")
    assert "No clear difference" in judge_cleaning(compare_by(0.1, [0.2], [0.3]), "drop")


def test_without_classes_there_is_no_accuracy() -> None:
    outcomes = [
        outcome("all rows", 0.2, 0.3, classes=False),
        outcome("drop", 0.3, 0.4, classes=False),
    ]
    compared = ComparisonFacts(test="birds", test_rows=40, outcomes=outcomes, warnings=[])
    counts = {"drop": {"kept": 27, "removed": 3}}
    text = printed(*cleaning_lines(Path("audit"), counts, compared, None), width=200)
    assert "Text-to-image R@1, drop over all rows" in text
    assert "Zero-shot" not in text


def test_a_scoring() -> None:
    summary = {"rows": 12000, "unscored": 3, "shards": 2}
    assert "12,000 rows scored, 3 of them" in printed(*scoring_lines(summary, Path("o")), width=99)
