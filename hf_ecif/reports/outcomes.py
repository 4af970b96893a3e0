"""Pages of a removal, a validation and a cleaning: the question, figures and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from markupsafe import Markup

from hf_ecif.data.cleaning import UNTRAINED
from hf_ecif.data.scored_rows import show_row
from hf_ecif.data.summary import (
    CleaningFacts,
    Columns,
    ComparisonFacts,
    Provenance,
    RemovalSummary,
    ValidationSummary,
)
from hf_ecif.reports.figures import bars_figure, validation_scatter
from hf_ecif.reports.html import Strip, about, inline_svg, public, write_page
from hf_ecif.reports.measures import LOSS, NAMES, judge_cleaning, tell_mean, tell_value
from hf_ecif.reports.steps import after_cleaning, after_removal, after_validation
from hf_ecif.utils.formatting import models_of_removal, nats, number, reach, share
from hf_ecif.utils.hub_paths import hide_folders

PICTURES = 8


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


def write_removal_page(summary: RemovalSummary, removed: Dataset, path: Path) -> None:
    """Write a page on the query and the test set before and after a removal.

    Args:
        summary: summary from `hf_ecif.applications.remove.run_remove`.
        removed: the removed rows, images undecoded.
        path: file of the page.
    """
    query = summary.measures["query"]
    change = query["after"]["loss"] - query["before"]["loss"]
    retrained = query.get("retrained")
    count, seconds = summary.removal.removed, summary.seconds
    names = models_of_removal(summary.config)
    spent = f"nats, in {number(seconds['remove'])} s"
    tiles = [
        ("Removed", number(count), f"of {number(summary.scored)} readable rows"),
        ("Change of the query's loss", nats(change, signed=True), spent),
        ("Predicted", nats(summary.predicted_change, signed=True), "nats, by the scores alone"),
    ]
    if retrained:
        true = retrained["loss"] - query["before"]["loss"]
        tiles.append(
            ("By retraining", nats(true, signed=True), f"nats, in {number(seconds['retrain'])} s")
        )
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
        verdict=f"Without {number(count)} {'row' if count == 1 else 'rows'}, the query's loss "
        f"{'falls' if change < 0 else 'rises'} by {nats(abs(change))} nats.",
        tiles=tiles,
        strip=_strip("Removed from the model", removed, summary.columns),
        steps=list(after_removal(summary)),
        explanation="The model was changed in closed form, as if it had been fitted without these "
        "rows. All models below are measured in the same way. R@1 is the share of captions that "
        "retrieve the right image first, and the other way round: higher is better.",
        tables=list(_measures(summary.measures, names)),
        plots=[
            _Plot(
                f"Loss on the {judge}",
                "In nats; lower is better.",
                inline_svg(
                    bars_figure(
                        {names[name]: state[LOSS] for name, state in states.items()},
                        labels=[nats(state[LOSS]) for state in states.values()],
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
    removed, repeats = share(summary.removed_share), summary.repeats
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
            ("Rank correlation", number(summary.spearman, 2), f"95 % interval {interval}"),
            ("Order right", share(summary.sign_agreement), "of the pairs of subsets"),
            ("Sign right", *_signs(summary)),
            ("Slope", number(summary.slope, 2), "of true on predicted; 1 if the size is right"),
            ("Subsets", number(len(actual)), f"each without {removed} of the rows{times}"),
        ],
        strip=None,
        steps=list(after_validation(summary)),
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


def write_cleaning_page(
    cleaning: CleaningFacts,
    compared: ComparisonFacts,
    removed: Dataset,
    columns: Columns,
    path: Path,
) -> None:
    """Write a page on models fine-tuned on the rows before and after a cleaning.

    Args:
        cleaning: number of rows by outcome.
        compared: results of the models before and after.
        removed: the removed rows, images undecoded.
        columns: names of the columns of a pair.
        path: file of the page.
    """
    measures = [name for name in NAMES if name in compared.outcomes[0].measures]
    decisive = {_version(one.version): one.measures[compared.measure] for one in compared.outcomes}
    write_page(
        path,
        "outcome.html.j2",
        about={"Audit": public(cleaning.audit)},
        warnings=compared.warnings,
        run=None,
        command="clean",
        verdict=judge_cleaning(compared, cleaning.strategy),
        tiles=[_counted(name, count) for name, count in cleaning.counts.items()],
        strip=_strip("Removed", removed, columns),
        steps=list(after_cleaning(cleaning, compared)),
        explanation=f"The audited model was fine-tuned on each version of the rows, with as many "
        f"steps for each, and tested on {number(compared.test_rows)} rows of "
        f"{hide_folders(compared.test)}. Higher is better, except for the loss. Errors in the "
        "table are standard errors over the fine-tunings; that in the headline covers the choice "
        "of the test rows, too.",
        tables=[
            _Table(
                "Recalls and accuracy in percent",
                ["Fine-tuned on", *(NAMES[name] for name in measures)],
                [
                    [
                        _version(one.version),
                        *(tell_mean(name, one.measures[name]) for name in measures),
                    ]
                    for one in compared.outcomes
                ],
            )
        ],
        plots=[
            _Plot(
                NAMES[compared.measure],
                "Bars in percent; whiskers are standard errors over the fine-tunings.",
                inline_svg(
                    bars_figure(
                        {name: 100 * one.mean for name, one in decisive.items()},
                        [100 * (one.stderr or 0.0) for one in decisive.values()],
                        [share(one.mean) for one in decisive.values()],
                    ),
                    "accuracy",
                ),
            )
        ],
        solvers=[],
        limits=[
            "The random version has as many rows: what it loses is the price of fewer rows, what "
            "cleaning gains beyond it is due to which rows were removed.",
            "Another test set would differ by more than the errors say, which are over the order "
            "of the batches alone.",
        ],
    )


def _facts(summary: Provenance) -> dict[str, str]:
    query = summary.query
    source = hide_folders(query.source)
    return {"source": source, "pairs": number(query.rows), "seed": str(summary.seed)}


def _measures(measures: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[_Table]:
    for judge, states in measures.items():
        known = [name for name in NAMES if all(name in state for state in states.values())]
        rows = [
            [names[name], *(tell_value(measure, state[measure]) for measure in known)]
            for name, state in states.items()
        ]
        yield _Table(f"On the {judge}", ["Model", *(NAMES[name] for name in known)], rows)


def _signs(summary: ValidationSummary) -> tuple[str, str]:
    """Share of the signs that are predicted correctly; nothing where only one occurs."""
    if summary.signs_right is None:
        side = "rises" if summary.actual[0] > 0 else "falls"
        return "–", f"not known: the loss {side} in all retrainings"
    return share(summary.signs_right), "of the subsets: helped, or hurt"


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


def _strip(title: str, rows: Dataset, columns: Columns) -> Strip | None:
    """A few of some rows, those first that are most probably wrong; None of no rows."""
    if not len(rows):
        return None
    order = list(range(len(rows)))
    if "ecif_noise_probability" in rows.column_names:
        plain = rows.with_format(None)["ecif_noise_probability"][:]
        order.sort(key=lambda row: -(plain[row] or 0.0))
    cards = [show_row(rows[row], columns) for row in order[:PICTURES]]
    return Strip(title, cards, len(rows))
