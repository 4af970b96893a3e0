"""Page of a valuation: pairs that help and hurt, by slice, and candidates to add."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from markupsafe import Markup

from hf_ecif.data.images import thumbnail
from hf_ecif.data.scored_rows import Shown
from hf_ecif.data.summary import Columns, ConflictFacts, Curves, Entry, Rankings, ValueSummary
from hf_ecif.reports.figures import removal_figure
from hf_ecif.reports.html import Strip, about, inline_svg, write_page
from hf_ecif.reports.steps import after_value
from hf_ecif.utils.formatting import estimate, readable_exponent, shorten, superscript

CAPTION_LENGTH = 280
STRIP = 8  # pictures on the first screen
SHOWN_SLICES = 12  # largest number of slices whose rankings are shown
HARM = ("Most harmful", "Most valuable")
WORTH = ("Most worth having", "Better left out")
MEASURES = (("losses", "Loss", "loss, in nats"), ("recalls", "Recall at 1", "recall at 1"))


def write_value_page(
    summary: ValueSummary, dataset: Dataset, candidates: Dataset | None, path: Path
) -> None:
    """Write one self-contained HTML file.

    Args:
        summary: summary from `hf_ecif.applications.value.run_value`.
        dataset: the valued rows, images undecoded.
        candidates: the candidates, images undecoded; None if there are none.
        path: file of the page.
    """
    cards = _Cards(dataset, summary.columns)
    slices = [
        (one.name, list(_galleries(cards, one.rankings, HARM)))
        for one in summary.slices[: SHOWN_SLICES + 1]
    ]
    bought: list[_Gallery] = []
    if candidates is not None and summary.candidates is not None:
        market, rankings = _Cards(candidates, summary.columns), summary.candidates.rankings
        bought = list(_galleries(market, rankings, WORTH, effect="if added"))
    write_page(
        path,
        "value.html.j2",
        summary=summary,
        about=about(summary),
        strip=_strip(slices[0][1][0], summary.clearly_harmful),
        steps=list(after_value(summary)),
        whole=slices[0][1],
        slices=slices[1:],
        conflicts=_conflicts(cards, summary.conflicts),
        bought=bought,
        plots=list(_plots(summary.curves)),
    )


@dataclass(frozen=True)
class _Effect:
    """A named value of a pair, in nats, with its standard error."""

    name: str
    score: float
    stderr: float


@dataclass(frozen=True)
class _Card:
    """A pair as the page shows it; ``effects`` are named values with their errors."""

    row: int
    caption: str
    thumbnail: str | None
    problem: str | None
    effects: list[_Effect]
    positive: float
    negative: float


@dataclass(frozen=True)
class _Gallery:
    """Pairs of one ranking; values are in units of ten to ``exponent``."""

    title: str
    cards: list[_Card]
    exponent: int

    @property
    def notes(self) -> list[str]:
        """The figure of each card, for a strip of pictures."""
        unit = f" × 10{superscript(self.exponent)}" if self.exponent else ""
        values = (card.effects[0] for card in self.cards)
        return [estimate(one.score, one.stderr, self.exponent) + f"{unit} nats" for one in values]

    @property
    def reach(self) -> float:
        """Largest part of any card, which is the scale of all bars in the gallery."""
        parts = (abs(part) for card in self.cards for part in (card.positive, card.negative))
        return max(parts, default=0.0) or 1.0


def _strip(gallery: _Gallery, count: int) -> Strip | None:
    """Pictures for the first screen: the most harmful pairs."""
    cards = [
        Shown(card.thumbnail, card.problem, [(card.caption, False)], note, [])
        for card, note in zip(gallery.cards[:STRIP], gallery.notes, strict=False)
    ]
    return Strip(gallery.title, cards, max(count, len(cards))) if cards else None


class _Cards:
    """Makes cards from entries, and every picture only once."""

    def __init__(self, dataset: Dataset, columns: Columns) -> None:
        self._dataset, self._columns = dataset, columns
        self._pictures: dict[int, tuple[str, str | None, str | None]] = {}

    def gallery(self, title: str, entries: list[Entry], effect: str) -> _Gallery:
        cards = [self.card(e, [_Effect(effect, e.score, e.stderr)]) for e in entries]
        return _Gallery(title, cards, _exponent(entry.score for entry in entries))

    def card(self, entry: Entry, effects: list[_Effect]) -> _Card:
        row = entry.row
        if row not in self._pictures:
            cells = self._dataset[row]
            caption = shorten(str(cells[self._columns.text] or ""), CAPTION_LENGTH)
            self._pictures[row] = (caption, *thumbnail(cells[self._columns.image]))
        return _Card(row, *self._pictures[row], effects, entry.positive, entry.negative)


def _galleries(
    cards: _Cards,
    rankings: Rankings,
    titles: tuple[str, str],
    effect: str = "score",
) -> Iterator[_Gallery]:
    for title, entries in zip(titles, (rankings.lowest, rankings.highest), strict=True):
        yield cards.gallery(title, entries, effect)


def _conflicts(cards: _Cards, conflicts: list[ConflictFacts]) -> _Gallery:
    """Pairs with the slices that they help and hurt; bars belong to the slice they help."""
    sides = [(one.helps, one.hurts) for one in conflicts]
    made = [
        cards.card(pair[0], [_Effect(side.slice, side.score, side.stderr) for side in pair])
        for pair in sides
    ]
    values = (side.score for pair in sides for side in pair)
    return _Gallery("Helps one slice, hurts another", made, _exponent(values))


def _exponent(values: Iterable[float]) -> int:
    return readable_exponent(np.array(list(values), dtype=np.float64))


def _plots(curves: Curves | None) -> Iterator[tuple[str, Markup]]:
    """Title and figure for every measure of the removal curves."""
    if curves is None:
        return
    shares = curves.curves[0].shares
    for name, title, label in MEASURES:
        values = {curve.name: np.array(getattr(curve, name)) for curve in curves.curves}
        yield title, inline_svg(removal_figure(shares, values, label), name)
