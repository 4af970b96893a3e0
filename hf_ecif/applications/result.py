"""Result of an audit: rows with their influence, a summary, and the next steps."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from hf_ecif.applications.calibrate import sampled_rows
from hf_ecif.applications.export import export, rows_of_audit, rows_of_cleaning
from hf_ecif.applications.outputs import require_free, require_outside
from hf_ecif.config import ExportedRows, ExportFormat, Strategy
from hf_ecif.data.audit_folder import RESULTS, SUMMARY, AuditFolder
from hf_ecif.data.cleaning import CleanResult, clean
from hf_ecif.data.exports.rows import Exported
from hf_ecif.data.loading import load_rows
from hf_ecif.data.schema import check_columns
from hf_ecif.data.summary import CleaningFacts, Summary, TracedError, TraceSummary
from hf_ecif.detection.auditor import Auditor
from hf_ecif.errors import UserError
from hf_ecif.hub.push import PushReport, push
from hf_ecif.reports.audit import render_brief, render_report
from hf_ecif.reports.trace import write_trace_page, write_traces
from hf_ecif.utils.files import write_text
from hf_ecif.utils.formatting import share
from hf_ecif.utils.progress import ProgressFactory, silent, tqdm_bars

HEIGHT = 720  # height of a report in a notebook, in pixels


@dataclass(frozen=True)
class Traced:
    """Errors of the query, traced to the pairs behind them.

    Attributes:
        errors: the errors, the worst first.
        summary: summary of the trace.
        query_rows: data set of the query's rows, images undecoded.
    """

    errors: Sequence[TracedError]
    summary: TraceSummary
    query_rows: Dataset


@dataclass(frozen=True, repr=False)
class Audit:
    """An audited data set with its results.

    Attributes:
        dataset: all rows in their order, with influence columns; everything else is unchanged.
        summary: results in figures, and how they were computed.
        traced: traced errors of the query, or their folder; None if none were traced.
        auditor: what was learned, which judges any number of other rows alike; None of an audit
            that was loaded.
        sample: rows that ``hf-ecif calibrate`` drew to be judged; None if none were drawn.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> quick = hf_ecif.InfluenceConfig(fit_epochs=1, probes=2, partitions=2)
        >>> audit = hf_ecif.audit(demo.model, pairs, demo.query, config=quick)
        >>> cleaned = audit.clean()
        >>> len(cleaned.kept) + len(cleaned.removed)
        60
        >>> audit.report().html[:15]
        '<!DOCTYPE html>'
    """

    dataset: Dataset
    summary: Summary
    traced: Traced | AuditFolder | None = field(default=None, compare=False)
    auditor: Auditor | None = field(default=None, compare=False)
    sample: list[int] | None = field(default=None, compare=False)

    def clean(self, strategy: Strategy = "drop", *, share: float | None = None) -> Cleaned:
        """Kept rows and removed rows, the latter with their `ecif_reason`.

        Args:
            strategy: what to do with suspicious rows: ``drop``, ``worst``, ``weight`` or
                ``relabel``, see `hf_ecif.clean`.
            share: share of the rows that ``worst`` removes.

        Raises:
            UserError: there is no such strategy, or its share is missing.
        """
        result = clean(
            self.dataset,
            strategy,
            share=share,
            text_column=self.summary.columns.text,
            name_column=self.summary.reading.text,
        )
        return Cleaned(result.kept, result.removed, audit=self, strategy=strategy, share=share)

    def report(self) -> Report:
        """Page with figures and galleries of pairs, to show in a notebook or to save."""
        return Report(render_report(self._checked(self.dataset), self.summary))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write rows, summary and report into a folder, as ``hf-ecif audit`` does.

        Args:
            folder: new or empty.
            overwrite: whether an earlier audit in it is replaced.

        Raises:
            UserError: the folder holds something else, or cannot be written to.
        """
        path = Path(folder).expanduser()
        require_free(path, finished=SUMMARY, others=RESULTS, overwrite=overwrite)
        require_outside(path, [file["filename"] for file in self.dataset.cache_files])
        self.write(AuditFolder(path))

    def write(self, folder: AuditFolder) -> None:
        """Write into a folder that has been checked before."""
        scored, traced = self._checked(self.dataset), self.traced
        files = [traced.traces, traced.trace_page] if isinstance(traced, AuditFolder) else []
        contents = {file.name: file.read_bytes() for file in files}  # before they are cleared
        folder.clear()
        folder.write_rows(self._checked_parts(clean(self.dataset)), scored)
        for name, content in contents.items():
            (folder.path / name).write_bytes(content)
        if isinstance(traced, Traced):
            write_traces(traced.errors, folder.traces)
            page = folder.trace_page
            write_trace_page(traced.errors, traced.summary, scored, traced.query_rows, page)
        write_text(render_report(scored, self.summary), folder.report)
        folder.finish(self.summary)

    def export(
        self,
        to: ExportFormat,
        folder: str | Path,
        *,
        rows: ExportedRows = "usual",
        id_column: str | None = None,
        progress: ProgressFactory = silent,
    ) -> Exported:
        """Write rows for another tool, as ``hf-ecif export`` does.

        Args:
            to: the format, ``webdataset`` for instance.
            folder: new or empty.
            rows: which rows; if not given, those that the format is for.
            id_column: column of uids.
            progress: makes a progress bar.

        Raises:
            UserError: the folder holds something, or the format cannot hold these rows.
        """
        own = replace(rows_of_audit(self.dataset, self.summary.columns), id_column=id_column)
        return export(own, to, folder, rows, drawn=self.sample, progress=progress)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        progress: ProgressFactory = tqdm_bars,
        **options: Any,
    ) -> PushReport:
        """Publish the unflagged rows, and the flagged ones with their reasons beside them.

        Args:
            repo_id: ``owner/name``; made if it is missing.
            private: whether the repository is private.
            token: token with write access; the user's login if absent.
            progress: makes progress bars.
            options: further arguments of `hf_ecif.push`. Other splits of the source are published
                only with ``other_splits=True``, and only if the source has a name.

        Raises:
            UserError: not logged in, or not allowed.
        """
        return self.clean().push_to_hub(
            repo_id, private=private, token=token, progress=progress, **options
        )

    def _checked(self, rows: Dataset) -> Dataset:
        """Rows with undecoded images, as in files."""
        columns = self.summary.columns
        return check_columns(rows.with_format(None), columns.image, columns.text)

    def _checked_parts(self, parts: CleanResult) -> CleanResult:
        return CleanResult(self._checked(parts.kept), self._checked(parts.removed))

    def __repr__(self) -> str:
        found = self.summary
        head = (
            f"Audit({found.rows:,} rows, {found.flagged:,} flagged, estimated noise "
            f"{found.noise.told}, {found.unreadable:,} unreadable)"
        )
        notes = [*found.warnings]
        if found.learned_from:
            notes.insert(0, f"Learned from {found.learned_from:,} of the rows")
        if found.noise.abstains:
            notes.insert(0, f"Nothing is flagged: {found.noise.abstains}")
        return "\n".join([head, *(f"  {note}" for note in notes)])

    def _repr_html_(self) -> str:
        return render_brief(self.summary)


@dataclass(frozen=True, repr=False)
class Cleaned(CleanResult):
    """The rows of an audit in two parts, which together are all of them.

    Attributes:
        kept: the kept rows.
        removed: the removed rows, each with its `ecif_reason`.
        audit: audit of the rows.
        strategy: strategy by which they were split.
        share: share of removed rows, for ``worst``.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> quick = hf_ecif.InfluenceConfig(fit_epochs=1, probes=2, partitions=2)
        >>> audit = hf_ecif.audit(demo.model, pairs, demo.query, config=quick)
        >>> cleaned = audit.clean("worst", share=0.1)
        >>> len(cleaned.kept), len(cleaned.removed)
        (54, 6)
    """

    audit: Audit
    strategy: Strategy
    share: float | None = None

    def save(self, folder: str | Path) -> None:
        """Write both parts with summary and report into a new folder, as ``hf-ecif clean`` does.

        Raises:
            UserError: the folder is not empty, or cannot be written to.
        """
        path = Path(folder).expanduser()
        require_free(path)
        self._write(AuditFolder(path))

    def _write(self, folder: AuditFolder) -> None:
        counts = self.counts()
        cleaning = CleaningFacts(
            audit=self.audit.summary.dataset,
            strategy=self.strategy,
            share=self.share,
            counts=counts,
        )
        summary = self.audit.summary.replace(
            cleaning=cleaning, kept=counts["kept"], removed=counts["removed"]
        )
        folder.write_rows(self.audit._checked_parts(self))
        folder.write_cleaning(cleaning)
        audit = Audit(self.audit.dataset, summary)
        audit.report().save(folder.report)
        folder.finish(summary)

    def export(
        self,
        to: ExportFormat,
        folder: str | Path,
        *,
        rows: ExportedRows = "usual",
        id_column: str | None = None,
        repeats: int = 0,
        progress: ProgressFactory = silent,
    ) -> Exported:
        """Write rows for another tool; see `Audit.export`.

        Args:
            repeats: copies of a row of weight 1; after ``clean("weight")``, others are written as
                often as their weight says. 0 writes each row once.

        Raises:
            UserError: the folder holds something, or the format cannot hold these rows.
        """
        own = rows_of_cleaning(self.kept, self.removed, self.audit.summary.columns)
        own = replace(own, id_column=id_column, repeats=repeats)
        return export(own, to, folder, rows, progress=progress)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        progress: ProgressFactory = tqdm_bars,
        **options: Any,
    ) -> PushReport:
        """Publish the kept rows, and the removed ones beside them; see `Audit.push_to_hub`.

        Raises:
            UserError: not logged in, or not allowed.
        """
        options.setdefault("other_splits", False)
        with TemporaryDirectory(prefix="hf-ecif-") as folder:
            self._write(AuditFolder(Path(folder)))
            return push(folder, repo_id, private=private, token=token, progress=progress, **options)

    def __repr__(self) -> str:
        told = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in self.counts().items())
        how = self.strategy if self.share is None else f"{self.strategy} {share(self.share)}"
        return f"Cleaned({how}: {told})"


@dataclass(frozen=True, repr=False)
class Report:
    """A page that needs only a browser.

    Attributes:
        html: the whole page.
    """

    html: str

    def save(self, path: str | Path) -> None:
        """Write the page to a file."""
        write_text(self.html, Path(path).expanduser())

    def _repr_html_(self) -> str:
        """The page in a frame, which separates its style from the notebook's."""
        page = html.escape(self.html)
        return (
            f'<iframe srcdoc="{page}" style="width: 100%; height: {HEIGHT}px; border: 0" '
            'title="Report of the audit"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Report({len(self.html):,} characters of HTML; save(path) writes them)"


def load_audit(folder: str | Path) -> Audit:
    """Audit that `Audit.save` or ``hf-ecif audit`` wrote, in this or an earlier version.

    Raises:
        UserError: there is no audit, or its rows do not match its summary.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> quick = hf_ecif.InfluenceConfig(fit_epochs=1, probes=2, partitions=2)
        >>> audit = hf_ecif.audit(demo.model, pairs, demo.query, config=quick)
        >>> from tempfile import mkdtemp
        >>> folder = mkdtemp()
        >>> audit.save(folder)
        >>> hf_ecif.load_audit(folder).summary.flagged == audit.summary.flagged
        True
    """
    place = AuditFolder(Path(folder).expanduser())
    summary = place.read_summary()
    if not place.has_rows:
        raise UserError(
            f"{place.path} is no audit's folder, but that of a cleaning of one: its rows are in "
            "kept/ and removed/, which load_dataset opens."
        )
    dataset = load_rows(str(place.scored), "train")
    if len(dataset) != summary.rows:
        raise UserError(
            f"{place.scored} has {len(dataset):,} rows, but {summary.rows:,} were audited. Run "
            "the audit again."
        )
    traced = place if place.traces.is_file() else None
    return Audit(dataset, summary, traced, sample=sampled_rows(place))
