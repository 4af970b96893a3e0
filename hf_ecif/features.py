"""Rows of a data set to `Features`: read, preprocess, run the frozen part once."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_ecif.data import Pair, read_pair
from hf_ecif.encoders import DualEncoder, Features
from hf_ecif.errors import UserError
from hf_ecif.objectives import sigmoid
from hf_ecif.towers import Inputs


@dataclass(frozen=True)
class Rows:
    """The readable rows of a data set, at the frozen boundary.

    Attributes:
        features: of the ``n`` readable rows.
        positions: ``(n,)``, their row numbers in the data set.
        texts: their captions.
        reasons: why a row could not be read, by row number.
        total: rows of the data set, readable or not.
    """

    features: Features
    positions: Tensor
    texts: list[str]
    reasons: dict[int, str]
    total: int

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, chosen: Tensor) -> Rows:
        """The readable rows with these numbers, as rows of their own."""
        return Rows(
            features=self.features[chosen],
            positions=self.positions[chosen],
            texts=[self.texts[i] for i in chosen.tolist()],
            reasons={},
            total=len(chosen),
        )

    def with_texts_of(self, donors: Tensor) -> Rows:
        """The same images, each with the caption of another row."""
        return Rows(
            features=self.features.with_texts_of(donors),
            positions=self.positions,
            texts=[self.texts[i] for i in donors.tolist()],
            reasons=self.reasons,
            total=self.total,
        )

    @property
    def same_text(self) -> Tensor:
        """``(n,)``, equal numbers for equal captions: false negatives of each other."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(text, len(numbers)) for text in self.texts])


def read_rows(
    dataset: Dataset,
    encoder: DualEncoder,
    processor: Any,
    *,
    image_column: str,
    text_column: str,
    max_pixels: int,
    memory_limit: float = math.inf,
    advance: Callable[[int], None] = lambda rows: None,
) -> Rows:
    """Read and embed up to the frozen boundary, in micro-batches.

    Args:
        dataset: with an image column that is not decoded.
        encoder: its frozen part is run.
        processor: the model's processor.
        image_column: name.
        text_column: name.
        max_pixels: larger images are refused before they are decoded.
        memory_limit: bytes; larger activations are kept in a temporary file, mapped into memory.
        advance: called with the number of rows done, for a progress bar.

    Raises:
        UserError: no row can be read.
    """
    positions, texts = [], []
    reasons: dict[int, str] = {}
    cells = dataset.select_columns([image_column, text_column])
    preprocess = Preprocessor(encoder, processor, lambda: _chunks(cells, text_column))
    store = _Store(len(cells), memory_limit)
    for start in range(0, len(cells), encoder.micro_batch_size):
        chunk = cells[start : start + encoder.micro_batch_size]
        good: list[Pair] = []
        for offset, cell in enumerate(zip(chunk[image_column], chunk[text_column], strict=True)):
            pair = read_pair(*cell, max_pixels)
            if pair.reason is not None:
                reasons[start + offset] = pair.reason
                continue
            good.append(pair)
            positions.append(start + offset)
            texts.append(pair.text)
        if good:
            store.append(encoder.freeze(preprocess(good)))
        advance(len(chunk[text_column]))
    if not texts:
        example = f" The first row: {reasons[0]}." if reasons else ""
        raise UserError(f"None of the {len(cells)} rows can be read.{example}")
    return Rows(store.features(), torch.tensor(positions), texts, reasons, len(cells))


class Preprocessor:
    """Pairs to inputs of the two towers.

    Args:
        encoder: whose inputs are made.
        processor: the model's processor.
        all_texts: iterates over batches of all captions. Where tokens are kept, every row must have
            as many, so the longest is looked for first.
    """

    def __init__(
        self, encoder: DualEncoder, processor: Any, all_texts: Callable[[], Iterator[list[Any]]]
    ) -> None:
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.max_length = min(self.tokenizer.model_max_length, encoder.max_text_length)
        self.dtype = encoder.input_dtype
        self.length: int | None = None
        if encoder.contrastive is sigmoid:  # trained on captions padded to the full length
            self.length = self.max_length
        elif encoder.keeps_tokens(self.tokens(["a"])):
            self.length = max(self._longest(texts) for texts in all_texts())

    def __call__(self, pairs: list[Pair]) -> Features:
        images = self.image_processor(images=[pair.image for pair in pairs], return_tensors="pt")
        return Features(
            text=self.tokens([pair.text for pair in pairs]),
            image={
                key: value.to(self.dtype) if value.is_floating_point() else value
                for key, value in images.items()
            },
        )

    def tokens(self, texts: list[str]) -> Inputs:
        """Inputs of the text tower."""
        tokens = self.tokenizer(
            texts,
            padding="longest" if self.length is None else "max_length",
            max_length=self.length or self.max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {key: tokens[key] for key in self.tokenizer.model_input_names if key in tokens}

    def _longest(self, texts: list[Any]) -> int:
        readable = [text for text in texts if isinstance(text, str)] or [""]
        tokens = self.tokenizer(readable, max_length=self.max_length, truncation=True)
        return max(len(ids) for ids in tokens["input_ids"])


class _Store:
    """Features of many rows, filled in part by part, in memory or in a mapped file."""

    def __init__(self, rows: int, memory_limit: float) -> None:
        self._rows = rows
        self._limit = memory_limit
        self._kept: Features | None = None
        self._filled = 0

    def append(self, part: Features) -> None:
        if self._kept is None:
            self._kept = self._allocate(part)
        rows = slice(self._filled, self._filled + len(part))
        for kept, new in ((self._kept.text, part.text), (self._kept.image, part.image)):
            for key, value in new.items():
                kept[key][rows] = value.cpu()
        self._filled += len(part)

    def features(self) -> Features:
        assert self._kept is not None
        return self._kept[: self._filled]

    def _allocate(self, part: Features) -> Features:
        size = part.bytes_per_row() * self._rows
        empty = _map_empty if size > self._limit else torch.empty
        return Features(
            *(
                {
                    key: empty((self._rows, *value.shape[1:]), dtype=value.dtype)
                    for key, value in side.items()
                }
                for side in (part.text, part.image)
            )
        )


def _map_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a temporary file that is gone as soon as the tensor is."""
    with tempfile.NamedTemporaryFile(prefix="hf_ecif_", delete=False) as file:
        path = Path(file.name)
    try:
        flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
    finally:
        path.unlink()  # the mapping holds the file until the tensor is freed
    return flat.view(shape)


def _chunks(cells: Dataset, column: str, size: int = 1000) -> Iterator[list[Any]]:
    texts = cells.select_columns([column])
    return (texts[i : i + size][column] for i in range(0, len(texts), size))
