"""State that the tabs share: the audit, the decisions on it, and the current row.

The server knows the audit of each session. Decisions are kept in the visitor's browser, under the
key of the audit, so that they survive a reload and no one else sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gradio as gr

from hf_ecif.app.selection import Audit, open_audit
from hf_ecif.data.review import Review
from hf_ecif.errors import UserError

# Options of events that redraw: of triggers during a redraw, the last one runs afterwards.
REDRAW: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
STORAGE_KEY = "hf_ecif_reviews"
MOST_AUDITS = 20  # number of audits whose decisions a browser keeps


@dataclass(frozen=True)
class Session:
    """Components that several tabs listen to.

    Attributes:
        folder: state with the folder of the audit.
        reviews: decisions as JSON by key of their audit, kept in the browser.
        threshold: slider with the threshold of the flags.
        span: state with the selected range of the influence as a positive, or None.
        row: state with the current row, or None.
        tabs: the tabs, to switch between them.
        changed: events after which the audit may be another one, such as a load of the page.
    """

    folder: gr.State
    reviews: gr.BrowserState
    threshold: gr.Slider
    span: gr.State
    row: gr.State
    tabs: gr.Tabs
    changed: list[Callable[..., Any]]


class Begin(NamedTuple):
    """Values of the shared state when an audit is opened."""

    threshold: float
    span: None
    row: int | None


def begin(folder: str, reviews: dict[str, str] | None) -> Begin:
    """The last threshold, no selection, and the flagged pair of highest probability."""
    audit = open_audit(folder)
    threshold = read_review(reviews, audit).threshold
    threshold = audit.threshold if threshold is None else threshold
    return Begin(threshold, None, next(iter(audit.pick("flagged", threshold)), None))


def keep_threshold(folder: str, reviews: dict[str, str], threshold: float) -> dict[str, str]:
    """Decisions together with the threshold, if it differs from the audit's."""
    audit = open_audit(folder)
    return keep_review(reviews, audit, reviewed(audit, reviews, threshold))


def reviewed(audit: Audit, reviews: dict[str, str] | None, threshold: float) -> Review:
    """Decisions on the audit, with the threshold if it was moved."""
    chosen = None if audit.is_own(threshold) else threshold
    return replace(read_review(reviews, audit), threshold=chosen)


def pressed_row(event: gr.EventData) -> int:
    """Row of the pair that was pressed."""
    return int(event._data["row"])


def review_row(event: gr.EventData) -> tuple[int, gr.Tabs]:
    """Row of the pair that was pressed, and a switch to the review."""
    return pressed_row(event), gr.Tabs(selected="review")


def read_review(reviews: dict[str, str] | None, audit: Audit) -> Review:
    """Decisions on an audit; none if the browser's value is not valid."""
    text = (reviews or {}).get(audit.key)
    try:
        return Review.from_json(text) if text else Review()
    except UserError:
        return Review()


def keep_review(reviews: dict[str, str] | None, audit: Audit, review: Review) -> dict[str, str]:
    """All stored decisions with those on this audit, the newest last."""
    others = {key: text for key, text in (reviews or {}).items() if key != audit.key}
    newest = dict(list(others.items())[-(MOST_AUDITS - 1) :])
    return newest | {audit.key: review.to_json()}
