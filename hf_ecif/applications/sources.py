"""Inputs of a command: a model, the rows to be valued, and a query."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

from datasets import Dataset

from hf_ecif.applications.requests import Sources
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.images import fingerprint_rows, image_hashes
from hf_ecif.data.loading import load_rows
from hf_ecif.data.schema import check_columns, drop_influence_columns, is_influence_column
from hf_ecif.data.summary import Columns, QueryFacts, Solve
from hf_ecif.detection.verified import FEWEST_HALVED, halve_query
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.queries import choose_query
from hf_ecif.influence.rows import Chain, Rows, require_rows
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.version import __version__

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
        model: the model, with the config of the run.
        dataset: all rows, with their original columns.
        query_set: the query; None if it is chosen from the data.
    """

    sources: Sources
    model: InfluenceModel
    dataset: Dataset
    query_set: Dataset | None

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

        def read(name: str, dataset: Dataset) -> Rows:
            advance = progress(f"Read {name}", len(distributed.share(len(dataset))))
            return self.model.read(dataset, *self.sources.columns, advance, known.within(name))

        rows = read("rows", self.dataset)
        if self.query_set is None:
            return rows, choose_query(rows, self.model.encoder, seed=self.model.config.seed)
        return rows, read("query", self.query_set)

    def read_with_verified(
        self, progress: ProgressFactory = silent, checkpoints: Checkpoints | None = None
    ) -> tuple[Rows, Rows, Learning]:
        """Rows and query, and what a detector learns from: both, or with half of the query."""
        known, model = checkpoints or Checkpoints(), self.model
        if self.query_set is None:
            rows, query = self.read(progress, known)
            return rows, query, Learning(rows, query)

        def read(name: str, cells: Dataset | Chain) -> Rows:
            advance = progress(f"Read {name}", len(distributed.share(len(cells))))
            return model.read_any(cells, *self.sources.columns, advance, known.within(name))

        query = require_rows(read("query", self.query_set))
        if len(query) < FEWEST_HALVED:
            rows = require_rows(read("rows", self.dataset))
            return rows, query, Learning(rows, query)
        verified, left = halve_query(query, model.config.seed)
        together = read("rows", Chain(self.dataset, self.query_set.select(verified.positions)))
        return require_rows(together.first(len(self.dataset))), query, Learning(together, left)

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
            "columns": Columns(image=sources.image_column, text=sources.text_column),
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
                **of_query,
            ),
            "config": config.to_dict(),
            "versions": {"python": platform.python_version(), "hf_ecif": __version__}
            | {p: version(p) for p in PACKAGES},
            "seed": config.seed,
        }

    @cached_property
    def _overlap(self) -> int:
        """Number of images of the query that are also in the data."""
        assert self.query_set is not None
        column = self.sources.image_column
        return len(image_hashes(self.dataset, column) & image_hashes(self.query_set, column))

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


def open_sources(sources: Sources, config: InfluenceConfig) -> Opened:
    """Load the model, the data and the query.

    Raises:
        UserError: one of them cannot be loaded, or lacks a column.
    """
    model = InfluenceModel.from_pretrained(sources.model, config, processor=sources.processor)
    dataset = check_columns(load_rows(sources.dataset, sources.split), *sources.columns)
    query = None
    if sources.query:
        query = check_columns(load_rows(sources.query, sources.query_split), *sources.columns)
    return Opened(sources, model, dataset, query)
