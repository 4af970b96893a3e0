"""The model behind an audit, loaded and fitted when a tab first needs it, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from datasets import Column
from torch import Tensor

from hf_ecif.app.selection import open_audit
from hf_ecif.applications.sources import Sources, open_sources
from hf_ecif.applications.tracing import find_errors, responsibility
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.images import thumbnail
from hf_ecif.data.loading import load_rows
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.queries import Query
from hf_ecif.influence.retraining import measure
from hf_ecif.influence.rows import Rows, Table

IMAGE = "image"
MOST_CLASSES = 500
TEST, MOST_TEST = "test", 1000
NEAR = 24  # nearest images among which captions are compared
SHOWN = 4
_LOCK = Lock()  # two sessions that need the same model wait for one of them to load it


@dataclass(frozen=True)
class Prepared:
    """A fitted model with its rows.

    Attributes:
        model: fitted on ``rows`` for ``query``, as the audit did.
        rows: the audited rows.
        query: the query's.
        embeddings: of the rows, by the model as given.
        test: rows that neither the audit nor its query has; None where there are none.
        query_images: of the data set that the query's rows are of, not decoded.
    """

    model: InfluenceModel
    rows: Rows
    query: Rows
    embeddings: Embeddings
    test: Rows | None
    query_images: Column

    @cached_property
    def sizes(self) -> Tensor:
        """`InfluenceModel.sizes` of the rows, alike for all queries."""
        return self.model.sizes(self.rows)


def prepare(folder: str) -> Prepared:
    """Load and fit what an audit was made with.

    Raises:
        UserError: its model or its data cannot be found any more.
    """
    with _LOCK:
        return _prepare(folder)


def find_neighbours(prepared: Prepared, row: int) -> tuple[list[int], list[int]]:
    """Among the pairs with the nearest images, those with the nearest captions and the farthest.

    Args:
        prepared: of an audit.
        row: number of a row, as the data set counts.

    Returns:
        Numbers of rows: agreeing pairs, contradicting pairs; none for a row that was not read.
    """
    positions = prepared.rows.positions
    here = (positions == row).nonzero()[:, 0]
    if not len(here):
        return [], []
    text, image = prepared.embeddings[:2]
    alike = (image @ image[here[0]]).index_fill(0, here.to(image.device), -torch.inf)
    near = alike.topk(min(NEAR, len(positions) - 1)).indices
    order = near[(text[near] @ text[here[0]]).argsort(descending=True)].cpu()
    half = min(SHOWN, len(order) // 2)

    def numbers(chosen: Tensor) -> list[int]:
        return positions[chosen].tolist()

    return numbers(order[:half]), numbers(order.flip(0)[:half])


@dataclass(frozen=True)
class Retrained:
    """The model trained on all rows, and on those that are left.

    Attributes:
        predicted: change of the query's loss in nats, in closed form for the whole group.
        loss: of the query in nats, before and after.
        before: `comparison.MEASURES` on the judge, all rows trained on.
        after: the same, only the rest trained on.
        judge: which rows those are of.
    """

    predicted: float
    loss: tuple[float, float]
    before: dict[str, float]
    after: dict[str, float]
    judge: str


def retrain(prepared: Prepared, gone: set[int]) -> Retrained:
    """Train without some rows, by the audit's own recipe, and measure.

    Args:
        prepared: of an audit.
        gone: numbers of rows, as the data set counts.

    Raises:
        UserError: fewer than two rows are left.
    """
    model, rows = prepared.model, prepared.rows
    members = torch.tensor([row in gone for row in rows.positions.tolist()])
    if int((~members).sum()) < 2:
        raise UserError("Fewer than two pairs would be left: nothing can be trained on them.")
    theta = model.refit(rows.select((~members).nonzero()[:, 0]))
    judge = prepared.test or prepared.query
    predicted = model.score_group(rows, members).task.item() if gone else 0.0
    losses = [model.query_value(prepared.query, at).item() for at in (model.theta, theta)]
    return Retrained(
        predicted=predicted,
        loss=(losses[0], losses[1]),
        before=measure(model, model.theta, judge),
        after=measure(model, theta, judge),
        judge="the split test, which nothing was decided by" if prepared.test else "the query",
    )


@dataclass(frozen=True)
class Asked:
    """A misprediction as it is shown.

    Attributes:
        row: number among the query's rows; None of a visitor's own.
        caption: that should have been found, or have found the image.
        picture: its own image.
        found: caption that the model prefers, or that goes with the image it prefers.
        found_picture: the image that it prefers, where it is one of the query's.
        margin: log-odds against the right answer, in nats.
    """

    row: int | None
    caption: str
    picture: str | None
    found: str
    found_picture: str | None
    margin: float


@dataclass(frozen=True)
class Cause:
    """A training pair behind an error.

    Attributes:
        row: its number in the audited data.
        score: change of the margin without what it contributed, in nats; negative is a cause.
        stderr: standard error of it.
        positive: its part from the pair's role as a positive.
        negative: its part from the role as a negative.
    """

    row: int
    score: float
    stderr: float
    positive: float
    negative: float


def list_mispredictions(prepared: Prepared) -> list[Asked]:
    """Captions of the query that fetch another image than their own, the worst first."""
    errors = find_errors(prepared.model, prepared.query)
    triples = zip(
        errors.rows.tolist(), errors.retrieved.tolist(), errors.margin.tolist(), strict=True
    )
    return [_describe(prepared, *triple) for triple in triples]


def describe_query(prepared: Prepared, row: int) -> Asked:
    """A misprediction of the query.

    Raises:
        UserError: that row is none.
    """
    for found in list_mispredictions(prepared):
        if found.row == row:
            return found
    raise UserError(f"Row {row} of the query is no misprediction.")


def ask(prepared: Prepared, image: bytes, text: str, others: list[str]) -> tuple[Asked, Query]:
    """The margin of an image between its right caption and others, as a query.

    Args:
        prepared: of an audit.
        image: an image's file.
        text: the right caption or class.
        others: the wrong ones; the query's own captions if empty.

    Raises:
        UserError: the image cannot be read, or there is nothing to tell it from.
    """
    wrong = [other for other in dict.fromkeys(others or prepared.query.texts) if other != text]
    wrong = wrong[:MOST_CLASSES]
    if not wrong:
        raise UserError("Name at least one other class to tell it from.")
    texts = [text, *wrong]
    cell = {"bytes": image, "path": None}
    cells = Table({IMAGE: [cell] * len(texts), "text": texts})
    rows = prepared.model.read_any(cells, IMAGE, "text")
    if len(rows) < len(texts):
        raise UserError(f"This cannot be traced: {next(iter(rows.reasons.values()))}.")

    def margin(embeddings: Embeddings) -> Tensor:
        logits = embeddings.scale * embeddings.text @ embeddings.image[0]
        return (logits[1:].logsumexp(dim=0) - logits[0])[None]

    query = Query(rows.features, margin)
    text_side, image_side = prepared.model.encoder.embed(prepared.model.theta, rows.features)[:2]
    best = int((text_side[1:] @ image_side[0]).argmax())
    value = query.values(prepared.model.encoder, prepared.model.theta).item()
    return Asked(None, text, thumbnail(cell)[0], wrong[best], None, value), query


def find_causes(prepared: Prepared, query: Query, count: int) -> list[Cause]:
    """The training pairs most responsible for one query."""
    scores = prepared.model.contributions(prepared.rows, query).of_query(0)
    order = responsibility(scores.task, prepared.sizes).argsort()
    return [
        Cause(
            row=int(prepared.rows.positions[one]),
            score=scores.task[one].item(),
            stderr=scores.stderr[one].item(),
            positive=scores.positive[one].item(),
            negative=scores.negative[one].item(),
        )
        for one in order[:count].tolist()
    ]


@lru_cache(maxsize=2)
def _prepare(folder: str) -> Prepared:
    audit = open_audit(folder)
    summary, query = audit.summary, audit.summary["query"]
    config = InfluenceConfig.from_dict(_known(summary["config"]), "summary.json")
    sources = Sources(
        model=_find(summary["model"], audit.folder),
        dataset=_find(summary["dataset"], audit.folder),
        split=summary["split"],
        query=query.get("dataset") and _find(query["dataset"], audit.folder),
        query_split=query.get("split") or "validation",
        image_column=summary["columns"]["image"],
        text_column=summary["columns"]["text"],
    )
    opened = open_sources(sources, config)
    if len(opened.dataset) != summary["rows"]:
        raise UserError(
            f"{sources.dataset} has {len(opened.dataset):,} rows by now, and had "
            f"{summary['rows']:,} when it was audited. Run the audit again."
        )
    rows, queries = opened.read()
    opened.model.fit(rows, queries)
    model, cells = opened.model, opened.query_set or opened.dataset
    return Prepared(
        model=model,
        rows=rows,
        query=queries,
        embeddings=model.encoder.embed(model.encoder.theta, rows.features),
        test=_read_test(model, sources),
        query_images=cells[sources.image_column],
    )


def _read_test(model: InfluenceModel, sources: Sources) -> Rows | None:
    """The split `test` of the data, if it is neither what was audited nor the query."""
    if TEST in (sources.split, sources.query_split):
        return None
    try:
        cells = load_rows(sources.dataset, TEST)
        return model.read(cells.select(range(min(len(cells), MOST_TEST))), *sources.columns)
    except UserError:  # there is none, or it has other columns
        return None


def _describe(prepared: Prepared, row: int, found: int, margin: float) -> Asked:
    query = prepared.query

    def picture(number: int) -> str | None:
        return thumbnail(prepared.query_images[int(query.positions[number])])[0]

    return Asked(row, query.texts[row], picture(row), query.texts[found], picture(found), margin)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if hasattr(InfluenceConfig, name)}


def _find(name: str, folder: Path) -> str:
    """A source that was named from the working folder, or that lies beside the audit."""
    beside = folder.resolve().parent / name
    return name if Path(name).exists() or not beside.exists() else str(beside)
