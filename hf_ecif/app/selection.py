"""The audit of a session, and its rows in order: by threshold, decision and selection."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.loading import load_scored
from hf_ecif.data.review import Review
from hf_ecif.data.scored_rows import ScoredRows
from hf_ecif.data.summary import Summary
from hf_ecif.utils.files import to_json
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
    summary: Summary
    rows: ScoredRows

    @property
    def threshold(self) -> float:
        """The audit's threshold, rounded to three digits for a slider."""
        return round(self.summary.noise.threshold, 3)

    def is_own(self, threshold: float) -> bool:
        """Whether a threshold equals the audit's."""
        return abs(threshold - self.threshold) < 1e-6

    @cached_property
    def key(self) -> str:
        """Key under which decisions on these rows are kept, in whichever folder the audit is."""
        facts = self.summary.to_dict()
        told = to_json([facts[name] for name in ("fingerprints", "rows", "noise")])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def flags(self, threshold: float) -> Bools:
        """Rows flagged at a threshold, ``(N,)``; at the audit's, those that it flagged."""
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
        """Numbers of rows, the most likely misaligned first.

        Args:
            which: kind of rows.
            threshold: probability from which rows are flagged.
            review: decisions, for ``decided``.
            span: range of the influence as a positive; rows outside it are left out.
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
    """Whether a folder holds a finished audit."""
    audit = AuditFolder(Path(folder).expanduser())
    return audit.has_summary and audit.has_rows


@lru_cache(maxsize=16)
def open_audit(folder: str) -> Audit:
    """Open a finished audit.

    Raises:
        UserError: the folder holds no finished audit.
    """
    audit = AuditFolder(Path(folder).expanduser())
    summary = audit.read_summary()
    rows = ScoredRows(load_scored(audit, summary.columns), summary)
    return Audit(audit.path, summary, rows)
