"""The first tab: how many pairs are flagged at which threshold, and how the scores are spread."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr
import numpy as np
import pandas as pd

from hf_ecif.space.audits import Audit, Span, open_audit
from hf_ecif.space.html import PICK, render
from hf_ecif.space.session import Session, read_review, review_row

BINS = 40
MOST_POINTS = 4000  # drawn in a scatter; a browser has to move them
SHOWN = 12
WORDS = {"keep": "keep", "remove": "remove", "recaption": "new caption"}
COLOURS = {"kept": "#4a7a96", "flagged": "#c1501b"}


class Overview(NamedTuple):
    """Values of the tab's components, in the order of `outputs`."""

    tiles: str
    histogram: pd.DataFrame
    scatter: pd.DataFrame
    picked: str
    cards: str


def build(session: Session) -> None:
    """Lay out the tab and connect it."""
    tiles = gr.HTML()
    with gr.Row():
        session.threshold.render()
        reset = gr.Button("The audit's own threshold", scale=0, min_width=190)
    with gr.Row():
        histogram = gr.BarPlot(
            x="probability",
            y="pairs",
            color="what",
            color_map=COLOURS,
            x_title="probability of being misaligned",
            label="How sure the detector is",
            height=260,
        )
        scatter = gr.ScatterPlot(
            x="positive",
            y="negative",
            color="what",
            color_map=COLOURS,
            x_title="influence as a positive",
            y_title="as a negative",
            label="The two roles: drag over the figure to pick pairs",
            height=260,
        )
    with gr.Row():
        picked = gr.HTML()
        clear = gr.Button("Show all again", scale=0, min_width=150)
    cards = gr.HTML(js_on_load=PICK, elem_id="overview-cards")

    inputs = [session.folder, session.reviews, session.threshold, session.span]
    outputs = [tiles, histogram, scatter, picked, cards]
    shared = {"inputs": inputs, "outputs": outputs, "show_progress": "hidden"}
    gr.on([*session.changed, session.threshold.change, session.span.change], show, **shared)
    reset.click(lambda folder: open_audit(folder).threshold, session.folder, session.threshold)
    clear.click(lambda: None, None, session.span)
    scatter.select(brushed, None, session.span)
    cards.select(review_row, None, [session.row, session.tabs])


def show(folder: str, reviews: dict[str, str], threshold: float, span: Span | None) -> Overview:
    """What the tab shows of an audit."""
    audit = open_audit(folder)
    review = read_review(reviews, audit)
    flags = audit.flags(threshold)
    rows = audit.pick("flagged", threshold, review, span)
    values = {
        "summary": audit.summary,
        "flagged": int(flags.sum()),
        "kept": int((~flags & audit.rows.readable).sum()),
        "borderline": int(audit.rows.borderline.sum()),
        "decided": len(review.current),
        "threshold": threshold,
    }
    return Overview(
        render("tiles", **values),
        histogram_table(audit, threshold),
        scatter_table(audit, threshold),
        _say_picked(len(rows), span),
        render(
            "cards",
            cards=[audit.rows.card(row) for row in rows[:SHOWN]],
            decisions=review.current,
            words=WORDS,
            nothing="No pair is flagged here. Move the threshold to the left to see more.",
        ),
    )


def histogram_table(audit: Audit, threshold: float) -> pd.DataFrame:
    """Pairs per bin of the probability, kept and flagged ones."""
    flags, readable = audit.flags(threshold), audit.rows.readable
    edges = np.linspace(0, 1, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    parts = []
    for what, chosen in (("kept", readable & ~flags), ("flagged", readable & flags)):
        pairs, _ = np.histogram(audit.rows.probability[chosen], edges)
        parts.append(pd.DataFrame({"probability": centres, "pairs": pairs, "what": what}))
    return pd.concat(parts, ignore_index=True)


def scatter_table(audit: Audit, threshold: float) -> pd.DataFrame:
    """Both parts of every score; of many rows a sample that has all flagged ones first."""
    rows, flags = audit.rows, audit.flags(threshold)
    chosen = np.flatnonzero(rows.readable)
    if len(chosen) > MOST_POINTS:
        mixed = np.random.default_rng(0).permutation(chosen)
        chosen = mixed[np.argsort(~flags[mixed], kind="stable")][:MOST_POINTS]
    what = np.where(flags[chosen], "flagged", "kept")
    return pd.DataFrame(
        {"positive": rows.positive[chosen], "negative": rows.negative[chosen], "what": what}
    )


def brushed(event: gr.SelectData) -> Span | None:
    """The stretch of the positive influence that was dragged over."""
    if not event.index:
        return None
    low, high = event.index
    return float(low), float(high)


def _say_picked(count: int, span: Span | None) -> str:
    where = ""
    if span is not None:
        where = f" with an influence as a positive from {span[0]:.2g} to {span[1]:.2g}"
    noun = "pair is" if count == 1 else "pairs are"
    return f"<p>{count:,} {noun} flagged{where}. The likeliest ones:</p>"
