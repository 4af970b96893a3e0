"""Figures of influence: distributions of scores, and how well they predict a retraining.

They have the colours of a light theme on a transparent ground; `hf_ecif.reports.html` puts them
into pages that also have a dark theme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scipy.stats import beta

from hf_ecif.utils.formatting import Bools, Floats, number, share, superscript

INK, MUTED, RULE, KEPT, FLAGGED = "#1d2329", "#5c6671", "#e1ddd3", "#4a7a96", "#c1501b"

BINS = 5  # of verdicts, in a reliability diagram

# Distinguishable without colours, too.
CURVE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": FLAGGED, "marker": "o", "linestyle": "-"},
    {"color": MUTED, "marker": "s", "linestyle": "--"},
    {"color": KEPT, "marker": "^", "linestyle": "-"},
    {"color": INK, "marker": "v", "linestyle": ":"},
    {"color": INK, "marker": "D", "linestyle": "-."},
)


def probability_histogram(probability: Floats, flag: Bools, threshold: float | None) -> Figure:
    """Histogram of the detector's probabilities on a logarithmic scale, with its threshold.

    Args:
        probability: probability of being misaligned, for each scored pair.
        flag: whether the pair was flagged.
        threshold: probability from which a pair is flagged; None draws no line.
    """
    figure, axes = _blank_figure()
    _stacked(axes, probability, flag, np.linspace(0.0, 1.0, 41))
    # A few flagged pairs are to be seen beside many kept ones; a bar of one pair has a height.
    axes.set_yscale("log")
    axes.set_ylim(0.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(int(value))))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10))
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("probability of being misaligned")
    axes.set_ylabel("pairs")
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        side, gap = ("right", -6) if threshold > 0.75 else ("left", 6)
        axes.annotate(
            f"threshold {share(threshold)}",
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
    """Histogram of the influence scores, flagged and kept pairs stacked.

    Scores have long tails. The axis covers the middle 99 %, and its two outermost bars hold
    everything beyond, so that no pair is missing from the figure.

    Args:
        score: influence score of each scored pair.
        flag: whether the pair was flagged.
        exponent: the axis is labelled in units of ten to this power.
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
    """Scatter plot of the two parts of every score, flagged pairs coloured.

    Pairs beyond the middle 99 % of either part are drawn at the border.

    Args:
        positive: influence of each pair as a positive, a match to be learnt.
        negative: influence of each pair as a negative, a contrast for the other pairs.
        flag: whether the pair was flagged.
        exponent: the axes are labelled in units of ten to this power.
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
            alpha=0.85,
            linewidths=0,
            label=name,
            rasterized=True,  # of fixed size, for ten pairs or a million
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
    """Bar chart of the time spent in each stage, in their order.

    Args:
        seconds: seconds by stage. A stage "total" is left out, since it is the sum of the others.
    """
    stages = {name: spent for name, spent in seconds.items() if name != "total"}
    figure, axes = _blank_figure(width=4.0, height=0.35 + 0.3 * len(stages))
    bars = axes.barh(list(stages), list(stages.values()), height=0.62, color=KEPT)
    labels = [f"{number(spent)} s" for spent in stages.values()]
    axes.bar_label(bars, labels, padding=4, color=INK, fontsize=10)
    _leave_bars_alone(axes, room=0.2)
    return figure


def bars_figure(
    values: Mapping[str, float],
    errors: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Bar chart with a bar and a value for each name, from top to bottom.

    Args:
        values: values by name.
        errors: half lengths of the whiskers; none if absent.
        labels: texts of the values.
    """
    figure, axes = _blank_figure(height=0.5 + 0.5 * len(values))
    heights = list(values.values())
    bars = axes.barh(
        list(values), heights, xerr=errors, height=0.6, color=KEPT, ecolor=INK, capsize=2.5
    )
    texts = labels or [number(value) for value in heights]
    axes.bar_label(bars, texts, padding=5, color=INK, fontsize=10)
    _leave_bars_alone(axes, room=0.15)
    return figure


def validation_scatter(predicted: Floats, actual: Floats, caption: str) -> Figure:
    """Scatter plot of true and predicted changes of the query, a point per retraining.

    Args:
        predicted: changes predicted by the scores.
        actual: changes by retraining.
        caption: text above the plot.
    """
    figure, axes = _blank_figure(height=3.4)
    axes.scatter(predicted, actual, s=22, color=KEPT, alpha=0.8, linewidths=0)
    slope, offset = np.polyfit(predicted, actual, 1)
    ends = np.array([predicted.min(), predicted.max()])
    axes.plot(ends, slope * ends + offset, color=MUTED, linewidth=1)
    axes.set_xlabel("predicted change of the query, nats")
    axes.set_ylabel("true change, nats")
    axes.set_title(caption, color=INK, fontsize=10, loc="left")
    return figure


def reliability_figure(
    probability: Floats, wrong: Bools, curve: Callable[[Floats], Floats] | None = None
) -> Figure:
    """Share of wrong pairs among those that a person judged, by what was believed of them.

    Args:
        probability: ``(n,)``, of being misaligned, before any verdicts.
        wrong: ``(n,)``, verdicts.
        curve: from that probability to a calibrated one.
    """
    figure, axes = _blank_figure(height=3.4)
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1.2, label="if beliefs were exact")
    if curve is not None:
        grid = np.linspace(0.005, 0.995, 100)
        axes.plot(grid, curve(grid), color=INK, linestyle="--", linewidth=1.2, label="calibrated")
    bins = np.array_split(np.argsort(probability, kind="stable"), min(BINS, len(wrong)) or 1)
    for number_of, rows in enumerate(bins):
        count, bad = len(rows), int(wrong[rows].sum())
        low, high = beta.ppf([0.05, 0.95], bad + 0.5, count - bad + 0.5)  # Jeffreys
        share = bad / count if count else 0.5
        axes.errorbar(
            probability[rows].mean() if count else 0.5,
            share,
            [[max(share - low, 0)], [max(high - share, 0)]],
            color=FLAGGED,
            marker="o",
            markersize=5,
            capsize=3,
            label="judged, with 90 % intervals" if number_of == 0 else None,
        )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("probability of being misaligned")
    axes.set_ylabel("share judged wrong")
    _legend(axes, columns=3)
    return figure


def removal_figure(shares: Sequence[float], curves: Mapping[str, Floats], label: str) -> Figure:
    """Curves of a measure as more and more pairs are removed.

    Args:
        shares: ``M`` shares of removed pairs.
        curves: the measure by order of removal, ``(M, R)`` with ``R`` refits; bars are the standard
            error of their mean.
        label: name of the measure.
    """
    figure, axes = _blank_figure(height=4.0)
    for (name, values), style in zip(curves.items(), cycle(CURVE_STYLES)):
        count = values.shape[1]
        error = values.std(axis=1, ddof=1) / count**0.5 if count > 1 else None
        percents = [100 * share for share in shares]
        axes.errorbar(
            percents, values.mean(axis=1), error, label=name, capsize=2.5, markersize=5, **style
        )
    axes.set_xlabel("pairs removed, in %")
    axes.set_ylabel(label)
    _legend(axes, columns=min(len(curves), 3))
    return figure


# --- Pieces --------------------------------------------------------------------------------------


def _blank_figure(width: float = 6.0, height: float = 3.3) -> tuple[Figure, Axes]:
    """A figure small enough to be readable at a phone's width, and its axes."""
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


def _leave_bars_alone(axes: Axes, room: float) -> None:
    """Remove scale and frame around horizontal bars with values; the first bar is on top."""
    axes.invert_yaxis()
    axes.margins(x=room)
    axes.grid(visible=False)
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.spines[["bottom", "left"]].set_visible(False)


def _legend(axes: Axes, columns: int = 2) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=columns,
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
    """Range of the middle 99 % of the values, which contains zero and is never empty."""
    low, high = np.quantile(values, (0.005, 0.995))
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    return (low, high) if high > low else (-1.0, 1.0)


def _label(text: str, exponent: int) -> str:
    return f"{text} ({f'10{superscript(exponent)} ' if exponent else ''}nats)"
