"""The app as a whole: its tabs in order, and how it is served."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from hf_ecif.app import calibrate, findings, overview, what_if
from hf_ecif.app import publish as publishing
from hf_ecif.app import review as reviewing
from hf_ecif.app import run as running
from hf_ecif.app import trace as tracing
from hf_ecif.app.desk import DESKS, Place
from hf_ecif.app.html import STYLE, render
from hf_ecif.app.limits import Limits, find_limits
from hf_ecif.app.review_routes import review_routes
from hf_ecif.app.selection import open_audit
from hf_ecif.app.session import REDRAW, STORAGE_KEY, Session, begin
from hf_ecif.app.theme import make_theme
from hf_ecif.utils.hub_paths import public_name
from hf_ecif.version import __version__

TITLE = "hf_ecif: which pairs help, which hurt"
HEAD = f"""
<link rel="stylesheet" href="review/static/review.css?{__version__}">
<script type="module" src="review/static/review.js?{__version__}"></script>
"""


def make_app(
    folder: str,
    limits: Limits | None = None,
    *,
    model: str | None = None,
    dataset: str | None = None,
    keep: Path | None = None,
) -> gr.Blocks:
    """The app for an audit.

    Args:
        folder: folder of the audit that a session starts with.
        limits: what a visitor may ask for; those of the place where this runs, if absent.
        model: model proposed for new audits; that of the audit, if absent.
        dataset: data set proposed for new audits; if given, the app opens on that tab.
        keep: folder of decisions, for an audit that is itself kept nowhere; beside it if absent.

    Raises:
        UserError: there is no audit in the folder.
    """
    audit, limits = open_audit(folder), limits or find_limits()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        title = gr.HTML(elem_id="title")
        # Made before the tabs, among which every component counts as a tab.
        session = Session(
            folder=gr.State(folder),
            visitor=gr.BrowserState("", storage_key=STORAGE_KEY, secret="hf_ecif"),
            reviews=gr.State(None, delete_callback=DESKS.close),
            threshold=gr.Slider(
                0.0,
                1.0,
                audit.threshold,
                step=0.001,
                label="Threshold of the probability",
                buttons=[],
                min_width=280,
                elem_id="threshold",
                render=False,
            ),
            span=gr.State(None),
            row=gr.State(None),
            tabs=gr.Tabs(selected="run" if dataset else "overview", render=False),
            changed=[],
        )
        session.changed.append(session.reviews.change)
        session.tabs.render()
        with session.tabs:
            with gr.Tab("Overview", id="overview") as tab:
                overview.build(session, tab)
            with gr.Tab("Review", id="review"):
                reviewing.build(session)
            with gr.Tab("Findings", id="findings") as tab:
                findings.build(session, tab)
            with gr.Tab("Calibrate", id="calibrate") as tab:
                calibrate.build(session, limits, tab)
            with gr.Tab("Trace", id="trace"):
                tracing.build(session)
            with gr.Tab("What if", id="what-if"):
                what_if.build(session)
            with gr.Tab("Run", id="run"):
                running.build(session, limits, model or audit.summary.model, dataset)
            with gr.Tab("Publish", id="publish"):
                publishing.build(session, limits)
        gr.on(session.changed, _say_title, session.folder, title, **REDRAW)
        gr.on(
            [app.load, session.folder.change],
            partial(begin, Place(limits.shared, folder, keep)),
            [session.folder, session.visitor, session.reviews],
            [session.visitor, session.reviews, session.threshold, session.span, session.row],
            api_name="begin",
            **REDRAW,
        )
    return app.queue(max_size=limits.waiting)


def launch(app: gr.Blocks, limits: Limits | None = None, **options: Any) -> Any:
    """Serve the app.

    Args:
        app: from `make_app`.
        limits: bounds of uploads.
        options: arguments of `gradio.Blocks.launch`.
    """
    limits = limits or find_limits()
    # Gradio would keep every event with its pictures in the browser, and tell anyone of its queue.
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    return app.launch(
        theme=make_theme(),
        css=STYLE,
        head=HEAD,
        app_kwargs={"routes": review_routes()},
        max_file_size=limits.upload,
        show_error=True,
        enable_monitoring=False,
        footer_links=["gradio", "settings"],
        ssr_mode=False,
        **options,
    )


def _say_title(folder: str) -> str:
    summary = open_audit(folder).summary
    return render(
        "title",
        about=summary.about,
        model=public_name(summary.model),
        dataset=public_name(summary.dataset),
    )
