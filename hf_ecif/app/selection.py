"""The audit that a session looks at: its rows in an order, by a threshold and what is picked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_ecif.data.loading import load_rows
from hf_ecif.data.review import Review
from hf_ecif.data.schema import check_columns
from hf_ecif.data.scored_rows import ScoredRows
from hf_ecif.errors import UserError
from hf_ecif.utils.files import read_json
from hf_ecif.utils.formatting import Bools

Which = Literal["flagged", "borderline", "not flagged", "decided", "all"]
Span = tuple[float, float]


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Attributes:
        folder: what ``hf-ecif audit`` wrote.
        summary: its ``summary.json``.
        rows: its scored rows.
    """

    folder: Path
    summary: dict[str, Any]
    rows: ScoredRows

    @property
    def threshold(self) -> float:
        """The audit's own, to three digits, as a slider has it."""
        return round(float(self.summary["noise"]["threshold"]), 3)

    def is_own(self, threshold: float) -> bool:
        """Whether a threshold is the audit's."""
        return abs(threshold - self.threshold) < 1e-6

    @cached_property
    def key(self) -> str:
        """What decisions on these rows are kept under, in whichever folder the audit lies."""
        facts = [self.summary.get(name) for name in ("fingerprints", "rows", "noise")]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def flags(self, threshold: float) -> Bools:
        """``(N,)``, what is flagged at a threshold; at the audit's own, what the audit flagged."""
        if self.is_own(threshold):
            return self.rows.flag
        return self.rows.probability > threshold

    def pick(
        self,
        which: Which,
        threshold: float,
        review: Review | None = None,
        span: Span | None = None,
    ) -> list[int]:
        """Numbers of rows, the likeliest to be misaligned first.

        Args:
            which: the rows in question.
            threshold: of the flags.
            review: decisions, for ``decided``.
            span: of the positive influence, to which rows are narrowed.
        """
        flags = self.flags(threshold)
        decided = np.zeros(len(flags), dtype=bool)
        decided[[row for row in (review.current if review else {}) if row < len(flags)]] = True
        chosen = {
            "flagged": flags,
            "borderline": self.rows.borderline,
            "not flagged": ~flags,
            "decided": decided,
            "all": np.ones(len(flags), dtype=bool),
        }[which]
        if span is not None:
            positive = self.rows.positive
            chosen = chosen & (positive >= span[0]) & (positive <= span[1])
        return self.rows.order(chosen, -self.rows.probability)


def is_audit(folder: str) -> bool:
    """Whether a finished audit is in a folder."""
    path = Path(folder).expanduser()
    return (path / "summary.json").is_file() and (path / "scored").is_dir()


@lru_cache(maxsize=16)
def open_audit(folder: str) -> Audit:
    """Open a finished audit.

    Raises:
        UserError: there is none in the folder.
    """
    path = Path(folder).expanduser()
    if not is_audit(folder):
        raise UserError(
            f"{path} holds no finished audit (summary.json and scored/). Run hf-ecif audit first, "
            "and give its --output."
        )
    summary = read_json(path / "summary.json")
    columns = summary["columns"]
    scored = check_columns(
        load_rows(str(path / "scored"), "train"), columns["image"], columns["text"]
    )
    return Audit(path, summary, ScoredRows(scored, summary))
