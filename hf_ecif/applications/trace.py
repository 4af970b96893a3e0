"""Trace of mispredictions to the training pairs behind them, from sources to files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from hf_ecif.applications import tracing
from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import TraceRequest
from hf_ecif.applications.sources import Opened, describe_solves, open_sources
from hf_ecif.applications.tracing import (
    Errors,
    Task,
    Traces,
    describe_errors,
    find_errors,
    queries_of,
)
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
from hf_ecif.influence.loaded import AnyRows
from hf_ecif.influence.rows import Rows
from hf_ecif.reports.trace import tabulate, write_trace_page, write_traces
from hf_ecif.utils import distributed
from hf_ecif.utils.progress import ProgressFactory, silent, tqdm_bars

TASKS: dict[str, Task] = {
    "retrieval-text": "text_to_image",
    "retrieval-image": "image_to_text",
    "zero-shot": "zero_shot",
}


SHOWN_OFTEN = 12


@dataclass(frozen=True)
class Found:
    """Errors of a query, traced.

    Attributes:
        kind: kind of the errors, a key of `TASKS`.
        errors: the traced errors, the worst first.
        traces: the pairs behind each error.
        wrong: number of all errors; None if rows were given.
    """

    kind: str
    errors: Errors
    traces: Traces
    wrong: int | None


def trace(
    influence: Influence,
    query: AnyRows,
    *,
    errors: str = "retrieval-text",
    rows: Sequence[int] | None = None,
    top_k: int = 10,
    most: int = 100,
    candidates: int = 0,
    progress: ProgressFactory = tqdm_bars,
) -> Dataset:
    """Training pairs behind a model's errors.

    Args:
        influence: influence, with its training rows.
        query: pairs among which errors are found.
        errors: ``retrieval-text`` for captions that retrieve the wrong image, ``retrieval-image``
            for images that retrieve the wrong caption, or ``zero-shot`` for images with the wrong
            class, where the captions are the classes.
        rows: numbers of rows to trace instead of the errors, right or wrong.
        top_k: number of pairs for each error.
        most: largest number of errors, the worst first.
        candidates: number of pairs that an index proposes for each error, which are then scored
            exactly; 0 scores all pairs.
        progress: makes progress bars.

    Returns:
        A row for each error and each pair behind it, with the most responsible pair of the worst
        error first: the prediction and the right answer, the margin in nats, and for the pair its
        row number, score (negative: the error would be smaller without its contribution), both
        parts of the score, and its main role.

    Raises:
        UserError: the kind of errors or a row does not exist.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> causes = hf_ecif.trace(model.fit(pairs, demo.query), demo.query, most=2, top_k=3)
        >>> causes.num_rows
        6
    """
    _check(errors, top_k, most, candidates)
    asked = influence.model.rows(query)
    found = find_and_trace(
        influence,
        asked,
        kind=errors,
        chosen=_find_rows(rows, asked) if rows else None,
        most=most,
        top_k=top_k,
        candidates=candidates,
        progress=progress,
    )
    return tabulate(list(describe_errors_and_causes(found, influence.rows, asked)))


def run_trace(
    request: TraceRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> TraceSummary:
    """Trace errors of the query; write ``trace.parquet``, ``summary.json`` and ``trace.html``.

    Returns:
        Content of ``summary.json``.

    Raises:
        UserError: the request cannot be carried out.
    """
    start = time.perf_counter()
    _check(request.errors, request.top_k, request.most, request.candidates)
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
    """Worst errors of a query, or given rows of it, with the pairs behind them.

    Args:
        influence: influence, with its training rows.
        query: pairs among which errors are found.
        kind: a key of `TASKS`.
        most: largest number of errors.
        chosen: numbers of rows of the query to trace instead of its errors, right or wrong.
        top_k: number of pairs for each error.
        candidates: see `trace`.
        progress: makes a progress bar.
    """
    task = TASKS[kind]
    if chosen is None:
        all_errors = find_errors(influence, query, task)
        wrong, errors = len(all_errors.rows), all_errors.worst(most)
    else:
        wrong, errors = None, describe_errors(influence, query, chosen, task)
    traces = tracing.trace(
        influence,
        query,
        errors.rows,
        direction=task,
        top_k=top_k,
        candidates=candidates,
        progress=progress,
    )
    return Found(kind, errors, traces, wrong)


def _check(errors: str, top_k: int, most: int, candidates: int) -> None:
    if errors not in TASKS:
        raise UserError(f"`errors={errors!r}`: must be one of {', '.join(TASKS)}.")
    if 0 < candidates < top_k:
        raise UserError(
            f"`candidates={candidates}`: fewer than the `top_k={top_k}` that are chosen among them."
        )
    for name, value in (("top_k", top_k), ("most", most)):
        if value < 1:
            raise UserError(f"`{name}={value}`: must be at least 1.")


def _find_rows(wanted: Sequence[int], query: Rows) -> Tensor:
    """Places among the readable rows of the given row numbers.

    Raises:
        UserError: a row does not exist, or cannot be read.
    """
    places = {position: number for number, position in enumerate(query.positions.tolist())}
    for row in wanted:
        if row not in places:
            why = query.reasons.get(row, f"the query has rows 0 to {query.total - 1}")
            raise UserError(f"`rows={row}`: {why}.")
    return torch.tensor([places[row] for row in dict.fromkeys(wanted)])


def describe_errors_and_causes(found: Found, rows: Rows, query: Rows) -> Iterator[TracedError]:
    """Errors with their causes, one by one."""
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
    """Summary of the trace, without times."""
    rows = influence.rows
    return TraceSummary(
        **opened.provenance(rows, query),
        **dict(describe_found(found, rows, query)),
        candidates=request.candidates or None,
        solvers=describe_solves(influence.fitted),
        warnings=[*_warnings(found), *opened.warnings(rows, query)],
    )


def describe_found(found: Found, rows: Rows, query: Rows) -> TraceFacts:
    """Counts of the trace, with the pairs that are behind several errors."""
    traces = found.traces
    guilty = traces.pairs[traces.score + 2 * traces.stderr < 0]
    often = Counter(guilty.tolist()).most_common(SHOWN_OFTEN)
    return TraceFacts(
        errors=ErrorCounts(
            kind=found.kind,
            wrong=found.wrong,
            traced=len(found.errors.rows),
            of=len(queries_of(query, TASKS[found.kind])),
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
        yield "There is no error of this kind. Try another `errors`, or give rows with `rows`."
    traces = found.traces
    if len(traces.pairs) and (traces.score + 2 * traces.stderr >= 0).float().mean() > 0.5:
        yield (
            "Most of the scores are within two standard errors of zero: these errors have no few "
            "pairs behind them, or more `partitions` are needed to see them."
        )
