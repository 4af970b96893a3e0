"""Rows that leave an audit: which of them, how often, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, Image
from numpy.typing import NDArray

from hf_ecif.data.cleaning import WEIGHT
from hf_ecif.data.summary import Columns
from hf_ecif.errors import UserError
from hf_ecif.utils.formatting import Bools

ROW = "row"  # column and field of a row's number in the audit
BATCH = 100  # rows held at a time


@dataclass(frozen=True)
class ExportRows:
    """Rows to write.

    Attributes:
        dataset: the rows, images not decoded.
        numbers: ``(n,)``, their numbers in the audit; a row that is repeated has one number.
        kept: ``(n,)``, whether each is kept.
        columns: names of the columns of images and captions.
        are_numbered: whether the audit's numbers are known; else they count these rows.
        is_sample: whether they were drawn for a person to judge, who must not see verdicts.
        id_column: column of names of the rows, if one was given.
        repeats: copies of a row of weight 1; 0 where rows are not repeated.
    """

    dataset: Dataset
    numbers: NDArray[np.int64]
    kept: Bools
    columns: Columns
    are_numbered: bool = True
    is_sample: bool = False
    id_column: str | None = None
    repeats: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.dataset.column_names)

    def select(self, chosen: NDArray[np.int64]) -> ExportRows:
        """Some of the rows, in this order."""
        return replace(
            self,
            dataset=self.dataset.select(chosen),
            numbers=self.numbers[chosen],
            kept=self.kept[chosen],
        )

    def repeated(self) -> ExportRows:
        """Every row as often as its weight says: ``round(repeats * weight)`` times.

        Raises:
            UserError: the rows have no weights.
        """
        if not self.repeats:
            return self
        if WEIGHT not in self.names:
            raise UserError(
                f"`repeats={self.repeats}` repeats rows by {WEIGHT!r}, which they do not have. "
                "Export what `clean` wrote with `strategy=weight`."
            )
        weights = np.array(self.column(WEIGHT), dtype=float)
        copies = np.rint(self.repeats * weights).astype(int)
        return self.select(np.repeat(np.arange(len(self)), copies))

    def column(self, name: str) -> list[Any]:
        """The values of a column that is no image's."""
        return list(self.dataset.with_format(None)[name][:])

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and cells of each row, images not decoded."""
        place = 0
        for batch in self.dataset.with_format("arrow").iter(batch_size=BATCH):
            for cells in batch.to_pylist():
                yield int(self.numbers[place]), cells
                place += 1

    @property
    def has_pictures(self) -> bool:
        """Whether there are images; of pairs that were embedded elsewhere, there are none."""
        return isinstance(self.dataset.features[self.columns.image], Image)

    @property
    def image_columns(self) -> list[str]:
        """Columns of images, the audited one or others."""
        kinds = self.dataset.features
        return [name for name, kind in kinds.items() if isinstance(kind, Image)]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        rows: number of rows, or of their copies.
        files: the files, or their folder, below the output.
        opens: how to open them: a command, or lines of Python.
        notes: what a reader must know.
    """

    rows: int
    files: list[str]
    opens: str
    notes: list[str] = field(default_factory=list)


class Target(Protocol):
    """Writes rows into a folder that is there and empty."""

    def __call__(self, rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
        """What was written; ``advance`` is called with the number of rows done."""
        ...
