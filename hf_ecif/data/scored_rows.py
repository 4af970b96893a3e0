"""The rows of an audit, to be looked at: influence columns as arrays, and single rows as cards."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_ecif.data.images import thumbnail
from hf_ecif.data.parquet_rows import ParquetRows
from hf_ecif.data.summary import Columns, Summary
from hf_ecif.utils.formatting import Bools, Floats, mark, readable_exponent, share, shorten

CAPTION_LENGTH = 280
REASON_LENGTH = 700
WORDS = (
    *("ecif_reason", "ecif_finding"),
    *("ecif_suggested_text", "ecif_original_text", "ecif_wrong_words"),
)


class ScoredRows:
    """The influence columns as arrays; rows with their images are fetched one by one.

    Args:
        scored: rows with influence columns, in memory or in parquet files; images are undecoded
            cells.
        summary: that of the audit.
    """

    def __init__(self, scored: datasets.Dataset | ParquetRows, summary: Summary) -> None:
        self._scored = scored
        self._image = summary.columns.image
        self._text = summary.columns.text
        truth = summary.truth and summary.truth.column
        self.truth = truth if truth in scored.column_names else None
        self.threshold = summary.noise.threshold
        self.score = self._floats("ecif_score")
        self.positive = self._floats("ecif_positive")
        self.negative = self._floats("ecif_negative")
        self.stderr = self._floats("ecif_stderr")
        self.probability = self._floats("ecif_noise_probability")
        self.suspicion = self._floats("ecif_suspicion")
        self.flag: Bools = self._floats("ecif_flag") == 1.0
        self.borderline: Bools = self._floats("ecif_borderline") == 1.0
        self.margin = self._floats("ecif_suggested_margin")
        self.chance = self._floats("ecif_suggested_probability")
        self.duplicate = self._floats("ecif_duplicate_group")
        self.readable: Bools = np.isfinite(self.score)

    @cached_property
    def exponent(self) -> int:
        """Exponent of the unit in which a page states scores."""
        return readable_exponent(self.score[self.readable])

    @property
    def unreadable_rows(self) -> list[int]:
        return [int(row) for row in np.flatnonzero(~self.readable)]

    def order(self, among: Bools, key: Floats) -> list[int]:
        """The readable ones of some rows, those with the smallest keys first."""
        rows = np.flatnonzero(among & self.readable)
        return [int(row) for row in rows[np.argsort(key[rows], kind="stable")]]

    def text(self, row: int) -> str:
        """The caption in full."""
        return str(self._cells(row)[self._text] or "")

    def marked(self, row: int) -> list[tuple[str, bool]]:
        """The caption in full, in parts, and whether the image contradicts each."""
        cells = self._cells(row)
        text = str(cells[self._text] or "")
        return mark(text, _spans(cells), len(text))

    def cell(self, row: int) -> dict[str, Any] | str | None:
        """The image, not decoded; text where embeddings stand for it."""
        if isinstance(self._scored, ParquetRows):
            found = self._scored.value(row, self._image)
        else:
            found = self._scored[row][self._image]
        return {"bytes": found, "path": None} if isinstance(found, bytes) else found

    def card(self, row: int, address: str | None = None) -> Card:
        """A row as a page shows it.

        Args:
            row: number of the row.
            address: where a browser finds the picture; if absent, the card holds a copy.
        """
        cells = self._cells(row)
        picture, problem = (address, None) if address else thumbnail(self.cell(row))
        # Without a probability of being right, as in version 0.1, most suggestions are wrong.
        suggested = cells.get("ecif_suggested_text") if self.suggested[row] else None
        return Card(
            row=row,
            caption=shorten(str(cells[self._text] or ""), CAPTION_LENGTH),
            marked=mark(str(cells[self._text] or ""), _spans(cells), CAPTION_LENGTH),
            thumbnail=picture,
            problem=problem,
            reason=shorten(str(cells.get("ecif_reason") or ""), REASON_LENGTH) or None,
            suggestion=shorten(str(suggested or ""), CAPTION_LENGTH) or None,
            finding=cells.get("ecif_finding"),
            margin=float(self.margin[row]),
            chance=float(self.chance[row]),
            duplicate=int(self.duplicate[row]) if math.isfinite(self.duplicate[row]) else None,
            flagged=bool(self.flag[row]),
            borderline=bool(self.borderline[row]),
            truly_wrong=bool(self.truth and cells[self.truth]),
            probability=float(self.probability[row]),
            score=float(self.score[row]),
            stderr=float(self.stderr[row]),
            positive=float(self.positive[row]),
            negative=float(self.negative[row]),
        )

    def _cells(self, row: int) -> dict[str, Any]:
        """What a card tells in words."""
        if not isinstance(self._scored, ParquetRows):
            return self._scored[row]
        names = (self._text, self.truth, *WORDS)
        here = [name for name in names if name in self._scored.column_names]
        return {name: self._scored.value(row, name) for name in here}

    @cached_property
    def suggested(self) -> Bools:
        """Rows with a caption that fits better, ``(N,)``.

        Without a probability of being right, as in version 0.1, most of them are wrong.
        """
        return np.isfinite(self.chance)

    @cached_property
    def known_wrong(self) -> Bools:
        """Rows that are known to be wrong, ``(N,)``; none where nothing is known."""
        return self._floats(self.truth or "") == 1.0

    def reason(self, row: int) -> str | None:
        """Why the row was flagged, or could not be scored."""
        return str(self._cells(row).get("ecif_reason") or "") or None

    def suggestion(self, row: int) -> str | None:
        """The caption that fits better, in full."""
        if not self.suggested[row]:
            return None
        return str(self._cells(row).get("ecif_suggested_text") or "") or None

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types, with what `datasets` has noted about them."""
        if isinstance(self._scored, ParquetRows):
            return self._scored.schema
        return self._scored.features.arrow_schema

    @property
    def column_names(self) -> list[str]:
        """Names of all columns, in order."""
        return list(self._scored.column_names)

    def column(self, name: str) -> pa.ChunkedArray:
        """All values of a column."""
        if isinstance(self._scored, ParquetRows):
            return self._scored.column(name)
        return self._scored.select_columns([name]).with_format("arrow")[:][name]

    def __len__(self) -> int:
        return len(self._scored)

    def strings(self, name: str) -> NDArray[np.object_]:
        """A column of strings, ``(N,)``; None for null, and where there is no such column."""
        if name not in self._scored.column_names:
            return np.full(len(self._scored), None, dtype=object)
        return np.array(self.column(name).to_pylist(), dtype=object)

    def is_true(self, name: str) -> Bools:
        """Where a boolean column is true, ``(N,)``; nowhere if there is no such column."""
        return self._floats(name) == 1.0

    def captions(self, rows: NDArray[np.int64]) -> list[str]:
        """Captions of some rows, in full."""
        return [text or "" for text in self.column(self._text).take(pa.array(rows)).to_pylist()]

    def _floats(self, name: str) -> Floats:
        """A numeric column with not-a-number for null, whatever its type in the data set."""
        if name not in self._scored.column_names:
            return np.full(len(self._scored), np.nan)
        column = self.column(name)
        # By way of int8, because Arrow has no direct way from a boolean to a double.
        column = column.cast("int8") if column.type == "bool" else column
        return np.asarray(column.cast("double").to_numpy(), dtype=np.float64)


def show_row(cells: dict[str, Any], columns: Columns) -> Shown:
    """A row that is not numbered, for a strip of pictures."""
    picture, problem = thumbnail(cells[columns.image])
    probability = cells.get("ecif_noise_probability")
    return Shown(
        thumbnail=picture,
        problem=problem,
        marked=mark(str(cells[columns.text] or ""), _spans(cells), CAPTION_LENGTH),
        note="" if probability is None else f"{share(probability)} misaligned",
        facts=split_reason(cells.get("ecif_reason") or ""),
    )


@dataclass(frozen=True)
class Shown:
    """A row as a strip of pictures shows it; ``note`` is a figure below its caption."""

    thumbnail: str | None
    problem: str | None
    marked: list[tuple[str, bool]]
    note: str
    facts: list[str]


def _spans(cells: dict[str, Any]) -> list[tuple[int, int]]:
    """Where the words are that the image contradicts; none of a caption that was replaced."""
    if cells.get("ecif_original_text") is not None:
        return []
    return [(word["start"], word["end"]) for word in cells.get("ecif_wrong_words") or []]


@dataclass(frozen=True)
class Card:
    """One row of the data set as a page shows it.

    ``marked`` is the caption in parts, and whether the image contradicts each; a ``suggestion`` is
    right with the probability ``chance``.
    """

    row: int
    caption: str
    marked: list[tuple[str, bool]]
    thumbnail: str | None
    problem: str | None
    reason: str | None
    suggestion: str | None
    finding: str | None
    margin: float
    chance: float
    duplicate: int | None
    flagged: bool
    borderline: bool
    truly_wrong: bool
    probability: float
    score: float
    stderr: float
    positive: float
    negative: float

    @property
    def note(self) -> str:
        """The figure below its picture."""
        known = math.isfinite(self.probability)
        return f"{share(self.probability)} misaligned" if known else f"row {self.row:,}"

    @property
    def facts(self) -> list[str]:
        """What speaks against the pair, one by one, the most telling first."""
        return split_reason(self.reason or "")


def split_reason(reason: str) -> list[str]:
    """Facts of a reason, without the verdict and the probability before them.

    >>> split_reason("probably misaligned (87 %): its caption fits 14 images; its loss is high")
    ['its caption fits 14 images', 'its loss is high']
    """
    without = re.sub(r"\b(probably|possibly) misaligned \([^)]*\): ", "", reason)
    return [fact for fact in without.split("; ") if fact]
