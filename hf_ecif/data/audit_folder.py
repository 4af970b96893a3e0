"""An audit's folder: what lies where in it, and what state it is in.

    scored/ kept/ removed/    rows as parquet; the last two together are the first
    summary.json              a `Summary`; written last, so that a folder with one is finished
    report.html
    trace.parquet trace.html  errors of the query and the pairs behind them, if they were traced
    cleaning.json             where `clean` made the folder of another audit's
    calibration/              rows drawn for a person to judge, as sheets, and how they were drawn
    review.jsonl              what a person decided, in the order in which it was decided
    cleaning.html             models fine-tuned before and after, if they were compared

What `clean` makes of an audit, and what a review does, are such folders again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
from datasets import Dataset, Features

from hf_ecif.data.cleaning import CleanResult
from hf_ecif.data.lists import count_pairs_of, fold
from hf_ecif.data.parquet import parquet_files, write_shards
from hf_ecif.data.summary import CleaningFacts, Summary
from hf_ecif.errors import UserError
from hf_ecif.utils.files import CHECKPOINTS, sweep, write_json

Part = Literal["scored", "kept", "removed"]
SUMMARY = "summary.json"
RESULTS = (
    "scored",
    "kept",
    "removed",
    SUMMARY,
    "report.html",
    "trace.parquet",
    "trace.html",
    "calibration",
)


@dataclass(frozen=True)
class AuditFolder:
    """Where an audit is kept.

    Attributes:
        path: of the folder; it need not be there yet.
    """

    path: Path

    @classmethod
    def around(cls, path: Path) -> AuditFolder:
        """The folder of an audit, by its own path or by that of its scored rows."""
        folder = cls(path)
        return folder if folder.has_rows else cls(path.parent)

    @property
    def scored(self) -> Path:
        """Folder of all rows with their influence columns."""
        return self.path / "scored"

    @property
    def summary(self) -> Path:
        return self.path / SUMMARY

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def traces(self) -> Path:
        """A row for every traced error and every pair behind it."""
        return self.path / "trace.parquet"

    @property
    def trace_page(self) -> Path:
        return self.path / "trace.html"

    @property
    def calibration(self) -> Path:
        """Folder of the rows that were drawn to be judged."""
        return self.path / "calibration"

    @property
    def cleaning(self) -> Path:
        """What is told of the cleaning that made this folder."""
        return self.path / "cleaning.json"

    @property
    def decisions(self) -> Path:
        """Steps of a review; a new audit of the same rows goes on with them."""
        return self.path / "review.jsonl"

    @property
    def cleaning_page(self) -> Path:
        return self.path / "cleaning.html"

    @property
    def has_summary(self) -> bool:
        """Whether it tells how its rows were audited."""
        return self.summary.is_file()

    @property
    def has_rows(self) -> bool:
        """Whether all rows are there, with their scores."""
        return self.scored.is_dir()

    @property
    def is_interrupted(self) -> bool:
        """Whether an audit was begun here, and is to be gone on with."""
        return (self.path / CHECKPOINTS).is_dir() and not (self.has_summary and self.has_rows)

    @property
    def is_cleaning(self) -> bool:
        """Whether `clean` made it."""
        return self.cleaning.is_file()

    def shards(self, part: Part) -> list[Path]:
        """Parquet files of a part, in order."""
        return parquet_files(self.path / part)

    def count(self, part: Part) -> int:
        """Rows of a part; of lists of captions, the captions."""
        return count_pairs_of(self.shards(part))

    def features(self, part: Part) -> Features:
        """Columns of a part and their types."""
        return Features.from_arrow_schema(pq.read_schema(self.shards(part)[0]))

    def read_summary(self) -> Summary:
        """What the audit found.

        Raises:
            UserError: there is no finished audit, or its summary is damaged.
        """
        if self.is_interrupted:
            raise UserError(
                f"The audit in {self.path} was interrupted. Finish it first, with `resume`."
            )
        if not self.has_summary:
            raise UserError(
                f"{self.path} holds no finished audit ({SUMMARY} and scored/). Run hf-ecif audit "
                "first, and give its `output`."
            )
        return Summary.load(self.summary)

    def check_counts(self, summary: Summary) -> None:
        """Check that the rows kept and removed are those that were audited.

        Raises:
            UserError: some are missing, or too many.
        """
        parts: tuple[tuple[Part, int], ...] = (
            ("kept", summary.kept),
            ("removed", summary.removed),
        )
        for part, expected in parts:
            found = self.count(part)
            if found != expected:
                raise UserError(
                    f"{self.path / part} has {found:,} rows, but the audit wrote {expected:,}. "
                    "Something has changed it since: run the audit again."
                )
        both = summary.kept + summary.removed
        if both != summary.rows:
            raise UserError(
                f"{self.path} has {both:,} rows kept and removed, but {summary.rows:,} were "
                "audited. Run the audit again."
            )

    def write_rows(self, result: CleanResult, scored: Dataset | None = None) -> None:
        """Write the rows kept and removed, and all of them with their scores.

        Captions that came in lists are in lists again; see `hf_ecif.data.lists`.
        """
        if scored is not None:
            write_shards(fold(scored), self.scored)
        write_shards(fold(result.kept), self.path / "kept")
        write_shards(fold(result.removed), self.path / "removed")

    def replace_rows(self, other: AuditFolder) -> None:
        """Take over rows and report from another folder, which is removed; the summary is not."""
        for part in ("scored", "kept", "removed"):
            shutil.rmtree(self.path / part)
            (other.path / part).replace(self.path / part)
        other.report.replace(self.report)
        shutil.rmtree(other.path)

    def write_cleaning(self, cleaning: CleaningFacts) -> None:
        """Write what is told of the cleaning that made this folder."""
        write_json(cleaning.to_dict(), self.cleaning)

    def finish(self, summary: Summary) -> None:
        """Write the summary, as the last file."""
        summary.save(self.summary)

    def clear(self) -> None:
        """Remove the results of an earlier run, and what one that was killed left behind."""
        for path in (self.path / name for name in RESULTS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        sweep(self.path)
