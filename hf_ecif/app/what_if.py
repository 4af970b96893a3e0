"""Fourth tab: predicted and measured effect of removing pairs from training."""

from __future__ import annotations

from typing import Literal

import gradio as gr
import numpy as np
import pandas as pd

from hf_ecif.app.html import render
from hf_ecif.app.selection import open_audit
from hf_ecif.app.session import REDRAW, Session
from hf_ecif.errors import UserError
from hf_ecif.utils.formatting import Floats

Order = Literal["most harmful first", "likeliest misaligned first", "at random"]
ORDERS: list[Order] = ["most harmful first", "likeliest misaligned first", "at random"]
COLOURS: dict[str, str] = {ORDERS[0]: "#4a7a96", ORDERS[1]: "#c1501b", ORDERS[2]: "#8a8f94"}
MOST = 40  # percent
WAITING = (
    "A prediction is no proof. Training without the pairs measures the real effect on the query "
    "and on held-out rows."
)


def build(session: Session) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown(
        "Drag the share of removed pairs. The curve is the *predicted* change of the query's loss: "
        "the sum of their scores, without any training. Below zero, the model improves."
    )
    with gr.Row():
        share = gr.Slider(
            0,
            MOST,
            10,
            step=1,
            label="Share removed, in percent",
            buttons=[],
            min_width=280,
            elem_id="share",
        )
        order = gr.Radio(
            ORDERS, value=ORDERS[0], label="Which pairs", min_width=280, elem_id="what-if-order"
        )
    gr.HTML(render("legend", entries=COLOURS))
    curve = gr.LinePlot(
        x="share",
        y="change",
        color="order",
        x_title="share removed, in percent",
        y_title="change, in nats",
        colors_in_legend=[],
        color_map=COLOURS,
        height=340,
        label="Predicted change of the query's loss",
        elem_classes="figure",
        elem_id="what-if-curve",
    )
    said = gr.HTML(elem_id="what-if-said")
    train = gr.Button("Train without them and measure", elem_id="what-if-measure")
    measured = gr.HTML(render("nothing", text=WAITING), elem_id="what-if-measured")

    gr.on(session.changed, draw, session.folder, curve, **REDRAW)
    chosen = [session.folder, share, order]
    moved = [*session.changed, share.change, order.change]
    gr.on(moved, say, chosen, said, **REDRAW)
    gr.on(moved, lambda: render("nothing", text=WAITING), None, measured, **REDRAW)
    train.click(measure, chosen, measured, concurrency_id="model", concurrency_limit=1)


def draw(folder: str) -> pd.DataFrame:
    """Predicted change of the query's loss by removed share, for every order."""
    parts = []
    for order in ORDERS:
        changes = _changes(folder, order)
        shares = np.arange(MOST + 1)
        counts = [_count(folder, float(share)) for share in shares]
        parts.append(pd.DataFrame({"share": shares, "change": changes[counts], "order": order}))
    return pd.concat(parts, ignore_index=True)


def say(folder: str, share: float, order: Order) -> str:
    """HTML of the prediction in words."""
    audit, count = open_audit(folder), _count(folder, share)
    change = float(_changes(folder, order)[count])
    loss = audit.summary.query.loss
    facts = {"removed": count, "order": order, "change": change, "loss": loss}
    return render("prediction", **facts)


def measure(folder: str, share: float, order: Order) -> str:
    """HTML of the measures before and after training on the remaining pairs."""
    from hf_ecif.app.fitted_audit import prepare, retrain  # imports torch, which few visitors need

    gone = set(_order(folder, order)[: _count(folder, share)].tolist())
    try:
        found = retrain(prepare(folder), gone)
    except UserError as error:
        return render("problem", message=str(error))
    return render("measured", rows=len(gone), found=found)


def _count(folder: str, share: float) -> int:
    return round(share / 100 * int(open_audit(folder).rows.readable.sum()))


def _changes(folder: str, order: Order) -> Floats:
    """Predicted change after removing 0, 1, 2, ... rows, to first order in each; ``(N + 1,)``."""
    scores = open_audit(folder).rows.score[_order(folder, order)]
    return np.concatenate([[0.0], np.cumsum(scores)])


def _order(folder: str, order: Order) -> np.ndarray:
    rows = open_audit(folder).rows
    readable = np.flatnonzero(rows.readable)
    if order == "at random":
        return np.random.default_rng(0).permutation(readable)
    key = rows.score if order == "most harmful first" else -rows.probability
    return readable[np.argsort(key[readable], kind="stable")]
