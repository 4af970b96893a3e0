"""The page of a trace: errors beside what was predicted instead, and the pairs behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_ecif.data.images import thumbnail
from hf_ecif.reports.html import write_page
from hf_ecif.utils.formatting import readable_exponent, shorten

SHOWN_ERRORS, SHOWN_CAUSES = 24, 5
CAPTION_LENGTH = 200


def write_trace_page(
    errors: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    train: Dataset,
    query: Dataset,
    path: Path,
) -> None:
    """Write one self-contained HTML file: errors beside what was predicted, and their causes.

    Args:
        errors: with their causes, the worst first, as `describe_errors_and_causes` has them.
        summary: of the trace.
        train: the training rows, images undecoded.
        query: the rows that the errors are of, likewise.
        path: where the page goes.
    """
    pictures = _Pictures(train, query, summary["columns"]["image"])
    shown = [_show(error, pictures) for error in errors[:SHOWN_ERRORS]]
    often = [
        one | pictures.train(one["row"]) | {"caption": shorten(one["text"], CAPTION_LENGTH)}
        for one in summary["often"]
    ]
    write_page(
        path,
        "trace.html.j2",
        summary=summary,
        shown=shown,
        often=often,
        shown_causes=SHOWN_CAUSES,
    )


class _Pictures:
    """Thumbnails of rows, each made once."""

    def __init__(self, train: Dataset, query: Dataset, column: str) -> None:
        self._column, self._sets = column, (train, query)
        self._known: dict[tuple[int, int], dict[str, Any]] = {}

    def train(self, row: int) -> dict[str, Any]:
        """Of a training row."""
        return self._picture(0, row)

    def query(self, row: int) -> dict[str, Any]:
        """Of a row of the query."""
        return self._picture(1, row)

    def _picture(self, which: int, row: int) -> dict[str, Any]:
        if (which, row) not in self._known:
            picture, problem = thumbnail(self._sets[which][row][self._column])
            self._known[which, row] = {"row": row, "thumbnail": picture, "problem": problem}
        return self._known[which, row]


def _show(error: dict[str, Any], pictures: _Pictures) -> dict[str, Any]:
    """An error as the page shows it; causes are pairs without which it would shrink."""
    causes = [cause for cause in error["causes"] if cause["score"] < 0][:SHOWN_CAUSES]
    parts = [abs(cause[role]) for cause in causes for role in ("positive", "negative")]
    return {
        "asked": pictures.query(error["error_row"]),
        "caption": shorten(error["error_text"], CAPTION_LENGTH),
        "found": pictures.query(error["predicted_row"]),
        "found_caption": shorten(error["predicted_text"], CAPTION_LENGTH),
        "margin": error["margin"],
        "reach": max(parts, default=1.0) or 1.0,
        "exponent": readable_exponent(np.array([c["score"] for c in causes], dtype=np.float64)),
        "causes": [
            cause
            | pictures.train(cause["cause_row"])
            | {
                "caption": shorten(cause["cause_text"], CAPTION_LENGTH),
                "partner": None
                if cause["partner_row"] is None
                else pictures.train(cause["partner_row"])
                | {"caption": shorten(cause["partner_text"], CAPTION_LENGTH)},
            }
            for cause in causes
        ],
    }
