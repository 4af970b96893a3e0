"""Rows of a data set to `Features`: read, preprocess, run the frozen part once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_ecif.data import Pair, read_pair
from hf_ecif.encoders import DualEncoder, Features
from hf_ecif.errors import UserError


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
        advance: called with the number of rows done, for a progress bar.

    Raises:
        UserError: no row can be read.
    """
    parts, positions, texts = [], [], []
    reasons: dict[int, str] = {}
    cells = dataset.select_columns([image_column, text_column])
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
            parts.append(encoder.freeze(preprocess(good, encoder, processor)))
        advance(len(chunk[text_column]))
    if not parts:
        example = f" The first row: {reasons[0]}." if reasons else ""
        raise UserError(f"None of the {len(cells)} rows can be read.{example}")
    return Rows(Features.cat(parts), torch.tensor(positions), texts, reasons, len(cells))


def preprocess(pairs: list[Pair], encoder: DualEncoder, processor: Any) -> Features:
    """Inputs of the two towers. Texts are padded to the model's length only if they are kept."""
    images = processor.image_processor(images=[pair.image for pair in pairs], return_tensors="pt")
    texts = processor.tokenizer(
        [pair.text for pair in pairs],
        padding="longest" if encoder.frozen else "max_length",
        max_length=encoder.max_text_length,
        truncation=True,
        return_tensors="pt",
    )
    dtype = encoder.theta.dtype
    return Features(
        text={key: texts[key] for key in ("input_ids", "attention_mask")},
        image={"pixel_values": images["pixel_values"].to(dtype)},
    )
