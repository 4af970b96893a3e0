"""The fitted influence as a small function of a batch of rows, for any engine that maps batches.

    scorer = model.scorer()
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
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value
from PIL import Image

from hf_ecif import processes
from hf_ecif.columns import SCORES, score_columns
from hf_ecif.errors import UserError
from hf_ecif.features import Rows, Table
from hf_ecif.influence import InfluenceModel

REASON = "ecif_reason"
_PROCESS = os.getpid()


@dataclass(frozen=True)
class Scorer:
    """Influence columns of a batch of rows; see `hf_ecif.columns.COLUMNS` for signs and units.

    It holds names alone, so that it is quickly pickled and hashed; the model is loaded where it is
    used, once in a process.

    Attributes:
        source: folder or Hub id of what `InfluenceModel.save_pretrained` wrote.
        fingerprint: of the fit; another fit in its place is refused.
        rows: rows of a batch that are well used: several contrastive batches.
        image_column: name; its cells may be undecoded, or images.
        text_column: name.
    """

    source: str
    fingerprint: str
    rows: int
    image_column: str = "image"
    text_column: str = "text"

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
                    "scorer(image_column=..., text_column=...)."
                )
        with processes.alone():
            columns = self._columns(batch)
        if not isinstance(batch[self.text_column], np.ndarray):
            return columns
        arrays = {name: np.array(columns[name], dtype=np.float32) for name in SCORES}
        reasons = np.array(columns[REASON], dtype=object)
        return {**batch, **arrays, REASON: reasons}

    def features(self, dataset: Dataset | IterableDataset) -> Features:
        """Types of all columns once ``dataset`` is scored, for the ``features`` of ``map``."""
        scores = {name: Value("float32") for name in SCORES}
        return Features({**dataset.features, **scores, REASON: Value("string")})

    def _columns(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        model = _load(self.source, self.fingerprint)
        images = [_as_cell(value) for value in batch[self.image_column]]
        texts = [None if text is None else str(text) for text in batch[self.text_column]]
        table = Table({self.image_column: images, self.text_column: texts})
        return scored_columns(model, model.read_any(table, self.image_column, self.text_column))


def scored_columns(model: InfluenceModel, rows: Rows) -> dict[str, list[Any]]:
    """The scores of rows as columns, and why a row has none."""
    every = range(rows.total)
    if len(set(rows.texts)) > 1:
        given = model.score_as_given(rows)
        scores = score_columns(rows, model.score(rows), given, model.config.relative)
        return scores | {REASON: [rows.reasons.get(row) for row in every]}
    alone = "no other caption in its batch to compare it with"
    nothing: list[Any] = [None] * rows.total
    return dict.fromkeys(SCORES, nothing) | {
        REASON: [rows.reasons.get(row, alone) for row in every]
    }


@lru_cache(maxsize=2)
def _load(source: str, fingerprint: str) -> InfluenceModel:
    if os.getpid() != _PROCESS:  # a fork cannot use the threads of its parent
        torch.set_num_threads(1)
    model = InfluenceModel.from_pretrained(source)
    if model.fitted is None:
        raise UserError(f"{source} holds no fitted influence: give what save_pretrained wrote.")
    if model.fingerprint != fingerprint:
        raise UserError(f"{source} holds another fit by now: make the scorer again.")
    return model


def _as_cell(value: Any) -> Any:
    """An image as `hf_ecif.data.read_pair` takes it."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    return Image.fromarray(value) if isinstance(value, np.ndarray) else value
