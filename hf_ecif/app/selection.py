"""The audit of a session, and its rows in order: by threshold, decision and selection."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.parquet_rows import ParquetRows
from hf_ecif.data.review import Review
from hf_ecif.data.scored_rows import ScoredRows
from hf_ecif.data.summary import Summary
from hf_ecif.utils.files import to_json
from hf_ecif.utils.formatting import Bools, Floats

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
        """Key of the audited rows: decisions on them hold whoever audits them, and wherever."""
        facts = self.summary
        told = to_json([facts.fingerprints.get("data", facts.dataset), facts.split, facts.rows])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def flags(self, threshold: float) -> Bools:
        """Rows flagged at a threshold, ``(N,)``; at the audit's, those that it flagged."""
        if self.is_own(threshold):
            return self.rows.flag
        return self.rows.probability > threshold

    @cached_property
    def reach(self) -> float:
        """How far from the threshold, in log-odds, a row is borderline.

        The audit knows the error of each row, but keeps only whether it reaches across its own
        threshold. With this reach, as many rows are near that threshold as the audit calls
        borderline.
        """
        near = np.sort(self._distance(self.threshold)[self.rows.readable])
        count = int(self.rows.borderline.sum())
        return float(near[count - 1]) if 0 < count <= len(near) else 0.0

    def borderline(self, threshold: float) -> Bools:
        """Rows close to a threshold, ``(N,)``; at the audit's, those that it calls borderline."""
        if self.is_own(threshold):
            return self.rows.borderline
        near: Bools = self._distance(threshold) <= self.reach
        return near & self.rows.readable & (self.reach > 0)

    def _distance(self, threshold: float) -> Floats:
        """Distance of every probability from a threshold in log-odds; infinite where unknown."""
        with np.errstate(divide="ignore", invalid="ignore"):
            here = np.log(self.rows.probability) - np.log1p(-self.rows.probability)
            there = np.log(threshold) - np.log1p(-threshold)
            return np.nan_to_num(np.abs(here - there), nan=np.inf)

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
            "borderline": self.borderline(threshold),
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
    rows = ScoredRows(ParquetRows(audit.shards("scored")), summary)
    pa.default_memory_pool().release_unused()  # what reading whole columns took
    return Audit(audit.path, summary, rows)
