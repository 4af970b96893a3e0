"""Why did it get these wrong? Mispredictions to the training pairs behind them, to files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.sources import Opened, Sources, describe_solves, open_sources
from hf_ecif.applications.tracing import Errors, Task, Traces, describe_errors, find_errors, trace
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.summary import (
    Cause,
    ErrorCounts,
    Often,
    TracedError,
    TraceFacts,
    TraceSummary,
)
from hf_ecif.errors import UserError
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.rows import Rows
from hf_ecif.reports.trace import write_trace_page, write_traces
from hf_ecif.utils import distributed
from hf_ecif.utils.progress import ProgressFactory, silent

TASKS: dict[str, Task] = {
    "retrieval-text": "text_to_image",
    "retrieval-image": "image_to_text",
    "zero-shot": "zero_shot",
}


SHOWN_OFTEN = 12


@dataclass(frozen=True, kw_only=True)
class TraceRequest(Sources):
    """What to trace; the fields are the options of ``hf-ecif trace``."""

    output: Path
    errors: str = "retrieval-text"
    rows: list[int] | None = None
    top_k: int = 10
    most: int = 100
    candidates: int = 0


@dataclass(frozen=True)
class Found:
    """Errors of a query, traced.

    Attributes:
        kind: of the errors, a key of `TASKS`.
        errors: those that are traced, the worst first.
        traces: the pairs behind each.
        wrong: how many there are in all; None where they were given.
    """

    kind: str
    errors: Errors
    traces: Traces
    wrong: int | None


def run_trace(
    request: TraceRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> TraceSummary:
    """Trace errors of the query; writes ``trace.parquet``, ``summary.json`` and ``trace.html``.

    Returns:
        What ``summary.json`` holds.

    Raises:
        UserError: something in the request cannot be.
    """
    start = time.perf_counter()
    _check(request)
    distributed.decide(lambda: require_free(request.output))
    opened = open_sources(request, config)
    rows, query = opened.read(progress)
    chosen = _find_rows(request.rows, query) if request.rows else None
    influence = opened.model.fit(rows, query, progress)
    found = find_and_trace(
        influence,
        query,
        kind=request.errors,
        chosen=chosen,
        most=request.most,
        top_k=request.top_k,
        candidates=request.candidates,
        progress=progress,
    )

    def write() -> TraceSummary:
        seconds = round(time.perf_counter() - start, 2)
        summary = _summarise(request, opened, influence, query, found).replace(seconds=seconds)
        errors = list(describe_errors_and_causes(found, rows, query))
        write_traces(errors, request.output / "trace.parquet")
        write_trace_page(
            errors, summary, opened.dataset, opened.query_rows, request.output / "trace.html"
        )
        # Written last: a folder with a summary is a finished run.
        summary.save(request.output / "summary.json")
        return summary

    return distributed.decide(write)


def find_and_trace(
    influence: Influence,
    query: Rows,
    *,
    kind: str,
    most: int,
    chosen: Tensor | None = None,
    top_k: int = 10,
    candidates: int = 0,
    progress: ProgressFactory = silent,
) -> Found:
    """The worst errors of a query, or chosen rows of it, with the pairs behind them.

    Args:
        influence: with its training rows.
        query: where the errors are looked for.
        kind: a key of `TASKS`.
        most: errors at most.
        chosen: numbers of rows of the query, right or wrong, in place of its errors.
        top_k: pairs for each.
        candidates: as in `trace`.
        progress: makes a progress bar.
    """
    task = TASKS[kind]
    if chosen is None:
        all_errors = find_errors(influence, query, task)
        wrong, errors = len(all_errors.rows), all_errors.worst(most)
    else:
        wrong, errors = None, describe_errors(influence, query, chosen, task)
    traces = trace(
        influence,
        query,
        errors.rows,
        direction=task,
        top_k=top_k,
        candidates=candidates,
        progress=progress,
    )
    return Found(kind, errors, traces, wrong)


def _check(request: TraceRequest) -> None:
    if request.errors not in TASKS:
        raise UserError(f"--errors {request.errors!r}: must be one of {', '.join(TASKS)}.")
    if 0 < request.candidates < request.top_k:
        raise UserError(
            f"--candidates {request.candidates}: fewer than the --top-k {request.top_k} that are "
            "chosen among them."
        )
    for name in ("top_k", "most"):
        if getattr(request, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")


def _find_rows(wanted: list[int], query: Rows) -> Tensor:
    """Numbers of the readable rows that have these row numbers.

    Raises:
        UserError: one of them is not there, or cannot be read.
    """
    places = {position: number for number, position in enumerate(query.positions.tolist())}
    for row in wanted:
        if row not in places:
            why = query.reasons.get(row, f"the query has rows 0 to {query.total - 1}")
            raise UserError(f"--rows {row}: {why}.")
    return torch.tensor([places[row] for row in dict.fromkeys(wanted)])


def describe_errors_and_causes(found: Found, rows: Rows, query: Rows) -> Iterator[TracedError]:
    """Every error with its causes."""
    errors, traces = found.errors, found.traces
    columns = {name: value.tolist() for name, value in vars(traces).items()}
    negative = traces.is_negative.tolist()
    for number, (row, other, margin) in enumerate(
        zip(errors.rows.tolist(), errors.retrieved.tolist(), errors.margin.tolist(), strict=True)
    ):
        causes = []
        for rank in range(traces.pairs.shape[1]):
            here = {name: values[number][rank] for name, values in columns.items()}
            pair, partner = here.pop("pairs"), here.pop("partner")
            met = partner >= 0
            cause = Cause(
                **here,
                rank=rank,
                cause_row=int(rows.positions[pair]),
                cause_text=rows.texts[pair],
                role="negative" if negative[number][rank] else "positive",
                partner_row=int(rows.positions[partner]) if met else None,
                partner_text=rows.texts[partner] if met else None,
            )
            causes.append(cause)
        yield TracedError(
            error_row=int(query.positions[row]),
            error_text=query.texts[row],
            predicted_row=int(query.positions[other]),
            predicted_text=query.texts[other],
            margin=margin,
            causes=causes,
        )


def _summarise(
    request: TraceRequest, opened: Opened, influence: Influence, query: Rows, found: Found
) -> TraceSummary:
    """What was traced, without the time."""
    rows = influence.rows
    return TraceSummary(
        **opened.provenance(rows, query),
        **dict(describe_found(found, rows, query)),
        candidates=request.candidates or None,
        solvers=describe_solves(influence.fitted),
        warnings=[*_warnings(found), *opened.warnings(rows, query)],
    )


def describe_found(found: Found, rows: Rows, query: Rows) -> TraceFacts:
    """What was asked and found, in counts, with the pairs that are behind several errors."""
    traces = found.traces
    guilty = traces.pairs[traces.score + 2 * traces.stderr < 0]
    often = Counter(guilty.tolist()).most_common(SHOWN_OFTEN)
    return TraceFacts(
        errors=ErrorCounts(
            kind=found.kind, wrong=found.wrong, traced=len(found.errors.rows), of=len(query)
        ),
        top_k=traces.pairs.shape[1],
        as_negatives=traces.is_negative.float().mean().item() if len(traces.pairs) else None,
        often=[
            Often(row=int(rows.positions[pair]), text=rows.texts[pair], errors=count)
            for pair, count in often
            if count > 1
        ],
    )


def _warnings(found: Found) -> Iterator[str]:
    if found.wrong == 0:
        yield "There is no error of this kind. Try another --errors, or give rows with --rows."
    traces = found.traces
    if len(traces.pairs) and (traces.score + 2 * traces.stderr >= 0).float().mean() > 0.5:
        yield (
            "Most of the scores are within two standard errors of zero: these errors have no few "
            "pairs behind them, or more --partitions are needed to see them."
        )
