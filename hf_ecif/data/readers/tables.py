"""Tables that name pictures or hold them: csv, tsv, JSON lines, parquet and arrow.

The builders of `datasets` read them. For a csv, its separator and its encoding are found here; and
paths of pictures are looked for beside the table that names them.
"""

from __future__ import annotations

import codecs
import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, Features, Image, IterableDataset, Value

from hf_ecif.data.columns import replace_column
from hf_ecif.errors import UserError

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

# Loaders of `datasets` by suffix.
LOADERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")  # of csv and json, which `datasets` unpacks
PATH_COLUMNS = ("image", "file_name", "filepath", "image_path", "path", "file")
_SEPARATORS = "\t;,|"
_LOOKED_AT = 200  # rows in which the separator must be the same
_SAMPLE = 16  # cells of a column that are looked for as files
_log = logging.getLogger(__name__)


def loader_of(path: str | Path) -> str | None:
    """Loader of `datasets` for a table; None for another file."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return LOADERS.get(suffixes[-1]) if suffixes else None


def csv_options(path: Path) -> dict[str, Any]:
    """Options by which the csv builder reads a file: separator, quotes, encoding and nulls.

    Only an empty cell is null: "None" and "NA" may be captions.

    Raises:
        UserError: the file is empty.
    """
    common = {"keep_default_na": False, "na_values": [""]}
    if path.suffix.lower() in PACKED:
        return common
    encoding = _encoding(path)
    if encoding == "latin-1":
        _log.warning("%s is not UTF-8, and is read as Latin-1.", path)
    with path.open(encoding=encoding, newline="") as file:
        lines = list(islice(file, _LOOKED_AT + 1))
    if not "".join(lines).strip():
        raise UserError("the table is empty.")
    separator, quoting = _separator(lines)
    return {**common, "sep": separator, "quoting": quoting, "encoding": encoding}


def require_header(path: Path) -> None:
    """Refuse a csv whose first line is a row already, which would be lost.

    Raises:
        UserError: one of its cells is the path of a file beside it.
    """
    if path.suffix.lower() in PACKED:
        return
    options = csv_options(path)
    with path.open(encoding=options["encoding"], newline="") as file:
        reader = csv.reader(file, delimiter=options["sep"], quoting=options["quoting"])
        header = next(reader, [])
    named = [cell for cell in header if cell and _is_file(path.parent / cell)]
    if named:
        raise UserError(
            f"the first line of {path.name} must name the columns, but it is a row: {named[0]} is "
            "a file. Put a line such as 'filepath,title' before it."
        )


def _encoding(path: Path) -> str:
    """UTF-8 with or without a mark, UTF-16 with one, or else Latin-1, in which every byte is."""
    with path.open("rb") as file:
        start = file.read(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        decoder = codecs.getincrementaldecoder("utf-8")()
        file.seek(0)
        try:
            while block := file.read(2**20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8-sig" if start.startswith(codecs.BOM_UTF8) else "utf-8"


def _separator(lines: list[str]) -> tuple[str, int]:
    """What cuts all lines into as many cells as the first, and how cells are quoted."""
    best = (",", csv.QUOTE_MINIMAL)
    most = 0
    for separator in _SEPARATORS:
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            rows = [row for row in csv.reader(lines, delimiter=separator, quoting=quoting) if row]
            # The last row may have been cut off within quotes.
            counts = {len(row) for row in (rows[:-1] if len(rows) > 2 else rows)}
            # A quote that opens and never closes would take the rest of the table in.
            if len(counts) == 1 and len(rows[0]) > 1 and len(rows) > most:
                best, most = (separator, quoting), len(rows)
    return best


def find_pictures(rows: AnyDataset, bases: Sequence[Path], column: str | None) -> AnyDataset:
    """Rows whose column of paths has become one of images, with paths that lead to the files.

    Args:
        rows: rows of a table.
        bases: folders that the paths may be relative to, the likeliest first.
        column: which column; if absent, the one that names files, where there is but one.
    """
    found = _column_of_paths(rows, bases, column)
    if found is None:
        return rows
    name, likeliest = found
    places = sorted(bases, key=lambda base: base != likeliest)  # the others keep their order

    def lead(values: Sequence[str | None]) -> list[dict[str, Any] | None]:
        return [
            None if value is None else {"bytes": None, "path": str(leads_to(value, places))}
            for value in values
        ]

    if isinstance(rows, Dataset):  # `map` would write a copy of all columns beside the source
        return replace_column(rows, name, lead(rows.with_format(None)[name][:]), Image())
    kinds = Features(**{**(rows.features or {}), name: Image(decode=False)})
    led = rows.map(lambda batch: {name: lead(batch[name])}, batched=True, features=kinds)
    return led.cast_column(name, Image())


def _column_of_paths(
    rows: Dataset | IterableDataset, bases: Sequence[Path], column: str | None
) -> tuple[str, Path] | None:
    """A column of paths, and the folder that they are relative to."""
    kinds: Mapping[str, Any] = rows.features or {}
    names = [
        name
        for name, kind in kinds.items()
        if isinstance(kind, Value) and kind.dtype in ("string", "large_string")
    ]
    if column is not None:
        names = [name for name in names if name == column]
    if not names or not bases:
        return None
    first = list(rows.select_columns(names).take(_SAMPLE))
    found = {name: _base_of((row[name] for row in first), bases) for name in names}
    known = {name: base for name, base in found.items() if base is not None}
    usual = [name for name in PATH_COLUMNS if name in known]
    chosen = [*usual, *(known if len(known) == 1 else ())]
    return (chosen[0], known[chosen[0]]) if chosen else None


def _base_of(values: Iterable[Any], bases: Sequence[Path]) -> Path | None:
    """The folder in which most of the paths are files."""
    paths = [value for value in values if isinstance(value, str) and 0 < len(value) < 1024]
    for base in bases:
        there = sum(_is_file(base / path) for path in paths)
        if 2 * there >= len(paths) > 0:
            return base
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def leads_to(path: str, bases: Sequence[Path]) -> Path:
    """Where the file of a path is; below the first of the folders where it is in none."""
    return next((base / path for base in bases if _is_file(base / path)), bases[0] / path)
