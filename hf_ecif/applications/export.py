"""From the rows of an audit, or of a cleaning, to the formats of other tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from hf_ecif.applications.calibrate import sampled_rows
from hf_ecif.applications.outputs import require_free, require_outside
from hf_ecif.applications.requests import ExportRequest
from hf_ecif.config import ExportedRows
from hf_ecif.data.audit_folder import AuditFolder, Part
from hf_ecif.data.exports.rows import Exported, ExportRows
from hf_ecif.data.exports.targets import FORMATS, write_export
from hf_ecif.data.loading import load_rows, load_scored
from hf_ecif.data.review import is_kept
from hf_ecif.data.schema import check_columns
from hf_ecif.data.summary import Columns
from hf_ecif.errors import UserError
from hf_ecif.utils.progress import ProgressFactory, silent


def run_export(request: ExportRequest, progress: ProgressFactory = silent) -> Exported:
    """What was written of an audit, or of a cleaning, as the request says.

    Raises:
        UserError: there is no audit, the output has something in it, or the format cannot hold
            these rows.
    """
    folder = AuditFolder(request.audit)
    columns = folder.read_summary().columns
    require_outside(request.output, [request.audit])
    if folder.has_rows:
        rows = rows_of_audit(load_scored(folder, columns), columns)
    else:
        rows = rows_of_cleaning(_open_part(folder, "kept"), _open_part(folder, "removed"), columns)
    rows = replace(rows, id_column=request.id_column, repeats=request.repeats)
    drawn = sampled_rows(folder) if folder.has_rows else None
    return export(rows, request.to, request.output, request.rows, drawn=drawn, progress=progress)


def rows_of_audit(scored: Dataset, columns: Columns) -> ExportRows:
    """All rows of an audit, images not decoded."""
    numbers = np.arange(len(scored))
    return ExportRows(_undecoded(scored, columns), numbers, is_kept(scored), columns)


def rows_of_cleaning(kept: Dataset | None, removed: Dataset | None, columns: Columns) -> ExportRows:
    """The kept rows of a cleaning and after them the removed ones; None is no rows."""
    parts = [part for part in (kept, removed) if part is not None and len(part)]
    rows = _undecoded(concatenate_datasets(parts), columns)
    numbers = np.arange(len(rows))
    return ExportRows(
        rows, numbers, numbers < (len(kept) if kept else 0), columns, are_numbered=False
    )


def export(
    rows: ExportRows,
    to: str,
    folder: str | Path,
    which: ExportedRows = "usual",
    *,
    drawn: list[int] | None = None,
    progress: ProgressFactory = silent,
) -> Exported:
    """What was written of some rows into a new folder.

    Args:
        rows: all rows.
        to: name of the format, see `FORMATS`.
        folder: new or empty.
        which: the rows to write.
        drawn: rows that were drawn for a person to judge, in the order of their sheet.
        progress: makes a progress bar.

    Raises:
        UserError: the folder holds something, or the format cannot hold these rows.
    """
    path = Path(folder).expanduser()
    require_free(path)
    if to not in FORMATS:
        raise UserError(f"`to={to}`: must be one of {', '.join(FORMATS)}.")
    return write_export(_choose(rows, _meant(which, to, drawn), drawn), to, path, progress)


def _meant(which: ExportedRows, to: str, drawn: list[int] | None) -> ExportedRows:
    """The rows that are meant by ``usual``: a sample where one was drawn to be judged."""
    if which != "usual":
        return which
    usual = FORMATS[to].usual
    return "sample" if usual == "flagged" and drawn else usual


def _choose(rows: ExportRows, which: ExportedRows, drawn: list[int] | None) -> ExportRows:
    if which == "all":
        return rows
    if which == "sample":
        if not drawn:
            raise UserError(
                "`rows=sample`: no rows of this audit were drawn to be judged. Draw some first: "
                "hf-ecif calibrate, with `sample=30`."
            )
        return replace(rows.select(np.array(drawn)), is_sample=True)
    if which == "flagged":
        chosen = np.array([flag is True for flag in rows.column("ecif_flag")])
    else:
        chosen = rows.kept if which == "kept" else ~rows.kept
    if not chosen.any():
        raise UserError(f"`rows={which}`: there are none. Choose others.")
    return rows.select(np.flatnonzero(chosen))


def _open_part(folder: AuditFolder, part: Part) -> Dataset | None:
    return load_rows(str(folder.path / part), "train") if folder.count(part) else None


def _undecoded(rows: Dataset, columns: Columns) -> Dataset:
    return check_columns(rows.with_format(None), columns.image, columns.text)
