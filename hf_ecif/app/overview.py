"""First tab: number of flagged pairs by threshold, and distribution of the scores."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr
import numpy as np
import pandas as pd

from hf_ecif.app.html import PICK, render
from hf_ecif.app.selection import Audit, Span, open_audit
from hf_ecif.app.session import (
    REDRAW,
    Session,
    keep_threshold,
    picture_address,
    read_review,
    review_row,
)
from hf_ecif.data.summary import Summary
from hf_ecif.reports.steps import after_audit
from hf_ecif.utils.formatting import number, share, superscript

BINS = 40
MOST_POINTS = 4000  # largest number in a scatter plot, for the browser's sake
SHOWN = 16
HEIGHT = 340
UNKNOWN = "No probability of being misaligned can be given: the model cannot tell."
FITS_LEAST = "<p>What fits least by this model, whose order is little better than chance here:</p>"
BASE, DRAWN = 256, 240  # of the histogram: its lower edge, and its height
WORDS = {"keep": "keep", "remove": "remove", "recaption": "new caption", "unsure": "not sure"}
COLOURS = {"kept": "#4a7a96", "flagged": "#c1501b"}


# The marks of a drawing are pictures to a screen reader, and Gradio leaves them without a name.
NAME_MARKS = """
const nameless = '[role^=graphics-]:not([aria-label]), [role^=graphics-][aria-label=""]';
function name() {
  document.getElementById('overview-scatter')?.querySelectorAll(nameless).forEach(mark =>
    mark.setAttribute('aria-label', 'Pairs by their influence as a positive and as a negative'));
}
new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
name();
"""


class Overview(NamedTuple):
    """Values of the tab's components, in the order of `outputs`."""

    notes: str
    tiles: str
    histogram: str
    scatter: gr.ScatterPlot
    picked: str
    clear: gr.Button
    cards: str


def build(session: Session, tab: gr.Tab) -> None:
    """Lay out the tab and connect it; whoever comes back to it sees what was decided since."""
    notes = gr.HTML(elem_id="overview-notes")
    tiles = gr.HTML(elem_id="overview-tiles")
    with gr.Row(elem_classes="bar"):
        session.threshold.render()
        reset = gr.Button("Reset to the audit's", size="sm", scale=0, min_width=160)
    gr.HTML(render("legend", entries=COLOURS))
    with gr.Row():
        histogram = gr.HTML(elem_id="overview-histogram")
        scatter = gr.ScatterPlot(
            x="positive",
            y="negative",
            color="what",
            color_map=COLOURS,
            x_title="influence as a positive",
            y_title="as a negative",
            colors_in_legend=[],
            label="Influence in both roles: drag to select pairs",
            height=HEIGHT,
            elem_classes="figure",
            elem_id="overview-scatter",
        )
    with gr.Row(elem_classes="bar"):
        picked = gr.HTML(js_on_load=NAME_MARKS, elem_id="overview-picked")
        clear = gr.Button("Clear the selection", size="sm", scale=0, min_width=160)
    cards = gr.HTML(js_on_load=PICK, elem_id="overview-cards")

    inputs = [session.folder, session.reviews, session.threshold, session.span]
    outputs = [notes, tiles, histogram, scatter, picked, clear, cards]
    changes = [*session.changed, session.threshold.change, session.span.change, tab.select]
    gr.on(changes, show, inputs, outputs, **REDRAW)
    session.threshold.input(
        keep_threshold,
        [session.folder, session.reviews, session.threshold],
        session.reviews,
        **REDRAW,
    )
    reset.click(go_back, [session.folder, session.reviews], [session.threshold, session.reviews])
    clear.click(lambda: None, None, session.span)
    scatter.select(brushed, session.folder, session.span)
    cards.select(review_row, None, [session.row, session.tabs])


def show(folder: str, reviews: str | None, threshold: float, span: Span | None) -> Overview:
    """Values of the tab for an audit at a threshold."""
    audit = open_audit(folder)
    review = read_review(reviews, audit)
    flags = audit.flags(threshold)
    rows = audit.pick("flagged", threshold, review, span)
    if abstains := audit.summary.noise.abstains:
        rows = audit.rows.order(audit.rows.readable, -audit.rows.suspicion)
    values = {
        "summary": audit.summary,
        "flagged": int(flags.sum()),
        "kept": int((~flags & audit.rows.readable).sum()),
        "borderline": int(audit.borderline(threshold).sum()),
        "decided": len(review.current),
        "threshold": threshold,
    }
    return Overview(
        _say_notes(audit.summary),
        render("tiles", **values),
        render("nothing", text=UNKNOWN)
        if abstains
        else draw_histogram(histogram_table(audit, threshold), threshold),
        _draw_scatter(audit, threshold),
        FITS_LEAST if abstains else _say_picked(len(rows), span),
        gr.Button(visible=span is not None),
        render(
            "cards",
            cards=[audit.rows.card(row, picture_address(reviews, row)) for row in rows[:SHOWN]],
            decisions=review.current,
            words=WORDS,
            chosen=None,
            shows=None,
            nothing="No pair is flagged here. Lower the threshold to flag more.",
        ),
    )


def go_back(folder: str, reviews: str | None) -> tuple[float, str | None]:
    """The audit's threshold, and the decisions without another one."""
    own = open_audit(folder).threshold
    return own, keep_threshold(folder, reviews, own)


def histogram_table(audit: Audit, threshold: float) -> pd.DataFrame:
    """Number of kept and of flagged pairs per bin of the probability."""
    flags, readable = audit.flags(threshold), audit.rows.readable
    edges = np.linspace(0, 1, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    parts = []
    for what, chosen in (("kept", readable & ~flags), ("flagged", readable & flags)):
        pairs, _ = np.histogram(audit.rows.probability[chosen], edges)
        parts.append(pd.DataFrame({"probability": centres, "pairs": pairs, "what": what}))
    return pd.concat(parts, ignore_index=True)


def draw_histogram(table: pd.DataFrame, threshold: float) -> str:
    """HTML of the histogram, on a logarithmic scale: a few flagged pairs are seen beside many."""
    top = max(int(table["pairs"].groupby(table["probability"]).sum().max()), 10)
    # A bar of one pair has a height, and one of none has none.
    height = {0: 0.0} | {n: 1.0 + np.log10(n) for n in table["pairs"].unique() if n}
    scale = DRAWN / (1.0 + np.log10(top))
    bars = []
    for _, what, probability, pairs in table[["what", "probability", "pairs"]].itertuples():
        tall = scale * height[pairs]
        low, high = probability - 0.5 / BINS, probability + 0.5 / BINS
        told = f"{share(low)} to {share(high)}: {pairs:,} {what}"
        x, y = 44 + 408 * low + 1, BASE - tall
        bars.append({"what": what, "x": x, "y": y, "height": tall, "told": told})
    powers = range(int(np.log10(top)) + 1)
    ticks = [(BASE - scale * (1 + power), number(10**power)) for power in powers]
    counts = table.groupby("what")["pairs"].sum()
    name = (
        f"Histogram of the probability of being misaligned: {counts['kept']:,} pairs kept, "
        f"{counts['flagged']:,} flagged from {share(threshold)} on"
    )
    return render("histogram", bars=bars, ticks=ticks, name=name, threshold=threshold)


def scatter_table(audit: Audit, threshold: float) -> pd.DataFrame:
    """Both parts of the scores in a readable unit; a sample if many, flagged rows first."""
    rows, flags = audit.rows, audit.flags(threshold)
    chosen = np.flatnonzero(rows.readable)
    if len(chosen) > MOST_POINTS:
        mixed = np.random.default_rng(0).permutation(chosen)
        chosen = mixed[np.argsort(~flags[mixed], kind="stable")][:MOST_POINTS]
    what = np.where(flags[chosen], "flagged", "kept")
    unit = 10.0**rows.exponent
    return pd.DataFrame(
        {
            "positive": rows.positive[chosen] / unit,
            "negative": rows.negative[chosen] / unit,
            "what": what,
        }
    )


def brushed(folder: str, event: gr.SelectData) -> Span | None:
    """Range of the influence as a positive that was selected, in nats; None if none."""
    if not event.index:
        return None
    unit = 10.0 ** open_audit(folder).rows.exponent
    low, high = event.index
    return float(low) * unit, float(high) * unit


def _draw_scatter(audit: Audit, threshold: float) -> gr.ScatterPlot:
    exponent = audit.rows.exponent
    unit = f"10{superscript(exponent)} nats" if exponent else "nats"
    return gr.ScatterPlot(
        scatter_table(audit, threshold), x_title=f"influence as a positive, in {unit}"
    )


def _say_notes(summary: Summary) -> str:
    """HTML of warnings, and of what to do where the audit abstains."""
    return render(
        "notes",
        abstains=summary.noise.abstains,
        steps=list(after_audit(summary)) if summary.noise.abstains else [],
        warnings=summary.warnings,
    )


def _say_picked(count: int, span: Span | None) -> str:
    where = ""
    if span is not None:
        where = f" with an influence as a positive from {number(span[0])} to {number(span[1])} nats"
    noun = "pair is" if count == 1 else "pairs are"
    return f"<p>{count:,} {noun} flagged{where}. The likeliest ones:</p>"
