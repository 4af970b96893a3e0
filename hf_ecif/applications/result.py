"""What an audit gives: rows with their influence, what was found, and the ways on from there."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from hf_ecif.applications.outputs import require_free
from hf_ecif.data.audit_folder import RESULTS, SUMMARY, AuditFolder
from hf_ecif.data.cleaning import CleanResult, Strategy, clean
from hf_ecif.data.loading import load_rows
from hf_ecif.data.schema import check_columns
from hf_ecif.data.summary import CleaningFacts, Summary, TracedError, TraceSummary
from hf_ecif.errors import UserError
from hf_ecif.hub.push import PushReport, push
from hf_ecif.reports.audit import render_brief, render_report
from hf_ecif.reports.trace import write_trace_page, write_traces
from hf_ecif.utils.files import write_text
from hf_ecif.utils.formatting import share
from hf_ecif.utils.progress import ProgressFactory, tqdm_bars

HEIGHT = 720  # of a report in a notebook, in pixels


@dataclass(frozen=True)
class Traced:
    """Errors of the query, traced to the pairs behind them, with what their page shows.

    Attributes:
        errors: the worst first.
        summary: of the trace.
        query_rows: the data set that the query's rows are of, images undecoded.
    """

    errors: Sequence[TracedError]
    summary: TraceSummary
    query_rows: Dataset


@dataclass(frozen=True, repr=False)
class Audit:
    """A data set with what was found in it.

    Attributes:
        dataset: all rows in their order, with the influence columns; all else is untouched.
        summary: what was found, in figures, and how.
        traced: errors of the query, where they were traced; or the folder that they are in.
    """

    dataset: Dataset
    summary: Summary
    traced: Traced | AuditFolder | None = field(default=None, compare=False)

    def clean(self, strategy: Strategy = "drop", *, share: float | None = None) -> Cleaned:
        """The rows to go on with, and the others, each with its `ecif_reason`.

        Args:
            strategy: what becomes of suspicious rows: ``drop``, ``worst``, ``weight`` or
                ``relabel``, as `hf_ecif.clean` explains.
            share: of the rows that ``worst`` removes.

        Raises:
            UserError: the strategy is none, or lacks what it needs.
        """
        text = self.summary.columns.text
        result = clean(self.dataset, strategy, share=share, text_column=text)
        return Cleaned(result.kept, result.removed, audit=self, strategy=strategy, share=share)

    def report(self) -> Report:
        """The figures and galleries of pairs, as a page to look at in a notebook or to save."""
        return Report(render_report(self._checked(self.dataset), self.summary))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write rows, summary and report into a folder, the same as ``hf-ecif audit`` writes.

        Args:
            folder: new or empty.
            overwrite: whether an earlier audit in it is replaced.

        Raises:
            UserError: the folder holds something else, or cannot be written to.
        """
        path = Path(folder).expanduser()
        require_free(path, finished=SUMMARY, others=RESULTS, overwrite=overwrite)
        self.write(AuditFolder(path))

    def write(self, folder: AuditFolder) -> None:
        """Write into a folder of which it is known what may become of it."""
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        progress: ProgressFactory = tqdm_bars,
        **options: Any,
    ) -> PushReport:
        """Publish the rows that are not flagged, and beside them the others with their reasons.

        Args:
            repo_id: ``owner/name``; made if it is missing.
            private: whether others see it.
            token: with write access; the user's login if absent.
            progress: makes progress bars.
            options: further ones of `hf_ecif.push`. The other splits of the source come along
                only where asked for (``other_splits=True``), and where the source has a name.

        Raises:
            UserError: not logged in, or not allowed.
        """
        return self.clean().push_to_hub(
            repo_id, private=private, token=token, progress=progress, **options
        )

    def _checked(self, rows: Dataset) -> Dataset:
        """Rows as files hold them: images undecoded."""
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
        if found.noise.abstains:
            notes.insert(0, f"Nothing is flagged: {found.noise.abstains}")
        return "\n".join([head, *(f"  {note}" for note in notes)])

    def _repr_html_(self) -> str:
        return render_brief(self.summary)


@dataclass(frozen=True, repr=False)
class Cleaned(CleanResult):
    """The rows of an audit in two parts, which together are all of them.

    Attributes:
        kept: rows to go on with.
        removed: the others, each with its `ecif_reason`.
        audit: where they are from.
        strategy: by which they were parted.
        share: of the rows that were removed, for ``worst``.
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        progress: ProgressFactory = tqdm_bars,
        **options: Any,
    ) -> PushReport:
        """Publish the rows kept, and the removed ones beside them; see `Audit.push_to_hub`.

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
    """A page that needs nothing but a browser.

    Attributes:
        html: all of it.
    """

    html: str

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        write_text(self.html, Path(path).expanduser())

    def _repr_html_(self) -> str:
        """In a frame of its own, so that its style and the notebook's do not meet."""
        page = html.escape(self.html)
        return (
            f'<iframe srcdoc="{page}" style="width: 100%; height: {HEIGHT}px; border: 0" '
            'title="Report of the audit"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Report({len(self.html):,} characters of HTML; save(path) writes them)"


def load_audit(folder: str | Path) -> Audit:
    """An audit that `Audit.save` or ``hf-ecif audit`` wrote, of this version or an earlier one.

    Raises:
        UserError: there is none, or its rows are not those that its summary tells of.
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
    return Audit(dataset, summary, place if place.traces.is_file() else None)
