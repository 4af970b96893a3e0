"""Formats that an audit's rows leave in, by name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hf_ecif.config import ExportedRows
from hf_ecif.data.exports.cleanlab import write_issues
from hf_ecif.data.exports.fiftyone import write_samples
from hf_ecif.data.exports.keys import write_keys
from hf_ecif.data.exports.label_studio import write_tasks
from hf_ecif.data.exports.lightly import write_captions
from hf_ecif.data.exports.parquet_ids import write_ids
from hf_ecif.data.exports.rows import Exported, ExportRows, Target
from hf_ecif.data.exports.uids import write_uids
from hf_ecif.data.exports.webdataset import write_tars
from hf_ecif.errors import UserError
from hf_ecif.utils.files import aside_folder
from hf_ecif.utils.progress import ProgressFactory, silent


class Format(NamedTuple):
    """A format to export to.

    Attributes:
        write: writes it.
        usual: rows that it is for.
        repeats: whether a row may stand in it more than once.
        shows: whether it shows pictures.
    """

    write: Target
    usual: ExportedRows
    repeats: bool = False
    shows: bool = False


FORMATS = {
    "parquet-ids": Format(write_ids, "all", repeats=True),
    "uids": Format(write_uids, "kept", repeats=True),
    "keys": Format(write_keys, "kept", repeats=True),
    "webdataset": Format(write_tars, "kept", repeats=True, shows=True),
    "label-studio": Format(write_tasks, "flagged", shows=True),
    "fiftyone": Format(write_samples, "all", shows=True),
    "lightly": Format(write_captions, "all", shows=True),
    "cleanlab": Format(write_issues, "all"),
}


def write_export(
    rows: ExportRows, to: str, folder: Path, progress: ProgressFactory = silent
) -> Exported:
    """Write rows in a format; the folder appears when all of them are written.

    Args:
        rows: the rows.
        to: name of the format.
        folder: a folder that does not exist yet, or is empty.
        progress: makes a progress bar.

    Raises:
        UserError: the format cannot hold these rows, or is none.
    """
    if to not in FORMATS:
        raise UserError(f"`to={to}`: must be one of {', '.join(FORMATS)}.")
    if rows.repeats and not FORMATS[to].repeats:
        able = ", ".join(name for name, one in FORMATS.items() if one.repeats)
        raise UserError(f"`repeats={rows.repeats}`: {to} has each row once. Repeat rows of {able}.")
    if FORMATS[to].shows and not rows.has_pictures:
        able = ", ".join(name for name, one in FORMATS.items() if not one.shows)
        raise UserError(
            f"These rows are embeddings without pictures, which {to} shows. Give {able}."
        )
    rows = rows.repeated()
    if not len(rows):
        raise UserError("There are no such rows to export. Choose others with `rows`.")
    with aside_folder(folder) as partial:
        return FORMATS[to].write(rows, partial, progress("Export", len(rows)))
