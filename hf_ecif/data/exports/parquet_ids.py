"""Ids and scores without images, as one parquet file: what a table of metadata is joined with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value

from hf_ecif.data.exports.rows import BATCH, Exported, ExportRows
from hf_ecif.data.schema import holds_media
from hf_ecif.utils.files import aside

FILE = "ids.parquet"
NUMBER, KEPT = "ecif_row", "ecif_kept"


def write_ids(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """Every column but those of images, sounds and bytes, after the row's number and what became
    of it (`ecif_kept`)."""
    kinds = rows.dataset.features
    names = [name for name, kind in kinds.items() if not holds_media(kind)]
    own = {name: kinds[name] for name in names if name not in (NUMBER, KEPT)}
    numbered = {NUMBER: Value("int64")} if rows.are_numbered else {}
    schema = Features(**numbered, **{KEPT: Value("bool")}, **own).arrow_schema
    cells = rows.dataset.select_columns(list(own)).with_format("arrow")
    with aside(folder / FILE) as partial, pq.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            batch = cells[part]
            kept = pa.array(rows.kept[part])
            numbers = [pa.array(rows.numbers[part])] if rows.are_numbered else []
            columns = [*numbers, kept, *(batch[name] for name in own)]
            writer.write_table(pa.table(columns, schema=schema))
            advance(len(kept))
    left_out = sorted(set(kinds) - set(names))
    notes = [f"Left out, since they hold images or bytes: {', '.join(left_out)}."]
    return Exported(len(rows), [FILE], f"pandas.read_parquet({FILE!r})", notes if left_out else [])
