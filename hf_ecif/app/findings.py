"""Tab of findings: stock phrases, placeholders, cut captions, duplicates, unreadable rows."""

from __future__ import annotations

import gradio as gr

from hf_ecif.app.html import PICK, render
from hf_ecif.app.selection import open_audit
from hf_ecif.app.session import REDRAW, Session, review_row
from hf_ecif.reports.findings import find_examples


def build(session: Session, tab: gr.Tab) -> None:
    """Lay out the tab and connect it; it is filled when it is looked at."""
    shown = gr.HTML(js_on_load=PICK, elem_id="findings-shown")
    gr.on([tab.select, session.folder.change], show, session.folder, shown, **REDRAW)
    shown.select(review_row, None, [session.row, session.tabs])


def show(folder: str) -> str:
    """HTML of all findings, with examples to press."""
    audit = open_audit(folder)
    return render("findings", findings=find_examples(audit.rows, audit.summary))
