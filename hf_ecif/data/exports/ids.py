"""What rows are called by the data that they are from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from datasets import Value

from hf_ecif.data.exports.rows import ExportRows
from hf_ecif.errors import UserError

JSON = "json"  # field of a tar that may hold the id


def read_ids(rows: ExportRows, usual: Sequence[str]) -> tuple[str, list[Any]]:
    """The column of ids, and its values: the one that was given, or one of the usual ones.

    Ids may also lie within the json of a sample; `json.uid` names such a one.

    Raises:
        UserError: there is none.
    """
    wanted = [rows.id_column] if rows.id_column else list(usual)
    for name in wanted:
        for column in (name, f"{JSON}.{name}"):
            values = _values(rows, column)
            if values is not None:
                return column, values
    told = f"no column {rows.id_column!r}" if rows.id_column else f"no column {wanted[0]!r} of ids"
    raise UserError(
        f"There is {told}, neither by itself nor in {JSON!r}. The columns are: "
        f"{', '.join(rows.names)}. Name the right one with `id_column`."
    )


def _values(rows: ExportRows, column: str) -> list[Any] | None:
    if column in rows.names:
        return rows.column(column)
    outer, _, inner = column.partition(".")
    if not inner or outer not in rows.names:
        return None
    kind = rows.dataset.features[outer]
    if isinstance(kind, dict) and inner in kind:
        return [cell and cell[inner] for cell in rows.column(outer)]
    if isinstance(kind, Value) and kind.dtype in ("string", "large_string"):
        found = [_field(text, inner) for text in rows.column(outer)]
        return found if any(value is not None for value in found) else None
    return None


def _field(text: str | None, name: str) -> Any:
    try:
        values = json.loads(text or "")
    except ValueError:
        return None
    return values.get(name) if isinstance(values, dict) else None
