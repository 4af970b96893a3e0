"""The report of an audit: what was found, in figures and galleries of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from hf_ecif.data.scored_rows import Card, ScoredRows
from hf_ecif.data.summary import Summary
from hf_ecif.reports.figures import (
    probability_histogram,
    role_scatter,
    score_histogram,
    seconds_bars,
)
from hf_ecif.reports.findings import find_examples
from hf_ecif.reports.html import Strip, about, inline_svg, render_page
from hf_ecif.reports.steps import after_audit
from hf_ecif.utils.files import write_text
from hf_ecif.utils.formatting import Bools, Floats

GALLERY_SIZE = 24
STRIP = 8  # pictures on the first screen
PLOTS = ("probability", "score", "roles", "seconds")


def write_report(scored: datasets.Dataset, summary: Summary, path: Path) -> None:
    """Write what `render_report` gives to a file, whose folder is created if need be."""
    write_text(render_report(scored, summary), path)


def render_report(scored: datasets.Dataset, summary: Summary) -> str:
    """The report of an audit as one self-contained HTML page.

    Args:
        scored: The audited data set with its influence columns (`ecif_score` and so on), null
            on the rows which could not be read. Images are undecoded cells.
        summary: What the audit found; parts that are None are left out of the page.
    """
    scores = ScoredRows(scored, summary)
    return render_page(
        "report.html.j2",
        summary=summary,
        about=about(summary),
        scores=scores,
        strip=_strip(scores, summary),
        steps=list(after_audit(summary)),
        galleries=list(_galleries(scores, summary)),
        findings=find_examples(scores, summary),
        plots=_plots(scores, summary),
        gallery_size=GALLERY_SIZE,
    )


def render_brief(summary: Summary) -> str:
    """An audit in a few lines of HTML, as a notebook shows it."""
    return render_page("brief.html.j2", summary=summary)


def _plots(scores: ScoredRows, summary: Summary) -> dict[str, Markup | None]:
    plots: dict[str, Figure] = {}
    if scores.readable.any():
        use = scores.readable
        flag, exponent = scores.flag[use], scores.exponent
        of_groups = summary.groups and summary.groups.table
        if np.isfinite(scores.probability[use]).any():  # it is given unless the audit abstains
            plots["probability"] = probability_histogram(
                scores.probability[use], flag, None if of_groups else scores.threshold
            )
        plots["score"] = score_histogram(scores.score[use], flag, exponent)
        plots["roles"] = role_scatter(scores.positive[use], scores.negative[use], flag, exponent)
    if summary.seconds:
        plots["seconds"] = seconds_bars(summary.seconds)
    drawn = {name: inline_svg(figure, name) for name, figure in plots.items()}
    return dict.fromkeys(PLOTS) | drawn


@dataclass(frozen=True)
class _Gallery:
    """A handful of rows, chosen and ordered by one question."""

    anchor: str
    title: str
    note: str
    nothing: str
    cards: list[Card]

    @property
    def reach(self) -> float:
        """The largest part of any card: the bars of one gallery share a scale."""
        parts = [abs(part) for card in self.cards for part in (card.positive, card.negative)]
        return max((part for part in parts if math.isfinite(part)), default=0.0) or 1.0


def _strip(scores: ScoredRows, summary: Summary) -> Strip | None:
    """Pictures for the first screen: the likeliest misaligned pairs, or those that fit least."""
    if summary.noise.abstains:
        rows, title = scores.order(scores.readable, -scores.suspicion), "What fits least"
        count = len(rows)
    else:
        rows, title = scores.order(scores.flag, -scores.probability), "Most likely misaligned"
        count = summary.flagged
    return Strip(title, [scores.card(row) for row in rows[:STRIP]], count) if rows else None


def _cards(scores: ScoredRows, among: Bools, key: Floats) -> list[Card]:
    return [scores.card(row) for row in scores.order(among, key)[:GALLERY_SIZE]]


def _galleries(scores: ScoredRows, summary: Summary) -> Iterator[_Gallery]:
    if summary.noise.abstains:
        yield _Gallery(
            "misaligned",
            "What fits least",
            "The pairs in the order in which they look misaligned to this model. None is flagged: "
            "the order is little better than chance here.",
            "No pair could be read.",
            _cards(scores, scores.readable, -scores.suspicion),
        )
    else:
        yield _Gallery(
            "misaligned",
            "Most likely misaligned",
            "Flagged pairs, the most probable first. Start a review here.",
            "No pair was flagged.",
            _cards(scores, scores.flag, -scores.probability),
        )
    yield _Gallery(
        "harmful",
        "Most harmful",
        "The lowest scores: without these pairs the query's loss should fall the most.",
        "No pair has a negative score.",
        _cards(scores, scores.score < 0.0, scores.score),
    )
    yield _Gallery(
        "valuable",
        "Most valuable",
        "The highest scores: without these pairs the query's loss should rise the most.",
        "No pair has a positive score.",
        _cards(scores, scores.score > 0.0, -scores.score),
    )
    yield _Gallery(
        "borderline",
        "Borderline",
        "Pairs whose uncertainty reaches across the threshold, from either side, the closest "
        "first. Look at these twice.",
        "No pair is that close to the threshold.",
        _cards(scores, scores.borderline, np.abs(scores.probability - scores.threshold)),
    )
