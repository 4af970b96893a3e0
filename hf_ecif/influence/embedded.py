"""Rows whose embeddings were made elsewhere: looked up, and not decoded and tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_ecif.data.embeddings import Vectors, is_placeholder, is_reference, read_vectors
from hf_ecif.engine.features import Features
from hf_ecif.engine.towers import Inputs
from hf_ecif.influence.keys import Keys, caption_key, content_key
from hf_ecif.models.embeddings import INPUT


class EmbeddedPreprocessor:
    """References and captions to inputs of the two towers of an `EmbeddingModel`.

    Args:
        width: size of the embeddings that the model takes.
        dtype: dtype of its inputs.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width = width
        self.dtype = dtype

    def blank(self) -> Features:
        """Inputs of one row, which show their shapes."""
        ones = torch.ones(1, self.width, dtype=self.dtype)
        return Features({INPUT: ones}, {INPUT: ones})

    def read(
        self, cells: Sequence[Any], texts: Sequence[str | None]
    ) -> tuple[Features | None, Keys | None, list[int], dict[int, str]]:
        """Inputs and keys of the rows that have all they need.

        Args:
            cells: references, or cells of images that hold them as paths.
            texts: captions.

        Returns:
            Inputs and keys; the places of these rows; and why others cannot be read, by place.
        """
        references = [_reference_of(cell) for cell in cells]
        known = [place for place, reference in enumerate(references) if reference is not None]
        reasons = dict.fromkeys(range(len(cells)), "embedding missing")
        if not known:
            return None, None, [], reasons
        images, captions = read_vectors([str(references[place]) for place in known])
        for number, place in enumerate(known):
            reasons[place] = (
                _problem("image", images[number])
                or _problem("text", captions[number])
                or _missing(texts[place])
            )
        good = [number for number, place in enumerate(known) if not reasons[place]]
        places = [known[number] for number in good]
        reasons = {place: reason for place, reason in reasons.items() if reason}
        if not places:
            return None, None, [], reasons
        images, captions = images[good], captions[good]
        features = Features(text=self._inputs(captions), image=self._inputs(images))
        return features, _keys(images, captions, [str(texts[p]) for p in places]), places, reasons

    def _inputs(self, side: Vectors) -> Inputs:
        return {INPUT: torch.from_numpy(side).to(self.dtype)}


def _reference_of(cell: Any) -> str | None:
    found = cell.get("path") if isinstance(cell, dict) else cell
    return found if is_reference(found) else None


def _problem(what: str, vector: NDArray[Any]) -> str:
    if not np.isfinite(vector).all():
        return f"embedding of the {what} holds NaN or infinite values"
    return "" if vector.any() else f"embedding of the {what} is zero"


def _missing(text: str | None) -> str:
    if text is None:
        return "caption missing"
    return "" if text.strip() else "caption empty"


def _keys(images: Vectors, captions: Vectors, texts: Sequence[str]) -> Keys:
    """Images are known by their embeddings; captions by their words, where these are there."""
    none = torch.zeros(len(texts), dtype=torch.bool)
    return Keys(
        images=torch.tensor([content_key(vector.tobytes()) for vector in images]),
        captions=torch.tensor(
            [
                content_key(vector.tobytes()) if is_placeholder(text) else caption_key(text)
                for text, vector in zip(texts, captions, strict=True)
            ]
        ),
        truncated=none,
        unknown_script=none,
    )
