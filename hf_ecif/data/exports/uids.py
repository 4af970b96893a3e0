"""The uids of rows as DataComp's tools take them, a sorted array of pairs of 64-bit numbers.

Its resharder (in https://github.com/mlfoundations/datacomp) finds samples by binary search, and
writes one as many times as its uid stands there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_ecif.data.exports.ids import read_ids
from hf_ecif.data.exports.rows import Exported, ExportRows
from hf_ecif.errors import UserError
from hf_ecif.utils.files import aside

FILE = "uids.npy"
UID = np.dtype("u8,u8")
_HEXADECIMAL = re.compile(r"[0-9a-fA-F]{32}")


def write_uids(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """128-bit uids in lexicographic order; each once, or where rows are repeated, as often.

    Raises:
        UserError: there is no column of uids, or a value is none.
    """
    column, values = read_ids(rows, ("uid",))
    pairs = np.array(
        [
            _halves(value, column, number)
            for number, value in zip(rows.numbers, values, strict=True)
        ],
        dtype=UID,
    )
    uids = np.sort(pairs) if rows.repeats else np.unique(pairs)
    with aside(folder / FILE) as partial, partial.open("wb") as file:
        np.save(file, uids)
    advance(len(rows))
    equal = len(rows) - len(uids)
    notes = [f"{equal:,} rows have the uid of another one, which is written once."]
    return Exported(len(uids), [FILE], f"numpy.load({FILE!r})", notes if equal else [])


def _halves(value: Any, column: str, number: int) -> tuple[int, int]:
    if not isinstance(value, str) or not _HEXADECIMAL.fullmatch(value):
        raise UserError(
            f"Row {number:,}: {column} = {value!r} is no uid, which has 32 hexadecimal digits. "
            "Name the column of uids with `id_column`."
        )
    return int(value[:16], 16), int(value[16:], 16)
