"""From an audit and a person's decisions to a new audit's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf_ecif.data.loading import load_rows
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.review import Review, part_by_review
from hf_ecif.data.schema import check_columns
from hf_ecif.reports.audit import write_report
from hf_ecif.utils.files import read_json, write_json
from hf_ecif.utils.formatting import Bools


def apply_review(audit: Path, review: Review, output: Path) -> dict[str, Any]:
    """Write an audit anew, by a person's decisions.

    Args:
        audit: folder of an audit.
        review: the decisions.
        output: new folder, an audit's as well.

    Returns:
        The summary, as in ``summary.json``: that of the audit with new numbers, and ``review``.

    Raises:
        UserError: there is no audit, or the decisions belong to another one.
    """
    summary = read_json(audit / "summary.json")
    image, text = summary["columns"]["image"], summary["columns"]["text"]
    scored = check_columns(load_rows(str(audit / "scored"), "train"), image, text)
    threshold = summary["noise"]["threshold"]
    scored, result = part_by_review(scored, review, threshold=threshold, text_column=text)
    for name, part in (("scored", scored), ("kept", result.kept), ("removed", result.removed)):
        write_shards(part, output / name)
    flags: Bools = np.array(scored.with_format(None)["ecif_flag"][:]) == True  # noqa: E712
    if review.threshold is not None:
        threshold = review.threshold
    summary |= {
        "flagged": int(flags.sum()),
        "kept": len(result.kept),
        "removed": len(result.removed),
        "noise": summary["noise"] | {"threshold": threshold},
        "review": {"decided": len(review.current), **review.counts()},
    }
    write_report(scored, summary, output / "report.html")
    write_json(summary, output / "summary.json")
    return summary
