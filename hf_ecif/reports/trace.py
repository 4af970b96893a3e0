"""Page of a trace: errors beside the predictions, and the pairs behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from hf_ecif.data.images import thumbnail
from hf_ecif.data.scored_rows import Shown
from hf_ecif.data.summary import Cause, TracedError, TraceSummary
from hf_ecif.reports.html import Strip, about, write_page
from hf_ecif.reports.steps import after_trace
from hf_ecif.utils.files import aside
from hf_ecif.utils.formatting import nats, readable_exponent, shorten

STRIP, FACT_LENGTH = 8, 80  # pictures on the first screen, and letters of what is said of each
SHOWN_ERRORS, SHOWN_CAUSES = 24, 5
CAPTION_LENGTH = 200


COLUMNS = {
    "error_row": "int64",
    "error_text": "string",
    "predicted_row": "int64",
    "predicted_text": "string",
    "margin": "float32",
    "rank": "int32",
    "cause_row": "int64",
    "cause_text": "string",
    "score": "float32",
    "stderr": "float32",
    "relative": "float32",
    "positive": "float32",
    "negative": "float32",
    "role": "string",
    "partner_row": "int64",
    "partner_text": "string",
    "partner_part": "float32",
}


def tabulate(errors: Sequence[TracedError]) -> Dataset:
    """Table with a row for every error and cause; row numbers are those of the data sets."""
    pairs = [dict(error) | dict(cause) for error in errors for cause in error.causes]
    columns = {name: [pair[name] for pair in pairs] for name in COLUMNS}
    features = Features(**{name: Value(kind) for name, kind in COLUMNS.items()})
    return Dataset.from_dict(columns, features=features)


def write_traces(errors: Sequence[TracedError], path: Path) -> None:
    """Write the table from `tabulate` as parquet, atomically."""
    with aside(path) as partial:
        tabulate(errors).to_parquet(str(partial))


def write_trace_page(
    errors: Sequence[TracedError],
    summary: TraceSummary,
    train: Dataset,
    query: Dataset,
    path: Path,
) -> None:
    """Write one self-contained HTML file: errors beside what was predicted, and their causes.

    Args:
        errors: errors with their causes, the worst first, from `describe_errors_and_causes`.
        summary: summary of the trace.
        train: the training rows, images undecoded.
        query: the query's rows, images undecoded.
        path: file of the page.
    """
    pictures = _Pictures(train, query, summary.columns.image)
    shown = [_show(error, pictures) for error in errors[:SHOWN_ERRORS]]
    often = [
        pictures.train(one.row)
        | {"errors": one.errors, "caption": shorten(one.text, CAPTION_LENGTH)}
        for one in summary.often
    ]
    write_page(
        path,
        "trace.html.j2",
        summary=summary,
        about=about(summary),
        strip=_strip(shown, len(errors)),
        steps=list(after_trace(summary)),
        shown=shown,
        often=often,
        shown_causes=SHOWN_CAUSES,
    )


def _strip(shown: list[dict[str, Any]], count: int) -> Strip | None:
    """Pictures for the first screen: what was asked with, and what the model prefers."""
    cards = []
    for error in shown[:STRIP]:
        found = error["found_caption"]
        fact = f"instead: {shorten(found, FACT_LENGTH)}" if error["margin"] > 0 else ""
        picture, marked = error["asked"], [(error["caption"], False)]
        note = f"{nats(abs(error['margin']))} nats {'against' if fact else 'in favour'}"
        facts = [fact] if fact else []
        cards.append(Shown(picture["thumbnail"], picture["problem"], marked, note, facts))
    return Strip("The worst errors", cards, count) if cards else None


class _Pictures:
    """Thumbnails of rows, each made once."""

    def __init__(self, train: Dataset, query: Dataset, column: str) -> None:
        self._column, self._sets = column, (train, query)
        self._known: dict[tuple[int, int], dict[str, Any]] = {}

    def train(self, row: int) -> dict[str, Any]:
        """Picture of a training row, for the template."""
        return self._picture(0, row)

    def query(self, row: int) -> dict[str, Any]:
        """Picture of a row of the query, for the template."""
        return self._picture(1, row)

    def _picture(self, which: int, row: int) -> dict[str, Any]:
        if (which, row) not in self._known:
            picture, problem = thumbnail(self._sets[which][row][self._column])
            self._known[which, row] = {"row": row, "thumbnail": picture, "problem": problem}
        return self._known[which, row]


def _show(error: TracedError, pictures: _Pictures) -> dict[str, Any]:
    """An error as shown; causes are pairs without which it would be smaller."""
    causes = [cause for cause in error.causes if cause.score < 0][:SHOWN_CAUSES]
    parts = [abs(part) for cause in causes for part in (cause.positive, cause.negative)]
    return {
        "asked": pictures.query(error.error_row),
        "caption": shorten(error.error_text, CAPTION_LENGTH),
        "found": pictures.query(error.predicted_row),
        "found_caption": shorten(error.predicted_text, CAPTION_LENGTH),
        "margin": error.margin,
        "reach": max(parts, default=1.0) or 1.0,
        "exponent": readable_exponent(np.array([cause.score for cause in causes], dtype=float)),
        "causes": [_show_cause(cause, pictures) for cause in causes],
    }


def _show_cause(cause: Cause, pictures: _Pictures) -> dict[str, Any]:
    partner = None
    if cause.partner_row is not None:
        caption = shorten(cause.partner_text or "", CAPTION_LENGTH)
        partner = pictures.train(cause.partner_row) | {"caption": caption}
    shown = {"caption": shorten(cause.cause_text, CAPTION_LENGTH), "partner": partner}
    return dict(cause) | pictures.train(cause.cause_row) | shown
