"""Valuation, from sources to files: which pairs help or hurt which slice, and which to add."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel

from hf_ecif.applications.given import MOST_STREAMED, Rowset, open_given
from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import ValueRequest
from hf_ecif.applications.sources import (
    Named,
    Opened,
    describe_solves,
    open_beside,
    open_sources,
)
from hf_ecif.applications.valuation import (
    WHOLE,
    Additions,
    Curve,
    Valuation,
    find_conflicts,
    removal_curves,
    removal_orders,
    value_additions,
    value_by_slice,
)
from hf_ecif.config import InfluenceConfig, RowFormat
from hf_ecif.data.columns import read_groups, set_column
from hf_ecif.data.parquet import write_rows
from hf_ecif.data.schema import drop_influence_columns
from hf_ecif.data.summary import (
    Candidates,
    ConflictFacts,
    CurveFacts,
    Curves,
    Entry,
    LeverageFacts,
    Rankings,
    Side,
    SliceFacts,
    ValueSummary,
)
from hf_ecif.errors import UserError
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.leverage import memorised
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows, require_pairs
from hf_ecif.influence.scoring import Scores
from hf_ecif.reports.value import write_value_page
from hf_ecif.utils import distributed
from hf_ecif.utils.progress import ProgressFactory, silent, tqdm_bars

TOP, TOP_OF_SLICE = 12, 6  # pairs shown of each ranking
SMALL_SLICE = 20
ADDED = "ecif_added"


@dataclass(frozen=True)
class _Given:
    """Inputs other than the model, the rows and the query."""

    names: list[str | None] | None
    test: Named | None
    candidates: Named | None


@dataclass(frozen=True)
class _Found:
    """Results that are written."""

    request: ValueRequest
    opened: Opened
    rows: Rows
    query: Rows
    valuation: Valuation
    curves: list[Curve]
    given: _Given
    candidates: Rows | None
    additions: Additions | None
    leverage: _Leverage | None


@dataclass(frozen=True)
class _Leverage:
    """Leverages of all rows, and a warning if a sample shows that the fit has memorised them."""

    of_rows: Tensor
    sample_median: float
    warning: str | None


def value(
    model: InfluenceModel | PreTrainedModel | str | Path | None = None,
    dataset: Rowset | None = None,
    query: Rowset | None = None,
    *,
    slice_column: str | None = None,
    split: str | None = None,
    query_split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    config_name: str | None = None,
    query_config: str | None = None,
    query_image_column: str | None = None,
    query_text_column: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    sample: int | None = None,
    format: RowFormat | None = None,
    embeddings: str | Path | None = None,
    embeddings_key: str | None = None,
    logit_scale: float | None = None,
    processor: Any = None,
    config: InfluenceConfig | None = None,
    max_rows: int = MOST_STREAMED,
    progress: ProgressFactory = tqdm_bars,
) -> Dataset:
    """Rows with the effect of each pair on a query, and on slices of it.

    Args:
        model: see `audit`.
        dataset: the pairs to be valued.
        query: pairs of the task that the model is for.
        slice_column: column of the query, such as a language or a category. Pairs are also valued
            for each of its values.
        split: of ``dataset``, where it has several, or a part, ``train[:10%]``; ``train``, or the
            only one, if absent.
        query_split: likewise of ``query``; ``validation``, or the only one, if absent.
        image_column: of images, their bytes or their paths; found by its type if absent.
        text_column: of the captions, of lists of captions or of classes; likewise.
        config_name: configuration of ``dataset``, where it has several.
        query_config: likewise of ``query``.
        query_image_column: that of the data if absent, or found by its type.
        query_text_column: likewise.
        template: sentence around each name of a class, such as ``"a photo of a {}"``.
        limit: how many of the first rows are read.
        sample: how many rows are drawn at random.
        format: what files are, where it is not found by what is there.
        embeddings: see `audit`; likewise ``embeddings_key`` and ``logit_scale``.
        processor: processor of a loaded model, or where that of a named one is.
        config: how influence is computed; by default with the unrolled response, which predicts
            removals best.
        max_rows: largest number of rows to read of a stream.
        progress: makes progress bars.

    Returns:
        The rows with `ecif_score` (predicted change of the query's loss without the pair, in nats;
        negative is harmful), its two parts and its standard error; these columns for every slice,
        with ``:name`` appended; and `ecif_reason` for rows without a score.

    Raises:
        UserError: an argument cannot be used.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> valued = hf_ecif.value(demo.model, pairs, demo.query, slice_column="category")
        >>> "ecif_score" in valued.column_names
        True
    """
    if config is None and not isinstance(model, InfluenceModel):
        config = InfluenceConfig(response="unrolled")
    given = open_given(
        model,
        dataset,
        query,
        split=split,
        query_split=query_split,
        image_column=image_column,
        text_column=text_column,
        config_name=config_name,
        query_config=query_config,
        query_image_column=query_image_column,
        query_text_column=query_text_column,
        template=template,
        limit=limit,
        sample=sample,
        format=format,
        embeddings=embeddings,
        embeddings_key=embeddings_key,
        logit_scale=logit_scale,
        processor=processor,
        config=config,
        max_rows=max_rows,
    )
    names = _read_slices(slice_column, given.opened)
    rows, asked = given.opened.read(progress)
    valuation = value_by_slice(given.opened.model, rows, asked, _of_rows(names, asked), progress)
    valued = drop_influence_columns(given.opened.original)
    columns = _columns("ecif", rows, valuation.scores, _suffixes(valuation))
    for name, values in columns.items():
        valued = set_column(valued, name, values, "float32")
    return set_column(valued, "ecif_reason", _reasons(rows), "string")


def run_value(
    request: ValueRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> ValueSummary:
    """Value all rows; write ``value.parquet``, ``summary.json`` and ``value.html``.

    With candidates, also ``candidates.parquet``.

    Returns:
        Content of ``summary.json``.

    Raises:
        UserError: the request cannot be carried out.
    """
    start = time.perf_counter()
    _check(request, config)
    distributed.decide(lambda: require_free(request.output))
    opened = open_sources(request, config)
    given = _read_given(request, opened)
    found = _analyse(request, opened, given, progress)

    def write() -> ValueSummary:
        _write_rows(found)
        summary = _summarise(found).replace(seconds=round(time.perf_counter() - start, 2))
        page = request.output / "value.html"
        write_value_page(
            summary, opened.dataset, given.candidates.rows if given.candidates else None, page
        )
        # Written last: a folder with a summary is a finished run.
        summary.save(request.output / "summary.json")
        return summary

    return distributed.decide(write)


def _check(request: ValueRequest, config: InfluenceConfig) -> None:
    if request.test and not request.curves:
        raise UserError("`test` is what removal curves are judged by: give `curves`, too.")
    if request.curves and config.fit_epochs == 0:
        raise UserError("`fit_epochs=0` refits nothing, so there are no `curves`.")
    if request.leverage and config.fit_epochs == 0:
        raise UserError("`leverage` is of a fit, and `fit_epochs=0` does none.")


def _read_given(request: ValueRequest, opened: Opened) -> _Given:
    """Inputs, read before anything is computed, so that a typo shows early."""
    return _Given(
        _read_slices(request.slice_column, opened),
        open_beside(opened, "test", request.test, request.test_split, "test"),
        open_beside(opened, "candidates", request.candidates, request.candidates_split, "train"),
    )


def _read_slices(column: str | None, opened: Opened) -> list[str | None] | None:
    """Slice of every row of the query's data set; None without a column of slices."""
    if column is None:
        return None
    try:
        names = read_groups(opened.query_rows, column, "slice_column")
    except UserError as error:
        raise UserError(str(error).replace("the data set", "the query")) from error
    if WHOLE in names:
        raise UserError(
            f"`slice_column={column!r}` has a slice called {WHOLE!r}, as the whole query is. "
            "Rename it."
        )
    return names


def _analyse(
    request: ValueRequest, opened: Opened, given: _Given, progress: ProgressFactory
) -> _Found:
    """Results of all computations, in which every process takes part."""
    model = opened.model

    def read(name: str, given: Named) -> Rows:
        advance = progress(f"Read {name}", len(distributed.share(len(given.rows))))
        return model.read(given.rows, *opened.sources.columns, advance)

    rows, query = opened.read(progress)
    test = require_pairs("`test`", read("test rows", given.test)) if given.test else None
    candidates = read("candidates", given.candidates) if given.candidates else None
    valuation = value_by_slice(model, rows, query, _of_rows(given.names, query), progress)
    curves: list[Curve] = []
    if request.curves:
        whole = valuation.scores.task[0]
        orders = removal_orders(whole, request.repeats, model.config.seed)
        curves = removal_curves(model, rows, test or query, orders, progress=progress)
    influence = valuation.influence
    additions = value_additions(influence, candidates, progress) if candidates else None
    return _Found(
        request,
        opened,
        rows,
        query,
        valuation,
        curves,
        given,
        candidates,
        additions,
        _measure_leverage(influence) if request.leverage else None,
    )


def _of_rows(names: list[str | None] | None, rows: Rows) -> list[str | None] | None:
    """Slices of the readable rows."""
    return names and [names[row] for row in rows.positions.tolist()]


def _measure_leverage(influence: Influence) -> _Leverage | None:
    of_rows, sample = influence.leverage(), influence.sample_leverage()
    if of_rows is None or sample is None:
        return None
    return _Leverage(of_rows, sample.median().item(), memorised(sample))


# ------------------------------------------------------------------------------------------ rows


def _write_rows(found: _Found) -> None:
    output, suffixes = found.request.output, _suffixes(found.valuation)
    columns = _columns("ecif", found.rows, found.valuation.scores, suffixes)
    if found.leverage:
        columns["ecif_leverage"] = found.rows.spread(found.leverage.of_rows.tolist())
    write_rows(_named_rows(found.opened.plain, found.rows, columns), output / "value.parquet")
    if found.candidates and found.additions and found.given.candidates:
        dataset = drop_influence_columns(found.given.candidates.rows)
        columns = _columns(ADDED, found.candidates, found.additions, suffixes)
        rows = _named_rows(dataset, found.candidates, columns)
        write_rows(rows, output / "candidates.parquet")


def _suffixes(valuation: Valuation) -> list[str]:
    """Suffixes of columns, for the whole query and every slice."""
    return ["", *(f":{one.name}" for one in valuation.slices[1:])]


def _reasons(rows: Rows) -> list[str | None]:
    """Reason of every row without a score; None for the others."""
    return [rows.reasons.get(row) for row in range(rows.total)]


def _columns(
    prefix: str, rows: Rows, scores: Scores | Additions, suffixes: Sequence[str]
) -> dict[str, list[float | None]]:
    """Columns of scores and their parts, for the whole query and every slice."""
    parts = {
        "_score": scores.task,
        "_positive": scores.positive,
        "_negative": scores.negative,
        "_stderr": scores.stderr,
    }
    return {
        f"{prefix}{part}{suffix}": rows.spread(values[number].tolist())
        for number, suffix in enumerate(suffixes)
        for part, values in parts.items()
    }


def _named_rows(dataset: Dataset, rows: Rows, columns: dict[str, list[float | None]]) -> Dataset:
    """All rows without images, numbered, with new columns."""
    images = [name for name, kind in dataset.features.items() if isinstance(kind, Image)]
    new: dict[str, list[Any]] = {"ecif_row": list(range(len(dataset))), **columns}
    new["ecif_reason"] = _reasons(rows)
    kinds = {name: Value("float32") for name in columns}
    kinds = {"ecif_row": Value("int64"), **kinds, "ecif_reason": Value("string")}
    values = Dataset.from_dict(new, features=Features(**kinds))
    kept = dataset.remove_columns(images)
    return concatenate_datasets([kept, values], axis=1) if kept.column_names else values


# --------------------------------------------------------------------------------------- summary


def _summarise(found: _Found) -> ValueSummary:
    """Summary of the results, without times."""
    request, opened, valuation = found.request, found.opened, found.valuation
    rows, scores = found.rows, valuation.scores
    summary = ValueSummary(
        **opened.provenance(
            rows,
            found.query,
            slice_column=request.slice_column,
            unnamed=valuation.unnamed if request.slice_column else 0,
        ),
        unreadable_reasons=dict(Counter(rows.reasons.values())),
        harmful=int((scores.task[0] < 0).sum()),
        clearly_harmful=_count_clear(scores),
        slices=[
            SliceFacts(**asdict(one), rankings=_rankings(scores, number, rows))
            for number, one in enumerate(valuation.slices)
        ],
        skipped=valuation.skipped,
        conflicts=list(_conflicts(valuation, rows)),
        curves=_describe_curves(found),
        candidates=_describe_candidates(found),
        leverage=_describe_leverage(found.leverage),
        solvers=describe_solves(valuation.influence.fitted),
    )
    return summary.replace(warnings=[*_warnings(summary), *opened.warnings(rows, found.query)])


def _rankings(scores: Scores | Additions, number: int, rows: Rows) -> Rankings:
    """Rankings of the pairs for one slice, or longer ones for the whole query."""
    count = TOP_OF_SLICE if number else TOP

    def rank(values: Tensor) -> list[Entry]:
        chosen = values.argsort(stable=True)[:count]
        return [Entry(**_entry(scores, number, int(i), rows)) for i in chosen if values[i] < 0]

    return Rankings(lowest=rank(scores.task[number]), highest=rank(-scores.task[number]))


def _entry(scores: Scores | Additions, number: int, i: int, rows: Rows) -> dict[str, Any]:
    return {
        "row": int(rows.positions[i]),
        "score": float(scores.task[number, i]),
        "positive": float(scores.positive[number, i]),
        "negative": float(scores.negative[number, i]),
        "stderr": float(scores.stderr[number, i]),
    }


def _conflicts(valuation: Valuation, rows: Rows) -> Iterator[ConflictFacts]:
    for one in find_conflicts(valuation.scores, TOP):
        helps, hurts = (
            Side(
                slice=valuation.slices[number].name,
                **_entry(valuation.scores, number, one.row, rows),
            )
            for number in (one.helps, one.hurts)
        )
        row = int(rows.positions[one.row])
        yield ConflictFacts(row=row, strength=one.strength, helps=helps, hurts=hurts)


def _describe_leverage(leverage: _Leverage | None) -> LeverageFacts | None:
    if leverage is None:
        return None
    return LeverageFacts(
        median=leverage.of_rows.median().item(),
        sample_median=leverage.sample_median,
        warning=leverage.warning,
    )


def _describe_curves(found: _Found) -> Curves | None:
    if not found.curves:
        return None
    request = found.request
    return Curves(
        judge=found.given.test.told if found.given.test else "the query",
        held_out=found.given.test is not None,
        repeats=request.repeats,
        curves=[CurveFacts(**asdict(curve)) for curve in found.curves],
        verdict=_judge_curves(found.curves),
    )


def _judge_curves(curves: list[Curve]) -> str:
    """Number of shares at which mean losses have the predicted order, in words."""
    # Not at the first share, where no pair is removed.
    harmful, random, valuable = (np.mean(curve.losses, axis=1)[1:] for curve in curves)
    return (
        f"The loss without the most harmful pairs is below that without random ones at "
        f"{(harmful < random).sum()} of {len(random)} shares, and without the most valuable ones "
        f"above it at {(valuable > random).sum()} of {len(random)}."
    )


def _describe_candidates(found: _Found) -> Candidates | None:
    if found.additions is None or found.candidates is None or found.given.candidates is None:
        return None
    additions, rows = found.additions, found.candidates
    return Candidates(
        source=found.given.candidates.told,
        rows=rows.total,
        valued=len(rows),
        unreadable=len(rows.reasons),
        worth_having=_count_clear(additions),
        rankings=_rankings(additions, 0, rows),
        slices={
            one.name: _rankings(additions, number, rows)
            for number, one in enumerate(found.valuation.slices[1:], 1)
        },
    )


def _count_clear(scores: Scores | Additions) -> int:
    """Number of pairs whose value for the query is two standard errors or more below zero."""
    return int((scores.task[0] + 2 * scores.stderr[0] < 0).sum())


def _warnings(summary: ValueSummary) -> Iterator[str]:
    if summary.curves and not summary.curves.held_out:
        yield (
            "The removal curves are judged by the query itself, which the scores were made for. "
            "Give held-out pairs (`test`) to see what is gained beyond it."
        )
    small = [one.name for one in summary.slices[1:] if one.rows < SMALL_SLICE]
    if small:
        yield (
            f"These slices have fewer than {SMALL_SLICE} rows, and their rankings hang on few "
            f"pairs: {', '.join(small)}."
        )
    if summary.leverage and summary.leverage.warning:
        yield summary.leverage.warning
    yield from filter(None, (solve.warning for solve in summary.solvers))
