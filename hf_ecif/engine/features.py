"""Inputs of the attributed part of a model: rows of tensors, selected and divided by process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_ecif.engine.towers import Inputs, Tower
from hf_ecif.utils import distributed

Side = Literal["text", "image"]

SENT_ROWS = 2**14  # received by every process at a time, of which it keeps those that it asked for


class Features:
    """Inputs of the attributed part: tensors with a row per text or image.

    Texts and images are pairs, row by row, unless a query compares all with all (class prompts and
    images): then their numbers may differ. Selecting rows copies nothing; a micro-batch is copied
    when it is encoded.

    If several processes share the work, each holds either all rows or a part of its own. Rows are
    numbered across processes, and lengths are those of the whole.

    Args:
        text: inputs of the text tower, or activations at its boundary.
        image: inputs of the image tower, or activations at its boundary.
        held: numbers of the rows that are held here, if processes hold parts.
        total: number of rows that all processes hold together, if they hold parts.
    """

    def __init__(
        self, text: Inputs, image: Inputs, held: range | None = None, total: int = 0
    ) -> None:
        part = None if held is None else _Part(held.start, total)
        self._sides: dict[Side, _Chosen] = {
            "text": _Chosen(text, part),
            "image": _Chosen(image, part),
        }

    @property
    def text(self) -> Inputs:
        """Inputs of the text tower for the rows held here."""
        return self._sides["text"].held()[1].rows_at(slice(None))

    @property
    def image(self) -> Inputs:
        """Inputs of the image tower for the rows held here."""
        return self._sides["image"].held()[1].rows_at(slice(None))

    def __len__(self) -> int:
        return self.count("text")

    def __getitem__(self, rows: Tensor | slice) -> Features:
        return self._with({side: chosen.choose(rows) for side, chosen in self._sides.items()})

    def with_texts_of(self, rows: Tensor) -> Features:
        """These images, each with the text of the row given for it."""
        return self._with(self._sides | {"text": self._sides["text"].choose(rows)})

    def paired_with(self, other: Features) -> Features:
        """These texts, with the images of ``other``."""
        return self._with(self._sides | {"image": other._sides["image"]})

    def count(self, side: Side) -> int:
        """Number of texts or images over all processes."""
        return self._sides[side].count()

    def mine(self, side: Side) -> tuple[slice | Tensor, Callable[[slice], Inputs], int]:
        """The texts or images that this process works on.

        Returns:
            Their positions among all, a function that returns a slice of them, and their number.
            Every position belongs to one process.
        """
        positions, chosen = self._sides[side].mine()
        return positions, chosen.rows_at, chosen.count()

    def brought(self, rows: Tensor) -> Features:
        """Features of the given rows, brought here from the processes that hold them.

        All processes must call it together, each with rows of its own choice. Meant for inputs that
        `are_light`.
        """
        return self._with({side: chosen.bring(rows) for side, chosen in self._sides.items()})

    def are_light(self) -> bool:
        """Whether every input is a pooled vector, followed by a head at most."""
        return all(Tower.is_light(chosen.inputs) for chosen in self._sides.values())

    def example(self, side: Side) -> Inputs:
        """Up to two of the rows held here, to read shapes from."""
        return {key: value[:2] for key, value in self._sides[side].inputs.items()}

    def bytes_per_row(self) -> int:
        """Bytes of a row in all inputs together."""
        values = [v for chosen in self._sides.values() for v in chosen.inputs.values()]
        return sum(value.shape[1:].numel() * value.element_size() for value in values)

    @staticmethod
    def _with(sides: dict[Side, _Chosen]) -> Features:
        features = Features({}, {})
        features._sides = sides
        return features


class _Part(NamedTuple):
    """Rows of ``total`` that a process holds, from ``first`` on."""

    first: int
    total: int


@dataclass(frozen=True)
class _Chosen:
    """Selected rows of tensors; all rows if ``rows`` is None, all held here if ``of`` is None."""

    inputs: Inputs
    of: _Part | None = None
    rows: Tensor | None = None

    def count(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        return self._length() if self.of is None else self.of.total

    def choose(self, rows: Tensor | slice) -> _Chosen:
        if self.rows is not None:
            return replace(self, rows=self.rows[rows])
        if isinstance(rows, Tensor):
            return replace(self, rows=rows)
        if self.of is not None:
            return replace(self, rows=torch.arange(self.of.total)[rows])
        return replace(self, inputs={key: value[rows] for key, value in self.inputs.items()})

    def held(self) -> tuple[slice | Tensor, _Chosen]:
        """Positions of the rows held here, and these rows alone."""
        if self.of is None:
            return slice(None), self
        first, last = self.of.first, self.of.first + self._length()
        if self.rows is None:
            return slice(first, last), _Chosen(self.inputs)
        positions = ((self.rows >= first) & (self.rows < last)).nonzero()[:, 0]
        return positions, _Chosen(self.inputs, rows=self.rows[positions] - first)

    def mine(self) -> tuple[slice | Tensor, _Chosen]:
        """Positions and rows to work on; rows that every process holds are divided among them."""
        if self.of is not None or distributed.count() == 1:
            return self.held()
        share = distributed.share(self.count())
        rows = slice(share.start, share.stop)
        return rows, self.choose(rows)

    def bring(self, rows: Tensor) -> _Chosen:
        if self.of is None:
            return self.choose(rows)
        brought = {k: v.new_empty(len(rows), *v.shape[1:]) for k, v in self.inputs.items()}
        for start in range(0, self.count(), SENT_ROWS):
            sent = self.choose(slice(start, start + SENT_ROWS))
            positions, held = sent.held()
            asked = ((rows >= start) & (rows < start + SENT_ROWS)).nonzero()[:, 0]
            for key, value in held.rows_at(slice(None)).items():
                (whole,) = distributed.spread([value], positions, sent.count())
                brought[key][asked] = whole[rows[asked] - start]
        return _Chosen(brought)

    def rows_at(self, positions: slice) -> Inputs:
        """Tensors of the rows at the positions, all of which are held here."""
        chosen = positions if self.rows is None else self.rows[positions]
        return {key: value[chosen] for key, value in self.inputs.items()}

    def _length(self) -> int:
        return len(next(iter(self.inputs.values())))
