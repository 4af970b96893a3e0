"""The report of an audit: one HTML file that needs nothing but a browser.

The page carries its style, its figures (inlined SVG) and its thumbnails (data URIs), runs no
script, and forbids itself any request by a content security policy. It can be mailed, archived
next to the scores, and opened offline.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_ecif.files import write_text

__all__ = [
    "probability_histogram",
    "role_scatter",
    "score_histogram",
    "seconds_bars",
    "write_report",
]

GALLERY_SIZE = 24
THUMBNAIL_SIDE = 160
CAPTION_LENGTH = 280
PROBLEM_LENGTH = 160
REASON_LENGTH = 700

# Figures are drawn in the colours of the light theme. In the page each of these is replaced by
# the style sheet's variable of that name, so that the same drawing follows the reader's theme.
INK, MUTED, RULE, KEPT, FLAGGED = "#1d2329", "#5c6671", "#e1ddd3", "#4a7a96", "#c1501b"
THEME = {INK: "ink", MUTED: "muted", RULE: "rule", KEPT: "kept", FLAGGED: "flagged"}

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def write_report(scored: datasets.Dataset, summary: dict[str, Any], path: Path) -> None:
    """Writes the report of an audit as one self-contained HTML file.

    The page is rendered in full, written aside and renamed: `path` never holds half a report.

    Args:
        scored: The audited data set with its influence columns (`ecif_score` and so on), null
            on the rows which could not be read. Images are undecoded cells.
        summary: The summary of the audit, as saved in `summary.json`. Optional parts may be
            absent; what is absent is left out of the page.
        path: Where the page goes. Its folder is created if need be.
    """
    scores = _Scores(scored, summary)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            scores=scores,
            galleries=list(_galleries(scores)),
            unreadable=[scores.card(row) for row in scores.unreadable_rows[:GALLERY_SIZE]],
            plots=_plots(scores, summary),
            gallery_size=GALLERY_SIZE,
        )
    )
    write_text(page.strip() + "\n", Path(path))


def probability_histogram(probability: Floats, flag: Bools, threshold: float | None) -> Figure:
    """Draws how the detector's probabilities are spread, and where its threshold lies.

    Args:
        probability: Probability that a pair is misaligned, one value for each scored pair.
        flag: Whether the pair was flagged.
        threshold: Probability from which a pair is flagged; None draws no line.
    """
    figure, axes = _blank_figure()
    _stacked(axes, probability, flag, np.linspace(0.0, 1.0, 41))
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("probability of being misaligned")
    axes.set_ylabel("pairs")
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        side, gap = ("right", -6) if threshold > 0.75 else ("left", 6)
        axes.annotate(
            f"threshold {_number(threshold)}",
            (threshold, 0.96),
            xytext=(gap, 0),
            textcoords="offset points",
            xycoords=("data", "axes fraction"),
            ha=side,
            va="top",
            color=INK,
        )
    return figure


def score_histogram(score: Floats, flag: Bools, exponent: int = 0) -> Figure:
    """Draws how the influence scores are spread, flagged and kept pairs stacked.

    Scores have long tails. The axis covers the middle 99 %, and its two outermost bars hold
    everything beyond, so that no pair is missing from the figure.

    Args:
        score: Influence score, one value for each scored pair.
        flag: Whether the pair was flagged.
        exponent: The axis is labelled in units of ten to this power.
    """
    figure, axes = _blank_figure()
    values = score / 10.0**exponent
    low, high = _span(values)
    _stacked(axes, np.clip(values, low, high), flag, np.linspace(low, high, 41))
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_xlabel(_label("influence score", exponent))
    axes.set_ylabel("pairs")
    return figure


def role_scatter(positive: Floats, negative: Floats, flag: Bools, exponent: int = 0) -> Figure:
    """Draws the two parts of every score against each other, flagged pairs coloured.

    Pairs beyond the middle 99 % of either part are drawn at the border.

    Args:
        positive: Influence of the pair as a positive, a match to be learnt.
        negative: Influence of the pair as a negative, a contrast for the other pairs.
        flag: Whether the pair was flagged.
        exponent: The axes are labelled in units of ten to this power.
    """
    figure, axes = _blank_figure(height=4.6)
    horizontal, vertical = positive / 10.0**exponent, negative / 10.0**exponent
    reach_x, reach_y = (max(map(abs, _span(values))) for values in (horizontal, vertical))
    for chosen, colour, name in ((~flag, KEPT, "kept"), (flag, FLAGGED, "flagged")):
        axes.scatter(
            np.clip(horizontal[chosen], -reach_x, reach_x),
            np.clip(vertical[chosen], -reach_y, reach_y),
            s=11,
            color=colour,
            alpha=0.6,
            linewidths=0,
            label=name,
            rasterized=True,  # a picture of fixed size, whether there are ten pairs or a million
        )
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_xlim(-1.08 * reach_x, 1.08 * reach_x)
    axes.set_ylim(-1.25 * reach_y, 1.25 * reach_y)
    axes.set_xlabel(_label("influence as a positive", exponent))
    axes.set_ylabel(_label("as a negative", exponent))
    axes.grid(visible=False)
    _name_quadrants(axes)
    _legend(axes)
    return figure


def seconds_bars(seconds: dict[str, float]) -> Figure:
    """Draws the time spent in each stage, in the order of the stages.

    Args:
        seconds: Seconds by stage. A stage "total" is left out: it is the sum of the others.
    """
    stages = {name: spent for name, spent in seconds.items() if name != "total"}
    figure, axes = _blank_figure(width=4.0, height=0.35 + 0.3 * len(stages))
    bars = axes.barh(list(stages), list(stages.values()), height=0.62, color=KEPT)
    labels = [f"{_number(spent)} s" for spent in stages.values()]
    axes.bar_label(bars, labels, padding=4, color=INK, fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(visible=False)
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.spines[["bottom", "left"]].set_visible(False)
    return figure


def validation_scatter(predicted: Floats, actual: Floats, caption: str) -> Figure:
    """Draws true against predicted changes of the query, a point per retraining.

    Args:
        predicted: By the scores.
        actual: By retraining.
        caption: Above the plot.
    """
    figure, axes = _blank_figure(height=4.2)
    axes.scatter(predicted, actual, s=22, color=KEPT, alpha=0.8, linewidths=0)
    slope, offset = np.polyfit(predicted, actual, 1)
    ends = np.array([predicted.min(), predicted.max()])
    axes.plot(ends, slope * ends + offset, color=MUTED, linewidth=1)
    axes.set_xlabel("predicted change of the query")
    axes.set_ylabel("true change")
    axes.set_title(caption, color=INK, fontsize=10, loc="left")
    return figure


# --- Figures -------------------------------------------------------------------------------------


def _blank_figure(width: float = 6.0, height: float = 3.3) -> tuple[Figure, Axes]:
    """A small figure, so that its letters stay readable on a telephone's width."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots()
    axes.patch.set_alpha(0.0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelsize=10, width=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(RULE)
    axes.xaxis.label.set(color=MUTED, size=10.5)
    axes.yaxis.label.set(color=MUTED, size=10.5)
    return figure, axes


def _stacked(axes: Axes, values: Floats, flag: Bools, edges: Floats) -> None:
    axes.hist(
        [values[~flag], values[flag]],
        bins=edges.tolist(),
        stacked=True,
        color=[KEPT, FLAGGED],
        label=["kept", "flagged"],
        rwidth=0.9,
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        frameon=False,
        labelcolor=INK,
        fontsize=10,
        handlelength=0.9,
        markerscale=1.8,
        handletextpad=0.5,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _name_quadrants(axes: Axes) -> None:
    words = {
        (0.015, 0.985): "wrong match, useful contrast",
        (0.985, 0.985): "useful in both roles",
        (0.015, 0.015): "harmful in both roles",
        (0.985, 0.015): "useful match, harmful contrast",
    }
    for (x, y), text in words.items():
        axes.text(
            x,
            y,
            text,
            transform=axes.transAxes,
            ha="left" if x < 0.5 else "right",
            va="bottom" if y < 0.5 else "top",
            color=MUTED,
            fontsize=10,
            fontstyle="italic",
        )


def _span(values: Floats) -> tuple[float, float]:
    """The range of the middle 99 %, with zero inside and never empty."""
    low, high = np.quantile(values, (0.005, 0.995))
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    return (low, high) if high > low else (-1.0, 1.0)


def _label(text: str, exponent: int) -> str:
    return f"{text} (× 10{_superscript(exponent)})" if exponent else text


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
    return {name: _inline_svg(figure, name) for name, figure in plots.items()}


def _inline_svg(figure: Figure, name: str) -> Markup:
    """Turns a figure into an SVG element which may stand in a page beside others."""
    stream = io.StringIO()
    # Text stays text: it takes the page's fonts, can be searched, and is small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", dpi=200, transparent=True)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Its neighbour, the caption, and a label in the template say what the figure shows.
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


# --- Rows and galleries --------------------------------------------------------------------------


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
        """A power of ten, a multiple of three, in which typical scores are easy to read."""
        sizes = np.abs(self.score[self.readable])
        sizes = sizes[sizes > 0.0]
        if not sizes.size:
            return 0
        power = math.floor(math.log10(float(np.quantile(sizes, 0.9))))
        return 0 if -2 < power < 3 else 3 * math.floor(power / 3)

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
        thumbnail, problem = _thumbnail(cells[self._image])
        return _Card(
            row=row,
            caption=_shorten(str(cells[self._text] or ""), CAPTION_LENGTH),
            thumbnail=thumbnail,
            problem=problem,
            reason=_shorten(str(cells.get("ecif_reason") or ""), REASON_LENGTH) or None,
            suggestion=_shorten(str(cells.get("ecif_suggested_text") or ""), CAPTION_LENGTH)
            or None,
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


def _thumbnail(cell: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """A small copy of an image as a data URI, or None and the reason why there is none."""
    if not cell or not (cell.get("bytes") or cell.get("path")):
        return None, "no image in this row"
    try:
        source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]
        with Image.open(source) as image:
            return _encode(image), None
    except UnidentifiedImageError:
        return None, "not a known image format"
    except FileNotFoundError:
        return None, "file not found"
    except Exception as error:  # decoders of damaged files raise almost anything
        return None, _shorten(f"{error}", PROBLEM_LENGTH) or type(error).__name__


def _encode(image: Image.Image) -> str:
    small: Image.Image = image
    if "transparency" in image.info or image.mode in ("P", "PA", "LA", "RGBA"):
        small = image.convert("RGBA")
    # Before anything else touches the pixels: a JPEG is then decoded at a reduced size.
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small = ImageOps.exif_transpose(small)
    stream = io.BytesIO()
    small.convert("RGBA" if small.mode == "RGBA" else "RGB").save(stream, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


# --- Words and numbers for people ----------------------------------------------------------------


def _number(value: Any) -> str:
    """Three significant digits, thousands separated, tiny and huge values as powers of ten."""
    if value is None or isinstance(value, jinja2.Undefined):
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        mantissa, power = f"{value:.2e}".split("e")
        text = f"{mantissa} × 10{_superscript(int(power))}"
    else:
        text = f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"
    return text.replace("-", "−")


def _percent(value: Any) -> str:
    """A share as a percentage of three significant digits."""
    text = _number(value if value is None or isinstance(value, jinja2.Undefined) else 100.0 * value)
    return text if text == "–" else f"{text} %"


def _estimate(card: _Card, exponent: int) -> str:
    """A score with its standard error, both to the same decimal place."""
    value = card.score / 10.0**exponent
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    decimals = min(max(decimals, 0), 4)
    text = f"{value:,.{decimals}f}"
    if math.isfinite(card.stderr):
        text += f" ± {card.stderr / 10.0**exponent:,.{decimals}f}"
    return text.replace("-", "−")


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


# --- The page ------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_ecif", "templates"),
        autoescape=True,  # captions and column names come from strangers
        undefined=jinja2.ChainableUndefined,  # optional parts of the summary may be absent
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": _number,
        "percent": _percent,
        "estimate": _estimate,
        "superscript": _superscript,
    }
    environment.filters.update(filters)
    return environment
