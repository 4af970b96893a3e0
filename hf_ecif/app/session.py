"""State that the tabs share: the audit, the desk at which it is reviewed, threshold and row."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gradio as gr

from hf_ecif.app.desk import DESKS, Place
from hf_ecif.app.selection import Audit, open_audit
from hf_ecif.data.review import Review

# Options of events that redraw: of triggers during a redraw, the last one runs afterwards.
REDRAW: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
STORAGE_KEY = "hf_ecif_visitor"
Shown = tuple[int, float]  # a row, and when it was pressed: pressed again, it is shown again


@dataclass(frozen=True)
class Session:
    """Components that several tabs listen to.

    Attributes:
        folder: state with the folder of the audit.
        visitor: a secret of the browser, by which a stranger's decisions are found again.
        reviews: state with the name of the desk, which stands for the decisions on the audit.
        threshold: slider with the threshold of the flags.
        span: state with the selected range of the influence as a positive, or None.
        row: state with the row that was pressed last and when, or None.
        tabs: the tabs, to switch between them.
        changed: events after which the audit may be another one: a desk was opened for it.
    """

    folder: gr.State
    visitor: gr.BrowserState
    reviews: gr.State
    threshold: gr.Slider
    span: gr.State
    row: gr.State
    tabs: gr.Tabs
    changed: list[Callable[..., Any]]


class Begin(NamedTuple):
    """Values of the shared state when an audit is opened."""

    visitor: str
    reviews: str
    threshold: float
    span: None
    row: None


def begin(place: Place, folder: str, visitor: str | None, reviews: str | None) -> Begin:
    """A new desk with the last threshold, and no selection."""
    DESKS.close(reviews)
    visitor = str(visitor or secrets.token_urlsafe(24))[:64]  # the browser may say anything
    reviews = DESKS.open(folder, visitor, place)
    audit = open_audit(folder)
    threshold = read_review(reviews, audit).threshold
    return Begin(visitor, reviews, audit.threshold if threshold is None else threshold, None, None)


def keep_threshold(folder: str, reviews: str | None, threshold: float) -> str | None:
    """Keep the threshold with the decisions, unless it is the audit's."""
    audit, desk = open_audit(folder), DESKS.get(reviews)
    chosen = None if audit.is_own(threshold) else threshold
    if desk is not None and desk.is_of(audit) and desk.review().threshold != chosen:
        step = {"id": f"threshold-{secrets.token_hex(8)}", "threshold": chosen}
        desk.log.append([step | {"own": audit.threshold}])
    return reviews


def reviewed(audit: Audit, reviews: str | None, threshold: float) -> Review:
    """Decisions on the audit, with the threshold if it was moved."""
    chosen = None if audit.is_own(threshold) else threshold
    return replace(read_review(reviews, audit), threshold=chosen)


def read_review(reviews: str | None, audit: Audit) -> Review:
    """Decisions on an audit; none where the desk is that of another one."""
    desk = DESKS.get(reviews)
    return desk.review() if desk is not None and desk.is_of(audit) else Review()


def pressed_row(event: gr.EventData) -> int:
    """Row of the pair that was pressed."""
    return int(event._data["row"])


def review_row(event: gr.EventData) -> tuple[Shown, gr.Tabs]:
    """Row of the pair that was pressed, and a switch to the review."""
    return (pressed_row(event), time.monotonic()), gr.Tabs(selected="review")


def picture_address(reviews: str | None, row: int) -> str | None:
    """Where the page finds the picture of a row; None without a desk."""
    return f"review/{reviews}/image/{row}" if DESKS.get(reviews) else None
