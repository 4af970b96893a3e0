"""What the tabs share: the audit that is looked at, the decisions on it, and where one is.

Which audit it is stays on the server, one value per session. Decisions live in the person's own
browser, under the key of the audit, so that they survive a reload and nobody else sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gradio as gr

from hf_ecif.app.selection import Audit, open_audit
from hf_ecif.data.review import Review
from hf_ecif.errors import UserError

# Of what redraws: another trigger while it works is not dropped, the last one counts.
REDRAW: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
STORAGE_KEY = "hf_ecif_reviews"
MOST_AUDITS = 20  # whose decisions a browser keeps


@dataclass(frozen=True)
class Session:
    """Components that several tabs listen to.

    Attributes:
        folder: of the audit; a state.
        reviews: decisions by key of their audit, as JSON; in the browser.
        threshold: slider, of the flags.
        span: stretch of the positive influence that is picked, or None; a state.
        row: that is looked at, or None; a state.
        tabs: to switch between them.
        changed: events, after which another audit is looked at: a load of the page, for one.
    """

    folder: gr.State
    reviews: gr.BrowserState
    threshold: gr.Slider
    span: gr.State
    row: gr.State
    tabs: gr.Tabs
    changed: list[Callable[..., Any]]


class Begin(NamedTuple):
    """Where one is, when an audit comes into view."""

    threshold: float
    span: None
    row: int | None


def begin(folder: str, reviews: dict[str, str] | None) -> Begin:
    """The threshold as it was left, nothing picked, and the likeliest of the flagged pairs."""
    audit = open_audit(folder)
    threshold = read_review(reviews, audit).threshold
    threshold = audit.threshold if threshold is None else threshold
    return Begin(threshold, None, next(iter(audit.pick("flagged", threshold)), None))


def keep_threshold(folder: str, reviews: dict[str, str], threshold: float) -> dict[str, str]:
    """With the threshold among the decisions, where it is not the audit's own."""
    audit = open_audit(folder)
    return keep_review(reviews, audit, reviewed(audit, reviews, threshold))


def reviewed(audit: Audit, reviews: dict[str, str] | None, threshold: float) -> Review:
    """The decisions, with the threshold where somebody moved it."""
    chosen = None if audit.is_own(threshold) else threshold
    return replace(read_review(reviews, audit), threshold=chosen)


def pressed_row(event: gr.EventData) -> int:
    """The row of the pair that was pressed."""
    return int(event._data["row"])


def review_row(event: gr.EventData) -> tuple[int, gr.Tabs]:
    """The same, to be looked at in the review."""
    return pressed_row(event), gr.Tabs(selected="review")


def read_review(reviews: dict[str, str] | None, audit: Audit) -> Review:
    """The decisions on an audit; none where the browser holds something else."""
    text = (reviews or {}).get(audit.key)
    try:
        return Review.from_json(text) if text else Review()
    except UserError:
        return Review()


def keep_review(reviews: dict[str, str] | None, audit: Audit, review: Review) -> dict[str, str]:
    """With these decisions on an audit, the newest last."""
    others = {key: text for key, text in (reviews or {}).items() if key != audit.key}
    newest = dict(list(others.items())[-(MOST_AUDITS - 1) :])
    return newest | {audit.key: review.to_json()}
