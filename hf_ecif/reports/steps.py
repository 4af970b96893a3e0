"""What to do next: the commands that follow a result, as its page shows them.

In commands, OUT is the folder of the page, and what is in capitals is for the reader to name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_ecif.data.cleaning import BEFORE
from hf_ecif.data.summary import (
    CleaningFacts,
    ComparisonFacts,
    Provenance,
    RemovalSummary,
    Summary,
    TraceSummary,
    ValidationSummary,
    ValueSummary,
)
from hf_ecif.utils.formatting import number
from hf_ecif.utils.hub_paths import public_name

WIDTH = 42  # letters of a command on one line
VERDICTS = 30  # to be judged by a person at first
REMOVABLE = ("placeholder_image", "stock_phrase", "says_nothing", "truncated_equal")  # findings


@dataclass(frozen=True)
class Step:
    """Something to do, in words, and the command for it; None where there is none."""

    words: str
    command: str | None = None

    @property
    def lines(self) -> str:
        """The command, a long one on several lines, as a shell takes them."""
        first, *options = (self.command or "").split(" --")
        lines = [first]
        for option in options:
            if len(lines[-1]) + len(option) + 3 > WIDTH:
                lines.append(" ")
            lines[-1] += f" --{option}"
        return " \\\n".join(lines)


def after_audit(summary: Summary) -> Iterator[Step]:
    """Steps after an audit; the remedies in their order where it abstains."""
    sample = f"hf-ecif calibrate OUT --sample {VERDICTS}"
    if not summary.scored:
        yield Step("Look at the reasons below, mend the data, and audit them again.")
        return
    if summary.noise.abstains:
        again = f"hf-ecif audit --model {{}} --dataset {public_name(summary.dataset)}"
        model = public_name(summary.model)
        yield Step(
            "Take a model that knows pairs of this kind: fine-tune this one on such pairs first, "
            "or choose another.",
            f"{again.format('ANOTHER_MODEL')} --output NEW",
        )
        yield Step(
            "Or give pairs that are known to be right: as a query, or marked in a column.",
            f"{again.format(model)} --query RIGHT_PAIRS --output NEW",
        )
        yield Step(
            f"Or judge {VERDICTS} pairs by hand. It takes a few minutes, and gives a noise rate "
            "with its interval.",
            sample,
        )
        return
    yield Step("Look through the flagged pairs and decide, in the browser.", "hf-ecif demo OUT")
    if not summary.calibration:
        yield Step(f"Judge {VERDICTS} pairs, and know how many flags are right.", sample)
    if idle := [kind for kind, rows in summary.findings.items() if rows and kind in REMOVABLE]:
        yield Step(
            "Leave out rows with a finding, too.",
            f"hf-ecif clean OUT --findings {','.join(idle)} --output CLEAN",
        )
    if summary.removed:
        yield Step(
            f"Keep {number(summary.kept)} rows, leave {number(summary.removed)} out, and see on "
            "held-out pairs whether that helps.",
            "hf-ecif clean OUT --output CLEAN --test HELD_OUT",
        )


def after_trace(summary: TraceSummary) -> Iterator[Step]:
    """Steps after a trace."""
    if summary.errors.traced:
        yield Step(
            "See whether the pairs behind the errors are wrong, or only unlike the query.",
            f"hf-ecif audit {_sources(summary)} --output AUDIT",
        )
        yield Step(
            "Mark those that should leave in a boolean column, and get the model without them.",
            f"hf-ecif remove {_sources(summary)} --where COLUMN --retrain --output EDITED",
        )
    else:
        yield Step(
            "Trace errors of another kind.",
            f"hf-ecif trace {_sources(summary)} --errors retrieval-image --output NEW",
        )


def after_value(summary: ValueSummary) -> Iterator[Step]:
    """Steps after a valuation."""
    if summary.curves is None:
        yield Step(
            "Check the ranking on held-out pairs before you act on it.",
            f"hf-ecif value {_sources(summary)} --curves --test HELD_OUT --output NEW",
        )
    yield Step(
        "See which of the harmful pairs are wrong, and which are only unlike the query.",
        f"hf-ecif audit {_sources(summary)} --output AUDIT",
    )
    if summary.candidates:
        yield Step("Add the candidates with the lowest ecif_added in candidates.parquet.")
    else:
        yield Step(
            "Rank pairs that you could add.",
            f"hf-ecif value {_sources(summary)} --candidates NEW_PAIRS --output NEW",
        )


def after_removal(summary: RemovalSummary) -> Iterator[Step]:
    """Steps after a removal."""
    if "retrained" not in summary.measures["query"]:
        yield Step(
            "Compare with a retraining without these rows.",
            f"hf-ecif remove {_sources(summary)} --where {summary.where} --retrain --output NEW",
        )
    if summary.test is None:
        yield Step(
            "Measure on held-out pairs, too.",
            f"hf-ecif remove {_sources(summary)} --where {summary.where} --test HELD_OUT "
            "--output NEW",
        )
    yield Step(
        "Publish the model, after a dry run.", "hf-ecif push OUT OWNER/NAME --private --dry-run"
    )


def after_validation(summary: ValidationSummary) -> Iterator[Step]:
    """Steps after a validation, which depend on how far it can be relied on."""
    subsets, repeats = 2 * len(summary.actual), 2 * summary.repeats
    if summary.low > 0:
        yield Step(
            "Use the scores: rank the pairs by what they do to the query.",
            f"hf-ecif value {_sources(summary)} --output VALUE",
        )
    else:
        yield Step(
            "Score by the steps of the fit, which predicts short trainings better.",
            f"hf-ecif validate {_sources(summary)} --response unrolled --output NEW",
        )
    yield Step(
        "Narrow the interval: more subsets, and more retrainings of each.",
        f"hf-ecif validate {_sources(summary)} --subsets {subsets} --repeats {repeats} "
        "--output NEW",
    )


def after_cleaning(cleaning: CleaningFacts, compared: ComparisonFacts) -> Iterator[Step]:
    """Steps after a cleaning that was tested."""
    gain, error = compared.gain(cleaning.strategy, BEFORE)
    if error is None or abs(gain) <= 2 * error:
        yield Step(
            "Fine-tune more often to narrow the errors.",
            "hf-ecif clean AUDIT --test HELD_OUT --repeats 10 --dry-run",
        )
    yield Step(
        "Compare the strategies.",
        "hf-ecif clean AUDIT --test HELD_OUT --strategy drop --strategy weight --strategy relabel "
        "--dry-run",
    )
    yield Step(
        "Publish what is kept, and what is removed beside it, after a dry run.",
        "hf-ecif push OUT OWNER/NAME --private --dry-run",
    )


def _sources(summary: Provenance) -> str:
    """Model, data and query, as options; those that cannot be named are for the reader to fill."""
    query = summary.query.dataset
    told = f"--model {public_name(summary.model)} --dataset {public_name(summary.dataset)}"
    return f"{told} --query {public_name(query)}" if query else told
