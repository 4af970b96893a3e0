"""Second tab: many rows judged fast. Its page is a script of its own; see `static/review.js`.

Decisions are made in the browser, on the rows that are seen there, and sent in the background to
the addresses of `hf_ecif.app.review_routes`. Gradio brings the page the name of its desk, the
threshold and the selection, and takes care of the export.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from hf_ecif.app.html import render
from hf_ecif.app.selection import Span, open_audit
from hf_ecif.app.session import REDRAW, Session, Shown, reviewed
from hf_ecif.applications.review import apply_review

# The page's script may come later than this element, or it may be there already.
OPEN = """
const tell = () => document.dispatchEvent(new CustomEvent('review-told', {detail: element}));
document.addEventListener('review-unselect', () => trigger('clear', {}));
new MutationObserver(tell).observe(element, {childList: true, subtree: true, attributes: true});
tell();
"""


def build(session: Session) -> None:
    """Lay out the tab and connect it."""
    gr.HTML(render("review"), apply_default_css=False, elem_id="review-place")
    told = gr.HTML(js_on_load=OPEN, elem_id="review-told")
    export = gr.Button("Export data and decisions", size="sm", elem_id="review-export")
    exported = gr.File(label="Export", visible=False, elem_id="review-exported")

    inputs = [session.folder, session.reviews, session.threshold, session.span, session.row]
    moved: list[Any] = [session.reviews, session.threshold, session.span, session.row]
    gr.on([part.change for part in moved], tell, inputs, told, api_visibility="private", **REDRAW)
    told.clear(lambda: None, None, session.span, api_visibility="private", show_progress="hidden")
    export.click(write_export, inputs[:3], exported)


def tell(
    folder: str, reviews: str | None, threshold: float, span: Span | None, row: Shown | None
) -> str:
    """HTML that tells the page's script what to show."""
    own = open_audit(folder).is_own(threshold)
    return render("told", desk=reviews, threshold=threshold, own=own, span=span, row=row)


def write_export(folder: str, reviews: str | None, threshold: float) -> gr.File:
    """Zip of the audit after the decisions: kept, removed and scored rows, report, decisions."""
    audit = open_audit(folder)
    review = reviewed(audit, reviews, threshold)
    os.makedirs(get_upload_folder(), exist_ok=True)  # which Gradio cleans up
    place = Path(mkdtemp(dir=get_upload_folder()))
    apply_review(audit.folder, review, place / "cleaned")
    (place / "cleaned" / "decisions.json").write_text(review.to_json())
    archive = shutil.make_archive(str(place / "cleaned"), "zip", place / "cleaned")
    shutil.rmtree(place / "cleaned")
    return gr.File(archive, visible=True)
