"""Verdicts as issues of cleanlab's Datalab, with a script that opens them in one.

An issue has two columns, ``is_..._issue`` and ``..._score``, which is low where it is bad. The
script registers them as kinds of issues, so that Datalab's own tables and reports have them; it
was run with cleanlab 2.9.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_ecif.data.exports.rows import ROW, Exported, ExportRows
from hf_ecif.utils.files import aside, write_text

ISSUES, SCRIPT = "issues.csv", "open.py"
KINDS = ("mismatch", "copy", "unreadable")
NAMES = (
    ROW,
    *(name for kind in KINDS for name in (f"is_{kind}_issue", f"{kind}_score")),
    "given_label",
    "predicted_label",
)
OPEN = '''"""Look at these issues with cleanlab: python -i open.py"""

from pathlib import Path

import pandas as pd
from cleanlab import Datalab
from cleanlab.datalab.internal.issue_manager import IssueManager
from cleanlab.datalab.internal.issue_manager_factory import register

table = pd.read_csv(Path(__file__).resolve().parent / "issues.csv", index_col="row")


class Found(IssueManager):
    """What hf_ecif found."""

    def find_issues(self, **_):
        columns = [f"is_{self.issue_name}_issue", f"{self.issue_name}_score"]
        self.issues = table[columns].reset_index(drop=True)
        self.summary = self.make_summary(score=1 - self.issues[columns[0]].mean())


class Mismatch(Found):
    description = "Captions that do not fit their images."
    issue_name = "mismatch"


class Copy(Found):
    description = "Rows with nearly the same image, or the same caption, as another one."
    issue_name = "copy"


class Unreadable(Found):
    description = "Rows whose image or caption cannot be read."
    issue_name = "unreadable"


kinds = [Mismatch, Copy, Unreadable]
for kind in kinds:
    register(kind)
lab = Datalab({"caption": table["given_label"].tolist()})
lab.find_issues(issue_types={kind.issue_name: {} for kind in kinds})
lab.report()
'''


def write_issues(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """`issues.csv`, a line a row, and `open.py`.

    The given label of a pair is its caption; where a better one is suggested, it is predicted.
    """
    with aside(folder / ISSUES) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        sheet = csv.DictWriter(file, NAMES)
        sheet.writeheader()
        for issue in _issues(rows):
            sheet.writerow(issue)
            advance(1)
    write_text(OPEN, folder / SCRIPT)
    return Exported(len(rows), [ISSUES, SCRIPT], f"python -i {SCRIPT}")


def _issues(rows: ExportRows) -> Iterator[dict[str, Any]]:
    for number, cells in rows.records():
        flag, probability = cells.get("ecif_flag"), cells.get("ecif_noise_probability")
        is_copy = cells.get("ecif_duplicate_group") is not None
        suggested = cells.get("ecif_suggested_text")
        caption = cells[rows.columns.text]
        yield {
            ROW: number,
            "is_mismatch_issue": flag is True,
            "mismatch_score": None if probability is None else 1 - probability,
            "is_copy_issue": is_copy,
            "copy_score": float(not is_copy),
            "is_unreadable_issue": flag is None,
            "unreadable_score": float(flag is not None),
            "given_label": caption,
            "predicted_label": caption if suggested is None else suggested,
        }
