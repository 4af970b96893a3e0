"""Inputs of a command: a model, the rows to be valued, and a query."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset
from torch import Tensor

from hf_ecif.applications.requests import Sources
from hf_ecif.config import InfluenceConfig, RowFormat
from hf_ecif.data.embeddings import COLUMN as EMBEDDING
from hf_ecif.data.embeddings import width_of
from hf_ecif.data.images import fingerprint_rows, image_hashes
from hf_ecif.data.loading import Source, find_rows
from hf_ecif.data.pairs import MadePairs, PairOptions, make_pairs, rename_like
from hf_ecif.data.schema import (
    check_columns,
    drop_influence_columns,
    find_columns,
    is_influence_column,
)
from hf_ecif.data.summary import Columns, QueryFacts, Reading, Solve
from hf_ecif.detection.verified import FEWEST_HALVED, halve_query
from hf_ecif.errors import UserError
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.queries import choose_query
from hf_ecif.influence.rows import Chain, Rows, require_rows
from hf_ecif.models.embeddings import embedding_name
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.version import __version__

_OF_DATA = re.compile(r"`(image_column|text_column|config_name)")
IN_MEMORY, A_STREAM = "a Dataset in memory", "a stream"  # names of rows that have none
PACKAGES = ("torch", "transformers", "datasets", "scikit-learn", "pillow")


class Learning(NamedTuple):
    """What a detector learns from.

    Attributes:
        rows: those of the data, and after them rows that are verified to be right.
        query: the query of the runs that it learns from.
    """

    rows: Rows
    query: Rows


@dataclass(frozen=True)
class Opened:
    """Model and data, loaded.

    Attributes:
        sources: where they are from, with the splits and columns that were found.
        model: the model, with the config of the run.
        dataset: all pairs, with their original columns, images undecoded.
        query_set: the query, with pairs in columns of the same names; None if it is chosen from the
            data.
        original: ``dataset``, with images as they were given.
        reading: how pairs were made of the data.
        like: how they are made of further rows.
        query_columns: of the query, as it has them itself.
    """

    sources: Sources
    model: InfluenceModel
    dataset: Dataset
    query_set: Dataset | None
    original: Dataset
    reading: Reading
    like: PairLike
    query_columns: Columns | None

    @property
    def query_rows(self) -> Dataset:
        """Data set of the query's rows."""
        return self.dataset if self.query_set is None else self.query_set

    @property
    def plain(self) -> Dataset:
        """All rows, without influence columns of an earlier run."""
        return drop_influence_columns(self.dataset)

    def read(
        self, progress: ProgressFactory = silent, checkpoints: Checkpoints | None = None
    ) -> tuple[Rows, Rows]:
        """Rows and query at the frozen boundary."""
        known = checkpoints or Checkpoints()
        rows = self._read_rows(progress, known)
        if self.query_set is None:
            return rows, choose_query(rows, self.model.encoder, seed=self.model.config.seed)
        return rows, self._read("query", self.query_set, progress, known)

    def read_with_verified(
        self,
        progress: ProgressFactory = silent,
        checkpoints: Checkpoints | None = None,
        sample: Tensor | None = None,
    ) -> tuple[Rows, Rows, Learning]:
        """Rows and query, and what a detector learns from: both, or with half of the query.

        Args:
            progress: makes progress bars.
            checkpoints: store of what was read.
            sample: ``(m,)``, ascending, numbers of the rows of the data to read; all if absent.
        """
        known, model = checkpoints or Checkpoints(), self.model
        dataset = self.dataset if sample is None else self.dataset.select(sample.numpy())

        def numbered(rows: Rows) -> Rows:
            return rows if sample is None else rows.numbered(sample, len(self.dataset))

        if self.query_set is None:
            rows = numbered(replace(self, dataset=dataset)._read_rows(progress, known))
            query = choose_query(rows, model.encoder, seed=model.config.seed)
            return rows, query, Learning(rows, query)

        def read(name: str, cells: Dataset | Chain) -> Rows:
            advance = progress(f"Read {name}", len(distributed.share(len(cells))))
            return model.read_any(cells, *self.sources.columns, advance, known.within(name))

        query = require_rows(read("query", self.query_set))
        if len(query) < FEWEST_HALVED:
            rows = numbered(require_rows(read("rows", dataset)))
            return rows, query, Learning(rows, query)
        verified, left = halve_query(query, model.config.seed)
        together = read("rows", Chain(dataset, self.query_set.select(verified.positions)))
        rows = numbered(require_rows(together.first(len(dataset))))
        return rows, query, Learning(together, left)

    def _read_rows(self, progress: ProgressFactory, known: Checkpoints) -> Rows:
        return self._read("rows", self.dataset, progress, known)

    def _read(
        self, name: str, dataset: Dataset, progress: ProgressFactory, known: Checkpoints
    ) -> Rows:
        advance = progress(f"Read {name}", len(distributed.share(len(dataset))))
        return self.model.read(dataset, *self.sources.columns, advance, known.within(name))

    def provenance(self, rows: Rows, query: Rows, **of_query: Any) -> dict[str, Any]:
        """Fields of a `Provenance`, except warnings.

        Args:
            rows: rows of the data.
            query: rows of the query.
            of_query: further fields of `QueryFacts`.
        """
        sources, config = self.sources, self.model.config
        chosen = self.query_set is None
        named = f"{sources.query}, split {sources.query_split}"
        return {
            "model": sources.model,
            "processor": sources.processor,
            "dataset": sources.dataset,
            "split": sources.split,
            "columns": self.like.columns,
            "reading": self.reading,
            "rows": rows.total,
            "scored": len(rows),
            "unreadable": len(rows.reasons),
            "query": QueryFacts(
                source="chosen from the data" if chosen else named,
                dataset=sources.query,
                split=None if chosen else sources.query_split,
                rows=len(query),
                chosen=chosen,
                overlap=len(query) if chosen else self._overlap,
                columns=self._own_columns_of_query,
                config=sources.query_config,
                **of_query,
            ),
            "config": config.to_dict(),
            "versions": {"python": platform.python_version(), "hf_ecif": __version__}
            | {p: version(p) for p in PACKAGES},
            "seed": config.seed,
        }

    @property
    def _own_columns_of_query(self) -> Columns | None:
        """Where they have other names than those of the data."""
        own = self.query_columns
        return None if own in (self.like.columns, self.like.source) else own

    @cached_property
    def _overlap(self) -> int:
        """Number of images of the query that are also in the data."""
        assert self.query_set is not None
        column = self.like.columns.image
        theirs = image_hashes(self.query_set, column)
        return len(image_hashes(self.dataset, column, among=theirs))

    def warnings(self, rows: Rows, query: Rows) -> Iterator[str]:
        """Warnings about rows and query that a reader of the results must know."""
        if self.query_set is None:
            yield (
                f"No query was given: {len(query)} pairs were chosen from the data, those best "
                "aligned under the model, balanced over clusters of images. The model is fitted to "
                "them, too: a clean set of your own, held out, judges better."
            )
        elif self._overlap:
            yield (
                f"{self._overlap} images of the query are in the data, too. The query then favours "
                "these rows: give a query of other images."
            )
        replaced = [name for name in self.dataset.column_names if is_influence_column(name)]
        if replaced and "ecif_score" not in replaced:  # with a score, they are from an earlier run
            yield (
                f"{', '.join(replaced)}: columns of these names are ours, and those of the data "
                "are left out. Rename them to keep them."
            )
        size = self.model.config.batch_size
        if len(rows) <= size:
            yield (
                f"All {len(rows)} rows fit into one batch of {size}, so scores have no error over "
                "random batches. That does not make them sure: a smaller `batch_size` shows how "
                "much they depend on a pair's context batch."
            )

    def manifest(self) -> dict[str, Any]:
        """What a run that is gone on with must have read in the same way."""
        return {"columns": self.sources.columns, "reading": self.reading.to_dict()}

    def fingerprints(self) -> dict[str, str]:
        """Hashes of model, data and query."""

        def look() -> dict[str, str]:
            query = self.query_set
            return {
                "model": self.model.encoder.fingerprint(),
                "data": fingerprint_rows(self.plain),
                "query": "chosen from the data" if query is None else fingerprint_rows(query),
            }

        return distributed.decide(look)


def describe_solves(fitted: Fitted) -> list[Solve]:
    """Solves of a fit, as fields of a summary."""
    return [Solve(purpose=purpose, **asdict(solve)) for purpose, solve in fitted.solvers.items()]


@dataclass(frozen=True)
class Named:
    """Rows that were given, by what they are called.

    Attributes:
        role: the argument: ``dataset``, ``query``, ``test`` or ``candidates``.
        name: of the source; of rows in memory, what they are.
        rows: all of them.
        split: their split.
        format: what they were read as; None in memory.
    """

    role: str
    name: str
    rows: Dataset
    split: str
    format: str | None = None

    @property
    def told(self) -> str:
        """What they are, in a summary."""
        return f"{self.name}, split {self.split}"


def open_sources(sources: Sources, config: InfluenceConfig) -> Opened:
    """Load the data, the query and the model.

    Raises:
        UserError: one of them cannot be loaded, or lacks a column.
    """
    sources = resolve_embeddings(sources)
    data = read_named(
        "dataset",
        sources.dataset,
        sources.split,
        config=sources.config_name,
        format=sources.format,
        image_column=sources.image_column,
        limit=sources.limit,
    )
    query = sources.query and read_named(
        "query",
        sources.query,
        sources.query_split,
        usual="validation",
        config=sources.query_config,
        image_column=sources.query_image_column,
    )
    return open_named(
        data,
        query or None,
        sources,
        lambda: InfluenceModel.from_pretrained(sources.model, config, processor=sources.processor),
        config.seed,
    )


def resolve_embeddings(sources: Sources) -> Sources:
    """Sources in which given embeddings are the data, and projections of them the model.

    Raises:
        UserError: they cannot be read, or neither they nor a model and data are given.
    """
    _check_given(sources)
    if sources.embeddings is None:
        return sources
    key = sources.embeddings_key
    with _told_of("embeddings", sources.embeddings):
        width = width_of(sources.embeddings, key)
    return replace(
        sources,
        model=embedding_name(width, sources.logit_scale),
        dataset=sources.embeddings,
        embeddings=None,
        embeddings_key=None,
        logit_scale=None,
        config_name=key or sources.config_name,
        query_config=key if sources.query else None,
        image_column=EMBEDDING,
        query_image_column=EMBEDDING if sources.query else None,
    )


def _check_given(sources: Sources) -> None:
    """Refuse embeddings beside what they take the place of, and neither."""
    for name in ("model", "dataset", "processor"):
        value = getattr(sources, name)
        if sources.embeddings is not None and value:
            raise UserError(
                f"`{name}` and `embeddings` are given, which take the place of model and data. "
                "Leave one of them out."
            )
        if sources.embeddings is None and not value and name != "processor":
            raise UserError(f"`{name}` is missing. Give it, or `embeddings` of the pairs.")


def read_named(
    role: str,
    name: str,
    split: str | None,
    *,
    usual: str = "train",
    config: str | None = None,
    format: RowFormat | None = None,
    image_column: str | None = None,
    limit: int | None = None,
) -> Named:
    """Rows of a source; see `hf_ecif.data.loading.Source`.

    Raises:
        UserError: they cannot be read; it says of which role they are.
    """
    with _told_of(role, name):
        found = find_rows(Source(name, split, usual, config, format, image_column, limit))
    return Named(role, name, found.rows, found.split, found.format)


def open_named(
    data: Named,
    query: Named | None,
    sources: Sources,
    load_model: Callable[[], InfluenceModel],
    seed: int,
) -> Opened:
    """Pairs out of the rows of data and query, and the model.

    Args:
        data: all rows of the data.
        query: those of the query; None if it is chosen from the data.
        sources: which pairs are made of them.
        load_model: loads the model, which takes longest and hence comes last.
        seed: of a sample.

    Raises:
        UserError: a column is missing, or it cannot be told which is meant.
    """
    options = PairOptions(
        image_column=sources.image_column,
        text_column=sources.text_column,
        template=sources.template,
        limit=sources.limit,
        sample=sources.sample,
        seed=seed,
    )
    with _told_of(data.role, data.name):
        made = make_pairs(data.rows, options)
        dataset = check_columns(made.rows.with_format(None), *made.columns.names)
    like = PairLike(made.columns, made.source, sources.template)
    asked = query and like.make(query, sources.query_image_column, sources.query_text_column)
    resolved = replace(
        sources,
        split=data.split,
        query_split=query.split if query else sources.query_split,
        image_column=made.columns.image,
        text_column=made.columns.text,
    )
    reading = Reading(
        format=data.format,
        config=sources.config_name,
        limit=sources.limit,
        sample=sources.sample,
        template=sources.template,
        text=made.source.text if made.source.text != made.columns.text else None,
    )
    return Opened(
        sources=resolved,
        model=load_model(),
        dataset=dataset,
        query_set=asked.rows if asked else None,
        original=made.rows,
        reading=reading,
        like=like,
        query_columns=asked.source if asked else None,
    )


@dataclass(frozen=True)
class PairLike:
    """How pairs are made of further rows, so that they have the columns of the data.

    Attributes:
        columns: of the data's pairs.
        source: what these were made of.
        template: of their captions.
    """

    columns: Columns
    source: Columns
    template: str | None

    def make(
        self, named: Named, image_column: str | None = None, text_column: str | None = None
    ) -> MadePairs:
        """Pairs of other rows, images undecoded.

        Args:
            named: the rows.
            image_column: of images; that of the data if absent, or the one of that type.
            text_column: of captions; likewise.

        Raises:
            UserError: there is no such column, or it cannot be told which is meant.
        """
        kinds = named.rows.features
        images, texts = (self.columns.image,), (self.source.text, self.columns.text)
        image = image_column or next((name for name in images if name in kinds), None)
        text = text_column or next((name for name in texts if name in kinds), None)
        with _told_of(named.role, named.name):
            image, text = find_columns(named.rows, image, text)
            # Free captions have no need of the sentence around the names of the data.
            are_names = text == self.source.text or isinstance(kinds.get(text), ClassLabel)
            template = self.template if are_names else None
            made = make_pairs(named.rows, PairOptions(image, text, template))
            rows = rename_like(made.rows.with_format(None), made.columns, self.columns)
            rows = check_columns(rows, *self.columns.names)
        return made._replace(rows=rows, columns=self.columns)


def open_beside(
    opened: Opened, role: str, name: str | None, split: str | None, usual: str
) -> Named | None:
    """Further pairs, a test or candidates, with the columns of the data.

    Args:
        opened: the data.
        role: argument that names them.
        name: of their source; None if there is none.
        split: of it.
        usual: the split that is meant if none is given.

    Raises:
        UserError: they cannot be read, have no such columns, or there is a split of nothing.
    """
    if name is None:
        if split is not None:
            raise UserError(f"`{role}_split={split}` is a split of `{role}`: give it, too.")
        return None
    key = opened.reading.config if opened.reading.format == "embeddings" else None
    named = read_named(role, name, split, usual=usual, config=key)
    return replace(named, rows=opened.like.make(named).rows)


@contextmanager
def _told_of(role: str, name: str) -> Iterator[None]:
    """Errors that say whether they are of the data, the query or the test."""
    try:
        yield
    except UserError as error:
        said = str(error).removeprefix(f"{name}: ")
        if role == "query":
            said = _OF_DATA.sub(r"`query_\1", said).replace("`query_config_name", "`query_config")
        named = f"`{role}`" if name in (IN_MEMORY, A_STREAM) else f"`{role}={name}`"
        raise UserError(f"{named}: {said}") from error
