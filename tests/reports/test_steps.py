"""What to do next: every command is one that the command line takes."""

import re
import shlex
from collections.abc import Iterator

import pytest
import typer

from hf_ecif.cli.main import app
from hf_ecif.data.summary import (
    CleaningFacts,
    ErrorCounts,
    RemovalSummary,
    Summary,
    TraceSummary,
    ValidationSummary,
    ValueSummary,
)
from hf_ecif.reports import steps
from hf_ecif.reports.steps import Step
from tests.support.reports import compare_by, make_scored, make_summary

WHENCE = {
    "model": "/home/me/model",
    "dataset": "me/pairs",
    "query": {"source": "q", "dataset": "/data/q", "rows": 9, "chosen": False},
}


def audit(**parts: object) -> Summary:
    return make_summary(make_scored(30), **WHENCE, **parts)


def other(kind: type, **values: object) -> object:
    """A summary of another run, of which steps look at a few fields alone."""
    common = audit()
    return kind.model_construct(
        model=common.model, dataset=common.dataset, query=common.query, **values
    )


def every_step() -> Iterator[Step]:
    noise = {"rate": 0.3, "threshold": 1.0, "abstains": "it cannot tell."}
    for made in (audit(), audit(findings={"stock_phrase": 3}), audit(noise=noise)):
        yield from steps.after_audit(made)
    yield from steps.after_audit(audit(scored=0))
    for traced in (0, 3):
        errors = ErrorCounts(kind="retrieval-text", wrong=traced, traced=traced, of=9)
        yield from steps.after_trace(other(TraceSummary, errors=errors))
    yield from steps.after_value(other(ValueSummary, curves=None, candidates=None))
    yield from steps.after_removal(
        other(RemovalSummary, measures={"query": {}}, where="w", test=None)
    )
    for low in (-0.5, 0.5):
        yield from steps.after_validation(
            other(ValidationSummary, low=low, actual=[0.1] * 12, repeats=2)
        )
    cleaning = CleaningFacts(audit="a", strategy="drop", counts={})
    yield from steps.after_cleaning(cleaning, compare_by(0.1, [0.2], [0.3]))


COMMANDS = sorted({step.command for step in every_step() if step.command})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_taken(command: str) -> None:
    program, name, *given = shlex.split(command)
    assert program == "hf-ecif"
    known = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    known.make_context(name, given)  # refuses what it does not know, and what is missing
    assert "/" not in re.sub(r"OWNER/NAME|me/pairs", "", command)


def test_a_long_command_is_one_to_the_shell() -> None:
    for command in COMMANDS:
        lines = Step("", command).lines
        assert shlex.split(lines.replace("\\\n", "")) == shlex.split(command)
        assert max(map(len, lines.splitlines())) <= steps.WIDTH + 2
