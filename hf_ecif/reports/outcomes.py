"""Pages of a removal, a validation and a cleaning: the question, figures and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hf_ecif.data.cleaning import BEFORE, UNTRAINED
from hf_ecif.data.summary import (
    CleaningFacts,
    ComparisonFacts,
    OutcomeFacts,
    Provenance,
    RemovalSummary,
    ValidationSummary,
)
from hf_ecif.reports.figures import bars_figure, validation_scatter
from hf_ecif.reports.html import about, inline_svg, write_page
from hf_ecif.utils.formatting import estimate, models_of_removal, number, percent, reach, share

ACCURACY = "zero_shot_accuracy"
MEASURES = {
    "loss": "Loss, nats",
    "text_to_image_recall@1": "R@1, text to image",
    "image_to_text_recall@1": "R@1, image to text",
    ACCURACY: "Zero-shot accuracy",
}


@dataclass(frozen=True)
class _Table:
    """Cells as shown; the first cell of a row is its name."""

    title: str
    heading: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class _Plot:
    title: str
    words: str
    drawing: Markup


def write_removal_page(summary: RemovalSummary, path: Path) -> None:
    """Write a page on the query and the test set before and after a removal.

    Args:
        summary: summary from `hf_ecif.applications.remove.run_remove`.
        path: file of the page.
    """
    query = summary.measures["query"]
    change = query["after"]["loss"] - query["before"]["loss"]
    retrained = query.get("retrained")
    removed, seconds = summary.removal.removed, summary.seconds
    names = models_of_removal(summary.config)
    spent = f"nats, in {number(seconds['remove'])} s"
    tiles = [
        ("Removed", number(removed), f"of {number(summary.scored)} readable rows"),
        ("Change of the query's loss", _signed(change), spent),
        ("Predicted", _signed(summary.predicted_change), "nats, by the scores alone"),
    ]
    if retrained:
        true = retrained["loss"] - query["before"]["loss"]
        tiles.append(("By retraining", _signed(true), f"nats, in {number(seconds['retrain'])} s"))
    write_page(
        path,
        "outcome.html.j2",
        about=about(summary),
        warnings=summary.warnings,
        run=summary,
        facts=_facts(summary)
        | {"rows removed by": summary.where}
        | ({"test": summary.test} if summary.test else {}),
        command="remove",
        verdict=f"Without {number(removed)} {'row' if removed == 1 else 'rows'}, the query's loss "
        f"{'falls' if change < 0 else 'rises'} by {number(abs(change))} nats.",
        tiles=tiles,
        explanation="The model was changed in closed form, as if it had been fitted without these "
        "rows. All models below are measured in the same way; recalls and accuracy: higher is "
        "better.",
        tables=list(_measures(summary.measures, names)),
        plots=[
            _Plot(
                f"Loss on the {judge}",
                "In nats; lower is better.",
                inline_svg(
                    bars_figure(
                        {names[name]: state["loss"] for name, state in states.items()},
                        labels=[_cell("loss", state["loss"]) for state in states.values()],
                    ),
                    f"loss-{judge}",
                ),
            )
            for judge, states in summary.measures.items()
        ],
        solvers=summary.removal.solvers,
        limits=[
            "A retraining with another order of the batches would come out somewhat different, "
            "too; `retrain` shows one.",
            "The attributed parameters alone are edited. What the rest of the model learnt of the "
            "rows, if it ever saw them, stays.",
        ],
    )


def write_validation_page(summary: ValidationSummary, path: Path) -> None:
    """Write a page on predicted changes beside those of true retrainings.

    Args:
        summary: content of ``validation.json``.
        path: file of the page.
    """
    predicted, actual = map(np.array, (summary.predicted, summary.actual))
    interval = f"{summary.low:.2f} to {summary.high:.2f}".replace("-", "−")
    interval += reach(summary.ceiling)
    verdict, _, advice = summary.verdict.rstrip(".").partition(": ")
    advice = f" What follows: {advice}." if advice else ""
    gone, repeats = percent(summary.removed_share), summary.repeats
    times = "" if repeats == 1 else f", retrained {repeats} times"
    figure = validation_scatter(predicted, actual, "")
    write_page(
        path,
        "outcome.html.j2",
        about=about(summary),
        warnings=summary.warnings,
        run=summary,
        facts=_facts(summary),
        command="validate",
        verdict=f"{verdict}.",
        tiles=[
            ("Rank correlation", f"{summary.spearman:.2f}", f"95 % interval {interval}"),
            ("Order right", percent(summary.sign_agreement), "of the pairs of subsets"),
            ("Slope", f"{summary.slope:.2f}", "of true on predicted; 1 if the size is right"),
            ("Subsets", number(len(actual)), f"each without {gone} of the rows{times}"),
        ],
        explanation="Random parts of the rows were left out, the attributed parameters trained "
        "again from the start, and the query's true loss compared with the sum of the scores of "
        f"the rows that were left out.{advice}",
        tables=[],
        plots=[
            _Plot(
                "True on predicted change of the query",
                "A point for each subset, in nats. The line is the best fit: what counts is how "
                "closely the points follow it; the steeper, the more the scores understate. Where "
                "it misses the origin, all retrainings moved alike: with fewer rows, they are "
                "shorter.",
                inline_svg(figure, "validation"),
            )
        ],
        solvers=[],
        limits=[
            "Many rows leave at once. The effect of a single row is too small to be told from that "
            "of another order of the batches.",
            "Retrainings on the same rows differ by the order of their batches, which holds every "
            "correlation down: more repeats raise what can be reached.",
            "It holds for this query, these settings and trainings as short as this one.",
        ],
    )


def write_cleaning_page(cleaning: CleaningFacts, compared: ComparisonFacts, path: Path) -> None:
    """Write a page on models fine-tuned on the rows before and after a cleaning.

    Args:
        cleaning: number of rows by outcome.
        compared: results of the models before and after.
        path: file of the page.
    """
    accuracy = {one.version: one.measures[ACCURACY] for one in compared.outcomes}
    gain, error = accuracy[cleaning.strategy].gain(accuracy[BEFORE])
    untrained = accuracy[UNTRAINED].mean
    accuracies = {_version(name): measured for name, measured in accuracy.items()}
    write_page(
        path,
        "outcome.html.j2",
        about={"Audit": cleaning.audit},
        warnings=compared.warnings,
        run=None,
        command="clean",
        verdict=_cleaning_verdict(gain, error, compared.test_rows),
        tiles=[_counted(name, count) for name, count in cleaning.counts.items()],
        explanation=f"The audited model was fine-tuned on each version of the rows, with as many "
        f"steps for each, and then retrieved and classified {number(compared.test_rows)} rows "
        f"of {compared.test}. Not fine-tuned at all, it has {share(untrained)} of zero-shot "
        "accuracy. Higher is better, except for the loss; errors are standard errors over the "
        "fine-tunings, in the headline of the choice of the test rows, too.",
        tables=[
            _Table(
                "Recalls and accuracy in per cent",
                ["Fine-tuned on", *MEASURES.values()],
                [
                    [_version(one.version), *(_estimated(name, one) for name in MEASURES)]
                    for one in compared.outcomes
                ],
            )
        ],
        plots=[
            _Plot(
                "Zero-shot accuracy",
                "Bars in per cent; whiskers are standard errors.",
                inline_svg(
                    bars_figure(
                        {name: 100 * one.mean for name, one in accuracies.items()},
                        [100 * (one.stderr or 0.0) for one in accuracies.values()],
                        [f"{100 * one.mean:.1f}" for one in accuracies.values()],
                    ),
                    "accuracy",
                ),
            )
        ],
        solvers=[],
        limits=[
            "The random version has as many rows: what it loses is the price of fewer rows, what "
            "cleaning gains beyond it is due to which rows went.",
            "Another test set would differ by more than the errors say, which are over the order "
            "of the batches alone.",
        ],
    )


def _facts(summary: Provenance) -> dict[str, str]:
    query = summary.query
    return {"source": query.source, "pairs": number(query.rows), "seed": str(summary.seed)}


def _measures(measures: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[_Table]:
    for judge, states in measures.items():
        rows = [
            [names[name], *(_cell(measure, state[measure]) for measure in MEASURES)]
            for name, state in states.items()
        ]
        yield _Table(f"On the {judge}", ["Model", *MEASURES.values()], rows)


def _cell(measure: str, value: float) -> str:
    return f"{value:.4f}" if measure == "loss" else share(value)


def _version(name: str) -> str:
    """Name of the rows on which a model was fine-tuned."""
    if name == UNTRAINED:
        return "nothing (as given)"
    if name.startswith("random"):
        return name.replace("random", "random rows", 1)
    return name if name.startswith("all") else f"what {name} leaves"


def _counted(name: str, count: int) -> tuple[str, str, str]:
    """Tile for a count of rows, such as ``removed``, or ``removed_flagged`` among them."""
    whole, _, part = name.partition("_")
    title = (part or whole).replace("_", " ").capitalize()
    return title, number(count), f"of the {whole} rows" if part else "rows"


def _estimated(measure: str, outcome: OutcomeFacts) -> str:
    """A mean with its error; shares in percent."""
    mean, error = outcome.measures[measure].mean, outcome.measures[measure].stderr
    if measure == "loss":
        return f"{mean:.3f}" + (f" ± {error:.3f}" if error else "")
    return estimate(mean, float("nan") if error is None else error, exponent=-2)


def _cleaning_verdict(gain: float, error: float | None, test_rows: int) -> str:
    """Verdict on a gain, clear if neither batch order nor the choice of test rows explains it.

    For a gain ``g``, at least a share ``g`` of the test rows changed from wrong to right, so the
    choice of test rows alone gives it a variance of at least ``g (1 - g) / n``.
    """
    sampling = abs(gain) * (1 - abs(gain)) / test_rows
    # The error of a single fine-tuning is unknown, so no verdict is clear.
    whole_error = nan if error is None else (error**2 + sampling) ** 0.5
    points = f"{estimate(abs(gain), whole_error, exponent=-2)} points of zero-shot accuracy"
    side = f"{points} {'above' if gain > 0 else 'below'} one fine-tuned on all rows"
    if not abs(gain) > 2 * whole_error:
        return f"No clear difference: a model fine-tuned on the cleaned rows is {side}."
    return f"Fine-tuned on the cleaned rows, the model is {side}."


def _signed(value: float) -> str:
    return ("−" if value < 0 else "+") + number(abs(value))
