"""From an audit and a person's decisions to a new audit's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.loading import load_scored
from hf_ecif.data.review import Review, part_by_review
from hf_ecif.data.summary import ReviewFacts, Summary
from hf_ecif.reports.audit import write_report
from hf_ecif.utils.formatting import Bools


def apply_review(audit: Path, review: Review, output: Path) -> Summary:
    """Write an audit anew, by a person's decisions.

    Args:
        audit: folder of an audit.
        review: the decisions.
        output: new folder, an audit's as well.

    Returns:
        That of the audit with new numbers, and ``review``.

    Raises:
        UserError: there is no audit, or the decisions belong to another one.
    """
    before, after = AuditFolder(audit), AuditFolder(output)
    summary = before.read_summary()
    threshold = summary.noise.threshold
    scored, result = part_by_review(
        load_scored(before, summary.columns),
        review,
        threshold=threshold,
        text_column=summary.columns.text,
    )
    after.write_rows(result, scored)
    flags: Bools = np.array(scored.with_format(None)["ecif_flag"][:]) == True  # noqa: E712
    if review.threshold is not None:
        threshold = review.threshold
    summary = summary.replace(
        flagged=int(flags.sum()),
        kept=len(result.kept),
        removed=len(result.removed),
        noise=summary.noise.replace(threshold=threshold),
        review=ReviewFacts(decided=len(review.current), **review.counts()),
    )
    write_report(scored, summary, after.report)
    after.finish(summary)
    return summary
