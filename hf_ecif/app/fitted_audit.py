"""The model of an audit, loaded and fitted when a tab first needs it, then kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hf_ecif.app.selection import open_audit
from hf_ecif.applications.requests import Sources
from hf_ecif.applications.sources import Opened, open_sources, read_named
from hf_ecif.applications.tracing import find_errors, responsibility
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.images import thumbnail
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.errors import UserError
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.loaded import LoadedModel
from hf_ecif.influence.pairs import distinct_pairs, join_near_images
from hf_ecif.influence.queries import Query
from hf_ecif.influence.retraining import measure
from hf_ecif.influence.rows import Rows, Table

IMAGE = "image"
MOST_CLASSES = 500
TEST, MOST_TEST = "test", 1000
NEAR = 24  # number of nearest images whose captions are compared
SHOWN = 4
_LOCK = Lock()  # two sessions that need the same model wait for one of them to load it


@dataclass(frozen=True)
class Prepared:
    """A fitted model with its rows.

    Attributes:
        influence: influence of the audited rows on ``query``, fitted as in the audit.
        rows: the audited rows.
        query: rows of the query.
        test: held-out rows, neither audited nor in the query; None if there are none.
        query_images: images of the query's data set, not decoded.
    """

    influence: Influence
    rows: Rows
    query: Rows
    test: Rows | None
    query_images: Sequence[Any]

    @property
    def model(self) -> LoadedModel:
        """The audited model."""
        return self.influence.model

    @cached_property
    def sizes(self) -> Tensor:
        """`Influence.sizes` of the rows, equal for all queries."""
        return self.influence.sizes()


def prepare(folder: str) -> Prepared:
    """Model and rows of an audit, loaded and fitted.

    Raises:
        UserError: the model or the data cannot be found any more.
    """
    with _LOCK:
        return _prepare(folder)


def find_neighbours(prepared: Prepared, row: int) -> tuple[list[int], list[int]]:
    """Pairs with near images: those whose captions are nearest, and those with the farthest.

    Args:
        prepared: model and rows of an audit.
        row: number of a row in the data set.

    Returns:
        Numbers of the agreeing and of the contradicting rows; none for a row that was not read.
    """
    positions = prepared.rows.positions
    here = (positions == row).nonzero()[:, 0]
    if not len(here):
        return [], []
    text, image = prepared.model.embed_as_given(prepared.rows)[:2]
    alike = (image @ image[here[0]]).index_fill(0, here.to(image.device), -torch.inf)
    near = alike.topk(min(NEAR, len(positions) - 1)).indices
    order = near[(text[near] @ text[here[0]]).argsort(descending=True)].cpu()
    half = min(SHOWN, len(order) // 2)

    def numbers(chosen: Tensor) -> list[int]:
        return positions[chosen].tolist()

    return numbers(order[:half]), numbers(order.flip(0)[:half])


@dataclass(frozen=True)
class Retrained:
    """Results of training on all rows and on the remaining ones.

    Attributes:
        predicted: change of the query's loss in nats, in closed form for the whole group.
        loss: the query's loss in nats, before and after.
        before: measures after training on all rows.
        after: measures after training on the remaining rows.
        judge: name of the rows on which they are measured.
    """

    predicted: float
    loss: tuple[float, float]
    before: dict[str, float]
    after: dict[str, float]
    judge: str


def retrain(prepared: Prepared, gone: set[int]) -> Retrained:
    """Measures after training without some rows, with the audit's settings.

    Args:
        prepared: model and rows of an audit.
        gone: numbers of the removed rows in the data set.

    Raises:
        UserError: fewer than two rows are left.
    """
    influence, model = prepared.influence, prepared.model
    members = torch.tensor([row in gone for row in influence.rows.positions.tolist()])
    if int((~members).sum()) < 2:
        raise UserError("Fewer than two pairs would be left, too few to train on.")
    theta = influence.refit(members)
    judge = prepared.test or prepared.query
    predicted = influence.score_group(members).task.item() if gone else 0.0
    losses = [model.query_value(prepared.query, at).item() for at in (influence.theta, theta)]
    return Retrained(
        predicted=predicted,
        loss=(losses[0], losses[1]),
        before=measure(model, influence.theta, judge),
        after=measure(model, theta, judge),
        judge="the held-out split test" if prepared.test else "the query",
    )


@dataclass(frozen=True)
class Asked:
    """A misprediction, as a page shows it.

    Attributes:
        row: number among the query's rows; None for a visitor's own pair.
        caption: the right caption.
        picture: its own image.
        found: caption that the model prefers, or that belongs to the image it prefers.
        found_picture: image that the model prefers, if it is one of the query's.
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
        row: number of the row in the audited data.
        score: change of the margin without the pair's contribution, in nats; negative is a cause.
        stderr: standard error of the score.
        positive: part of the score from the pair's role as a positive.
        negative: part of the score from its role as a negative.
    """

    row: int
    score: float
    stderr: float
    positive: float
    negative: float


def list_mispredictions(prepared: Prepared) -> list[Asked]:
    """Captions of the query that retrieve the wrong image, the worst first."""
    errors = find_errors(prepared.influence, prepared.query)
    triples = zip(
        errors.rows.tolist(), errors.retrieved.tolist(), errors.margin.tolist(), strict=True
    )
    return [_describe(prepared, *triple) for triple in triples]


def describe_query(prepared: Prepared, row: int) -> Asked:
    """A misprediction of the query.

    Raises:
        UserError: the row is not mispredicted.
    """
    for found in list_mispredictions(prepared):
        if found.row == row:
            return found
    raise UserError(f"Row {row} of the query is not mispredicted.")


def ask(prepared: Prepared, image: bytes, text: str, others: list[str]) -> tuple[Asked, Query]:
    """A query: the margin of an image between its right caption and others.

    Args:
        prepared: model and rows of an audit.
        image: content of an image file.
        text: the right caption or class.
        others: the wrong ones; the query's own captions if empty.

    Raises:
        UserError: the image cannot be read, or there is no wrong caption.
    """
    wrong = [other for other in dict.fromkeys(others or prepared.query.texts) if other != text]
    wrong = wrong[:MOST_CLASSES]
    if not wrong:
        raise UserError("Name at least one other class.")
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
    encoder, theta = prepared.model.encoder, prepared.influence.theta
    text_side, image_side = encoder.embed(theta, rows.features)[:2]
    best = int((text_side[1:] @ image_side[0]).argmax())
    value = query.values(encoder, theta).item()
    return Asked(None, text, thumbnail(cell)[0], wrong[best], None, value), query


def find_causes(prepared: Prepared, query: Query, count: int) -> list[Cause]:
    """Training pairs that contributed most to one query, the largest contribution first."""
    scores = prepared.influence.contributions(query).of_query(0)
    order = responsibility(scores.task, prepared.sizes).argsort()
    return [
        Cause(
            row=int(prepared.influence.rows.positions[one]),
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
    summary, query = audit.summary, audit.summary.query
    config = InfluenceConfig.from_dict(_known(summary.config), "summary.json")
    reading, columns = summary.reading, query.columns
    sources = Sources(
        model=_find(summary.model, audit.folder),
        dataset=_find(summary.dataset, audit.folder),
        split=summary.split,
        config_name=reading.config,
        image_column=summary.columns.image,
        text_column=reading.text or summary.columns.text,
        template=reading.template,
        limit=reading.limit,
        sample=reading.sample,
        query=query.dataset and _find(query.dataset, audit.folder),
        query_split=query.split,
        query_config=query.config,
        query_image_column=columns.image if columns else None,
        query_text_column=columns.text if columns else None,
        processor=summary.processor,
    )
    opened = open_sources(sources, config)
    if len(opened.dataset) != summary.rows:
        raise UserError(
            f"{sources.dataset} has {len(opened.dataset):,} rows now, but had "
            f"{summary.rows:,} when it was audited. Run the audit again."
        )
    rows, queries = opened.read()
    cells = opened.query_set or opened.dataset
    joined = join_near_images(rows, opened.model.embed_as_given(rows).image)
    return Prepared(
        influence=opened.model.fit(distinct_pairs(joined).rows, queries),
        rows=rows,
        query=queries,
        test=_read_test(opened),
        query_images=cells[summary.columns.image],
    )


def _read_test(opened: Opened) -> Rows | None:
    """Rows of the split `test`, if it was neither audited nor used as the query."""
    sources = opened.sources
    if TEST in (sources.split, sources.query_split):
        return None
    try:
        named = read_named("test", sources.dataset, TEST, config=sources.config_name)
        cells = opened.like.make(named).rows
        return opened.model.read(cells.select(range(min(len(cells), MOST_TEST))), *sources.columns)
    except UserError:  # there is no such split, or it has other columns
        return None


def _describe(prepared: Prepared, row: int, found: int, margin: float) -> Asked:
    query = prepared.query

    def picture(number: int) -> str | None:
        return thumbnail(prepared.query_images[int(query.positions[number])])[0]

    return Asked(row, query.texts[row], picture(row), query.texts[found], picture(found), margin)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if hasattr(InfluenceConfig, name)}


def _find(name: str, folder: Path) -> str:
    """Where a source is: as named from the working folder, or beside the audit."""
    beside = folder.resolve().parent / name
    return name if Path(name).exists() or not beside.exists() else str(beside)
