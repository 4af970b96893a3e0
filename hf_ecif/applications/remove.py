"""Remove rows from a model: from sources to files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from torch import Tensor

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import RemoveRequest
from hf_ecif.applications.sources import Opened, open_beside, open_sources
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.schema import read_flags
from hf_ecif.data.summary import RemovalFacts, RemovalSummary, Solve
from hf_ecif.errors import UserError
from hf_ecif.influence.leverage import memorised
from hf_ecif.influence.removal import RemovalReport
from hf_ecif.influence.retraining import measure
from hf_ecif.influence.rows import Rows, require_pairs
from hf_ecif.influence.saving import save_model
from hf_ecif.reports.outcomes import write_removal_page
from hf_ecif.utils import distributed
from hf_ecif.utils.formatting import nats
from hf_ecif.utils.progress import ProgressFactory, silent

LEAST_CHANGE = 0.01  # nats of the query's loss that are worth a word
APART = 0.8  # of the larger change; short fits are predicted a third as large as they are


def run_remove(
    request: RemoveRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> RemovalSummary:
    """Save a model without the influence of some rows, ``removal.json`` and ``removal.html``.

    Returns:
        What ``removal.json`` holds: the predicted change of the query's loss, how the removal
        went, and under ``measures`` the query and the test set, before, after and, if asked for,
        after a retraining without the rows.

    Raises:
        UserError: something in the request cannot be.
    """
    if request.retrain and config.fit_epochs == 0:
        raise UserError("`fit_epochs=0` trains nothing, so there is no `retrain`.")
    distributed.decide(lambda: require_free(request.output))
    opened = open_sources(request, config)
    model = opened.model
    wanted = read_flags(opened.dataset, request.where, "where", "is to be removed")
    test_set = open_beside(opened, "test", request.test, request.test_split, "test")
    rows, query = opened.read(progress)
    judges = {"query": query}
    if test_set is not None:
        judges["test"] = require_pairs("`test`", model.read(test_set.rows, *opened.sources.columns))
    members = rows.chosen(wanted)
    influence = model.fit(rows, query, progress)
    predicted = influence.score_group(members).task.item()
    start = time.perf_counter()
    training, advance = influence.training, progress("Remove", request.steps)
    theta, report = training.remove(members, request.steps, advance)
    seconds = {"remove": time.perf_counter() - start}
    states = {"before": influence.theta, "after": theta}
    if request.retrain:
        start = time.perf_counter()
        states["retrained"] = influence.refit(members)
        seconds["retrain"] = time.perf_counter() - start
    measures = {name: _measure(opened, states, judge) for name, judge in judges.items()}
    leverage = influence.sample_leverage()

    def write() -> RemovalSummary:
        notes = [*_warnings(leverage, measures["query"], predicted), *opened.warnings(rows, query)]
        summary = RemovalSummary(
            **opened.provenance(rows, query),
            where=request.where,
            test=test_set.told if test_set else None,
            predicted_change=predicted,
            measures=measures,
            removal=_describe(report),
            seconds=seconds,
            warnings=notes,
        )
        save_model(model.edited(theta), model.processor, request.output)
        summary.save(request.output / "removal.json")
        removed = opened.dataset.select(np.flatnonzero(wanted))
        write_removal_page(summary, removed, request.output / "removal.html")
        return summary

    return distributed.decide(write)


def _measure(opened: Opened, states: dict[str, Tensor], judge: Rows) -> dict[str, dict[str, float]]:
    return {name: measure(opened.model, theta, judge) for name, theta in states.items()}


def _describe(report: RemovalReport) -> RemovalFacts:
    solves = [
        Solve(purpose=f"step {step}", **asdict(solve))
        for step, solve in enumerate(report.solvers, 1)
    ]
    return RemovalFacts(**asdict(report) | {"solvers": solves})


def _warnings(
    leverage: Tensor | None, query: dict[str, dict[str, float]], predicted: float
) -> Iterator[str]:
    warning = None if leverage is None else memorised(leverage)
    yield from filter(None, (warning, _against_the_scores(query, predicted)))


def _against_the_scores(query: dict[str, dict[str, float]], predicted: float) -> str | None:
    """Whether the edit did something else than the scores predicted, to an extent that matters."""
    change = query["after"]["loss"] - query["before"]["loss"]
    largest = max(abs(change), abs(predicted))
    if largest < LEAST_CHANGE or abs(change - predicted) < APART * largest:
        return None
    return (
        f"The query's loss changed by {nats(change, signed=True)} nats, where the scores predicted "
        f"{nats(predicted, signed=True)}. One of the two is wrong: compare with `retrain` before "
        "you use the edited model."
    )
