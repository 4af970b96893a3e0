"""Third tab: the training pairs behind a misprediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from hf_ecif.app.html import PICK, render
from hf_ecif.app.selection import open_audit
from hf_ecif.app.session import Session, pressed_row, review_row
from hf_ecif.errors import UserError

SHOWN = 24  # number of errors in the list
TOP = 8  # number of pairs shown for each
WAITING = (
    "The training pairs behind an error appear here. For the first one, the model is loaded and "
    "fitted to the audited pairs, which takes a while."
)
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def build(session: Session) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown(
        "Captions of the query for which the fitted model retrieves the wrong image. Choose one, "
        "or enter a pair of your own, to see the training pairs that contributed most to the error."
    )
    nothing = render("nothing", text=WAITING)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            find = gr.Button("Find the mispredictions", elem_id="trace-find")
            with gr.Accordion("A pair of your own", open=False, elem_id="trace-own"):
                image = unread_image(label="Image", height=180, elem_id="trace-image")
                text = gr.Textbox(
                    label="The right caption, or the right class", elem_id="trace-text"
                )
                classes = gr.Textbox(
                    elem_id="trace-classes",
                    label="Other classes, one per line; if empty, the captions of the query",
                    lines=3,
                )
                ask = gr.Button("Trace it", elem_id="trace-ask")
            errors = gr.HTML(js_on_load=PICK, elem_id="trace-errors")
        with gr.Column(scale=6, min_width=320):
            causes = gr.HTML(nothing, js_on_load=PICK, elem_id="trace-causes")

    find.click(list_errors, session.folder, errors, **MODEL)
    errors.select(trace_error, session.folder, causes, **MODEL)
    ask.click(trace_own, [session.folder, image, text, classes], causes, **MODEL)
    causes.select(review_row, None, [session.row, session.tabs])
    session.folder.change(lambda: ("", nothing), None, [errors, causes])


def unread_image(**options: Any) -> gr.Image:
    """Upload of an image that is not opened here: of a broken one, the error would tell its place.

    Its value is the path of the file.
    """
    image = gr.Image(type="filepath", sources=["upload", "clipboard"], **options)
    image.preprocess = _path_of  # type: ignore[method-assign]  # a class of its own writes files
    return image


def _path_of(payload: ImageData | None) -> str | None:
    return payload.path if payload else None


def list_errors(folder: str) -> str:
    """HTML list of the query's mispredictions."""
    from hf_ecif.app.fitted_audit import list_mispredictions, prepare  # with torch

    try:
        found = list_mispredictions(prepare(folder))
    except UserError as error:
        return render("problem", message=str(error))
    return render("errors", errors=found[:SHOWN], count=len(found))


def trace_error(folder: str, event: gr.EventData) -> str:
    """HTML of the pressed misprediction and the pairs behind it."""
    from hf_ecif.app.fitted_audit import describe_query, prepare
    from hf_ecif.influence.queries import retrieval_margin

    prepared, row = prepare(folder), pressed_row(event)
    query = retrieval_margin(prepared.query, [row])
    return _show(folder, describe_query(prepared, row), query)


def trace_own(folder: str, image: str | None, text: str, classes: str) -> str:
    """HTML of the pairs behind the margin of a visitor's own image and caption."""
    from hf_ecif.app.fitted_audit import ask, prepare

    if image is None or not (text or "").strip():
        return render("problem", message="Give an image and its caption, or its class.")
    others = [line.strip() for line in (classes or "").splitlines() if line.strip()]
    try:
        asked, query = ask(prepare(folder), Path(image).read_bytes(), text.strip(), others)
    except UserError as error:
        return render("problem", message=str(error))
    return _show(folder, asked, query)


def _show(folder: str, asked: Any, query: Any) -> str:
    from hf_ecif.app.fitted_audit import find_causes, prepare

    audit = open_audit(folder)
    causes = find_causes(prepare(folder), query, TOP)
    cards = [(audit.rows.card(cause.row), cause) for cause in causes]
    reach = max(max(abs(c.positive), abs(c.negative)) for c in causes)
    return render("causes", asked=asked, cards=cards, reach=reach or 1.0)
