"""The report of an audit: what was found, in figures and galleries of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from hf_ecif.pages import inline_svg, thumbnail, write_page
from hf_ecif.viz import probability_histogram, role_scatter, score_histogram, seconds_bars
from hf_ecif.words import Bools, Floats, readable_exponent, shorten

GALLERY_SIZE = 24
CAPTION_LENGTH = 280
REASON_LENGTH = 700


def write_report(scored: datasets.Dataset, summary: dict[str, Any], path: Path) -> None:
    """Writes the report of an audit as one self-contained HTML file.

    Args:
        scored: The audited data set with its influence columns (`ecif_score` and so on), null
            on the rows which could not be read. Images are undecoded cells.
        summary: The summary of the audit, as saved in `summary.json`. Optional parts may be
            absent; what is absent is left out of the page.
        path: Where the page goes. Its folder is created if need be.
    """
    scores = _Scores(scored, summary)
    write_page(
        path,
        "report.html.j2",
        summary=summary,
        scores=scores,
        galleries=list(_galleries(scores)),
        unreadable=[scores.card(row) for row in scores.unreadable_rows[:GALLERY_SIZE]],
        plots=_plots(scores, summary),
        gallery_size=GALLERY_SIZE,
    )


def _plots(scores: _Scores, summary: dict[str, Any]) -> dict[str, Markup]:
    plots: dict[str, Figure] = {}
    if scores.readable.any():
        use = scores.readable
        flag, exponent = scores.flag[use], scores.exponent
        plots["probability"] = probability_histogram(
            scores.probability[use], flag, scores.threshold
        )
        plots["score"] = score_histogram(scores.score[use], flag, exponent)
        plots["roles"] = role_scatter(scores.positive[use], scores.negative[use], flag, exponent)
    if summary.get("seconds"):
        plots["seconds"] = seconds_bars(summary["seconds"])
    return {name: inline_svg(figure, name) for name, figure in plots.items()}


@dataclass(frozen=True)
class _Card:
    """One row of the data set as the page shows it."""

    row: int
    caption: str
    thumbnail: str | None
    problem: str | None
    reason: str | None
    suggestion: str | None
    margin: float
    duplicate: int | None
    flagged: bool
    borderline: bool
    truly_wrong: bool
    probability: float
    score: float
    stderr: float
    positive: float
    negative: float


@dataclass(frozen=True)
class _Gallery:
    """A handful of rows, chosen and ordered by one question."""

    anchor: str
    title: str
    note: str
    nothing: str
    cards: list[_Card]

    @property
    def reach(self) -> float:
        """The largest part of any card: the bars of one gallery share a scale."""
        parts = [abs(part) for card in self.cards for part in (card.positive, card.negative)]
        return max((part for part in parts if math.isfinite(part)), default=0.0) or 1.0


class _Scores:
    """The influence columns as arrays; rows with their images are fetched one by one."""

    def __init__(self, scored: datasets.Dataset, summary: dict[str, Any]) -> None:
        self._scored = scored
        self._image = summary["columns"]["image"]
        self._text = summary["columns"]["text"]
        truth = (summary.get("truth") or {}).get("column")
        self.truth = truth if truth in scored.column_names else None
        self.threshold: float | None = (summary.get("noise") or {}).get("threshold")
        self.score = self._floats("ecif_score")
        self.positive = self._floats("ecif_positive")
        self.negative = self._floats("ecif_negative")
        self.stderr = self._floats("ecif_stderr")
        self.probability = self._floats("ecif_noise_probability")
        self.flag: Bools = self._floats("ecif_flag") == 1.0
        self.borderline: Bools = self._floats("ecif_borderline") == 1.0
        self.margin = self._floats("ecif_suggested_margin")
        self.duplicate = self._floats("ecif_duplicate_group")
        self.readable: Bools = np.isfinite(self.score)
        self._cards: dict[int, _Card] = {}

    @cached_property
    def exponent(self) -> int:
        """Of the unit in which the page states scores."""
        return readable_exponent(self.score[self.readable])

    @cached_property
    def order_of_groups(self) -> Floats:
        """A key that keeps duplicate groups together, the one with the likeliest noise first."""
        here = np.flatnonzero(np.isfinite(self.duplicate))
        _, group = np.unique(self.duplicate[here], return_inverse=True)
        worst = np.zeros(len(here))
        np.maximum.at(worst, group, self.probability[here])
        key = np.full(len(self.duplicate), np.nan)
        key[here] = np.lexsort((group, -worst[group])).argsort()
        return key

    @property
    def unreadable_rows(self) -> list[int]:
        return [int(row) for row in np.flatnonzero(~self.readable)]

    def best(self, among: Bools, key: Floats) -> list[_Card]:
        """The cards of the rows with the smallest keys, smallest first."""
        rows = np.flatnonzero(among & self.readable)
        order = np.argsort(key[rows], kind="stable")[:GALLERY_SIZE]
        return [self.card(int(row)) for row in rows[order]]

    def card(self, row: int) -> _Card:
        if row not in self._cards:
            self._cards[row] = self._read_card(row)
        return self._cards[row]

    def _read_card(self, row: int) -> _Card:
        cells = self._scored[row]
        picture, problem = thumbnail(cells[self._image])
        return _Card(
            row=row,
            caption=shorten(str(cells[self._text] or ""), CAPTION_LENGTH),
            thumbnail=picture,
            problem=problem,
            reason=shorten(str(cells.get("ecif_reason") or ""), REASON_LENGTH) or None,
            suggestion=shorten(str(cells.get("ecif_suggested_text") or ""), CAPTION_LENGTH) or None,
            margin=float(self.margin[row]),
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

    def _floats(self, name: str) -> Floats:
        """A numeric column with not-a-number for null, whatever its type in the data set."""
        if name not in self._scored.column_names:
            return np.full(len(self._scored), np.nan)
        column = self._scored.select_columns([name]).with_format("arrow")[:][name]
        # By way of int8, because Arrow has no direct way from a boolean to a double.
        column = column.cast("int8") if column.type == "bool" else column
        return np.asarray(column.cast("double").to_numpy(), dtype=np.float64)


def _galleries(scores: _Scores) -> Iterator[_Gallery]:
    yield _Gallery(
        "misaligned",
        "Most likely misaligned",
        "Flagged pairs, the most probable first. Start a review here.",
        "No pair was flagged.",
        scores.best(scores.flag, -scores.probability),
    )
    yield _Gallery(
        "harmful",
        "Most harmful",
        "The lowest scores: without these pairs the query's loss should fall the most.",
        "No pair has a negative score.",
        scores.best(scores.score < 0.0, scores.score),
    )
    yield _Gallery(
        "valuable",
        "Most valuable",
        "The highest scores: without these pairs the query's loss should rise the most.",
        "No pair has a positive score.",
        scores.best(scores.score > 0.0, -scores.score),
    )
    if scores.threshold is not None:
        yield _Gallery(
            "borderline",
            "Borderline",
            "Pairs whose uncertainty reaches across the threshold, from either side, the closest "
            "first. A second look pays most here.",
            "No pair is that close to the threshold.",
            scores.best(scores.borderline, np.abs(scores.probability - scores.threshold)),
        )
    duplicates = np.isfinite(scores.duplicate)
    if duplicates.any():
        yield _Gallery(
            "duplicates",
            "Duplicates",
            "Pairs with nearly the same image or the same caption, group by group, those that are "
            "suspected first. They are no negatives of each other, and one of them may be the "
            "right home of the caption.",
            "",
            scores.best(duplicates, scores.order_of_groups),
        )
