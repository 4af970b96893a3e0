"""The fourth tab: what if some of the pairs had not been trained on?"""

from __future__ import annotations

from typing import Literal

import gradio as gr
import numpy as np
import pandas as pd

from hf_ecif.space.audits import open_audit
from hf_ecif.space.html import render
from hf_ecif.space.session import Session
from hf_ecif.words import Floats

Order = Literal["most harmful first", "likeliest misaligned first", "at random"]
ORDERS: list[Order] = ["most harmful first", "likeliest misaligned first", "at random"]
MOST = 40  # per cent


def build(session: Session) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown(
        "Drag the share of the pairs that go. The curve is the *predicted* change of the query's "
        "loss: the sum of their scores, without any training. Below zero, the model gains."
    )
    with gr.Row():
        share = gr.Slider(0, MOST, 10, step=1, label="Share removed, in per cent", elem_id="share")
        order = gr.Radio(ORDERS, value=ORDERS[0], label="Which pairs")
    curve = gr.LinePlot(
        x="share",
        y="change",
        color="order",
        x_title="share removed, in per cent",
        y_title="predicted change of the loss, in nats",
        height=280,
        label="Prediction",
    )
    said = gr.HTML(elem_id="what-if-said")
    measure = gr.Button("Train without them and measure", elem_id="what-if-measure")
    measured = gr.HTML(elem_id="what-if-measured")

    gr.on(session.changed, draw, session.folder, curve, show_progress="hidden")
    chosen = [session.folder, share, order]
    gr.on([*session.changed, share.change, order.change], say, chosen, said, show_progress="hidden")
    measure.click(retrain, chosen, measured, concurrency_id="model", concurrency_limit=1)


def draw(folder: str) -> pd.DataFrame:
    """Predicted change of the query's loss by the share that goes, for every order."""
    parts = []
    for order in ORDERS:
        changes = _changes(folder, order)
        shares = np.arange(MOST + 1)
        counts = [_count(folder, float(share)) for share in shares]
        parts.append(pd.DataFrame({"share": shares, "change": changes[counts], "order": order}))
    return pd.concat(parts, ignore_index=True)


def say(folder: str, share: float, order: Order) -> str:
    """The prediction in words."""
    audit, count = open_audit(folder), _count(folder, share)
    change = float(_changes(folder, order)[count])
    loss = audit.summary["query"].get("loss")
    facts = {"removed": count, "order": order, "change": change, "loss": loss}
    return render("prediction", **facts)


def retrain(folder: str, share: float, order: Order) -> str:
    """Train on the remaining pairs by the audit's recipe; query and retrieval before and after."""
    import torch

    from hf_ecif.space.engine import measure, prepare

    prepared = prepare(folder)
    gone = set(_order(folder, order)[: _count(folder, share)].tolist())
    stays = [n for n, row in enumerate(prepared.rows.positions.tolist()) if row not in gone]
    if len(stays) < 2:
        return render("measured", rows=None)
    before = measure(prepared, prepared.model.theta)
    after = measure(prepared, prepared.model.refit(prepared.rows.select(torch.tensor(stays))))
    predicted = float(_changes(folder, order)[len(gone)])
    return render("measured", rows=len(gone), before=before, after=after, predicted=predicted)


def _count(folder: str, share: float) -> int:
    return round(share / 100 * int(open_audit(folder).rows.readable.sum()))


def _changes(folder: str, order: Order) -> Floats:
    """Predicted change after 0, 1, 2, ... rows are gone; first order in each."""
    scores = open_audit(folder).rows.score[_order(folder, order)]
    return np.concatenate([[0.0], np.cumsum(scores)])


def _order(folder: str, order: Order) -> np.ndarray:
    rows = open_audit(folder).rows
    readable = np.flatnonzero(rows.readable)
    if order == "at random":
        return np.random.default_rng(0).permutation(readable)
    key = rows.score if order == "most harmful first" else -rows.probability
    return readable[np.argsort(key[readable], kind="stable")]
