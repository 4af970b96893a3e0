"""A fitted influence as a small function of a batch of rows, for any engine that maps batches.

    scorer = Scorer.from_influence(influence)
    dataset = dataset.cast_column("image", Image(decode=False))
    features = scorer.features(dataset)
    dataset.map(scorer, batched=True, batch_size=scorer.rows, features=features)   # or streaming
    ray.data.from_huggingface(dataset).map_batches(scorer, batch_size=scorer.rows)

A batch is scored on its own: the rows of a batch, in its order, have the same scores in every
engine, process and machine. In another batch a row meets other rows, and its score moves by about
``ecif_stderr``. Rows that are sorted, by class for instance, should be shuffled first. Images are
cast so as not to be decoded, since ``map`` encodes what it has decoded anew: other bytes. The cache
of ``map`` does not look at ``num_proc``: with another number of processes it gives the batches of
the first run, unless ``new_fingerprint`` is given. Ray's ``from_huggingface`` looks through the
working folder: start it in a small one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value
from huggingface_hub.constants import HF_HOME
from PIL import Image

from hf_ecif.data.columns import SCORES
from hf_ecif.errors import UserError
from hf_ecif.influence.columns import REASON
from hf_ecif.influence.influence import Influence, influence_columns
from hf_ecif.influence.rows import Table
from hf_ecif.utils import distributed

_PROCESS = os.getpid()


@dataclass(frozen=True)
class Scorer:
    """Influence columns of a batch of rows; see `hf_ecif.data.columns.COLUMNS` for signs and units.

    It holds names alone, so that it is quickly pickled and hashed; the model is loaded where it is
    used, once in a process.

    Attributes:
        source: folder or Hub id of what `Influence.save_pretrained` wrote.
        fingerprint: fingerprint of the fit; another fit in its place is refused.
        rows: rows of a batch that are well used: several contrastive batches.
        image_column: name; its cells may be undecoded, or images.
        text_column: name.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> scorer = hf_ecif.Scorer.from_influence(model.fit(pairs, demo.query))
        >>> test, features = demo.test, scorer.features(demo.test)
        >>> test.map(scorer, batched=True, batch_size=scorer.rows, features=features).num_rows
        200
    """

    source: str
    fingerprint: str
    rows: int
    image_column: str = "image"
    text_column: str = "text"

    @classmethod
    def from_influence(
        cls,
        influence: Influence,
        folder: str | Path | None = None,
        *,
        image_column: str = "image",
        text_column: str = "text",
    ) -> Scorer:
        """The scorer of a fit.

        Args:
            influence: the fit.
            folder: where `Influence.save_pretrained` puts what the function loads, for other
                machines a shared one; in the cache of Hugging Face if absent, by its fingerprint.
            image_column: name.
            text_column: name.
        """
        path = Path(folder or Path(HF_HOME, "hf_ecif", influence.fingerprint)).absolute()
        if distributed.is_main():
            if folder is None:
                _cache(influence, path)
            else:
                influence.save_pretrained(path)
        rows = 4 * influence.config.batch_size
        return cls(str(path), influence.fingerprint, rows, image_column, text_column)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """New columns of a batch, a value per row; null for a row that cannot be scored.

        Returns:
            The new columns alone. A batch of NumPy arrays, as Ray Data gives, comes back whole,
            since there the result takes its place.
        """
        for name in (self.image_column, self.text_column):
            if name not in batch:
                raise UserError(
                    f"The batch has no column {name!r}, but {', '.join(batch)}. Name the columns: "
                    "Scorer.from_influence(influence, image_column=..., text_column=...)."
                )
        with distributed.alone():
            columns = self._columns(batch)
        if not isinstance(batch[self.text_column], np.ndarray):
            return columns
        arrays = {name: np.array(columns[name], dtype=np.float32) for name in SCORES}
        reasons = np.array(columns[REASON], dtype=object)
        return {**batch, **arrays, REASON: reasons}

    def features(self, dataset: Dataset | IterableDataset) -> Features:
        """Types of all columns once ``dataset`` is scored, for the ``features`` of ``map``."""
        known: dict[str, Any] = dataset.features or {}
        scores = {name: Value("float32") for name in SCORES}
        return Features(**{**known, **scores, REASON: Value("string")})

    def _columns(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        influence = _load(self.source, self.fingerprint)
        images = [as_cell(value) for value in batch[self.image_column]]
        texts = [None if text is None else str(text) for text in batch[self.text_column]]
        table = Table({self.image_column: images, self.text_column: texts})
        rows = influence.model.read_any(table, self.image_column, self.text_column)
        return influence_columns(influence, rows)


def _cache(influence: Influence, folder: Path) -> None:
    """Save into a folder that is named by the fingerprint, and so never changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as aside:
        influence.save_pretrained(Path(aside, "fit"))
        with suppress(OSError):  # it is there already, whole
            Path(aside, "fit").rename(folder)


@lru_cache(maxsize=2)
def _load(source: str, fingerprint: str) -> Influence:
    if os.getpid() != _PROCESS:  # a fork cannot use the threads of its parent
        torch.set_num_threads(1)
    influence = Influence.from_pretrained(source)
    if influence.fingerprint != fingerprint:
        raise UserError(f"{source} holds another fit by now: make the scorer again.")
    return influence


def as_cell(value: Any) -> Any:
    """An image as `hf_ecif.data.images.read_pair` takes it."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    return Image.fromarray(value) if isinstance(value, np.ndarray) else value
