"""Captions in lists: a row an image with all of its captions, taken apart and put together again.

Taken apart, every caption is a row, and two columns say where it was: ``ecif_row:captions``, the
number of its row, and ``ecif_place:captions``, its place in the list of the column ``captions``.
Together again, there is a row for every image with a caption among these: its list holds these
captions, and every influence column has a list of as many values, in the same order. The image and
all else are there once. Of captions that are kept and captions that are removed, each part has its
own, so that all lists of both together are those of the source.

A row without a caption, an empty list or null, is one row when taken apart, since its image must
have a reason why it was not scored. Its lists of influence values have that one entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from hf_ecif.data.columns import CAPTION, PLACE, ROW, replace_column
from hf_ecif.data.schema import is_influence_column
from hf_ecif.utils.files import scratch_file

EMPTY = -1  # place of the one row of an empty list; that of null has none


def explode(rows: Dataset, column: str) -> Dataset:
    """A row for every caption.

    Args:
        rows: with lists of strings in ``column``.
        column: name.
    """
    lists = rows.select_columns([column]).with_format(None)[column][:]
    entries = [
        (row, place, text) for row, texts in enumerate(lists) for place, text in _places(texts)
    ]
    numbers, places, texts = (list(part) for part in zip(*entries, strict=True))
    flat = _repeat(rows.with_format(None), numbers)
    flat = replace_column(flat, column, texts, rows.features[column].feature)
    flat = replace_column(flat, ROW + column, numbers, Value("int64"))
    flat = replace_column(flat, PLACE + column, places, Value("int32"))
    return flat.select_columns(_in_order(rows, flat))


def fold(rows: Dataset) -> Dataset:
    """Rows that `explode` took apart, together again; others unchanged."""
    column = _exploded(rows.features)
    if column is None:
        return rows
    rows = rows.with_format(None)
    number = np.asarray(rows[ROW + column][:], dtype=np.int64)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    bounds = np.append(starts, len(number)).astype(np.int32)
    places = rows[PLACE + column][:]
    folded = _repeat(rows, starts)
    table = rows.with_format("arrow")
    for name in _listed(rows.column_names, column):
        values = table.select_columns([name])[:][name].combine_chunks()
        ends, missing = bounds, None
        if name == column:
            values, ends, missing = _captions(values, bounds, places)
        lists = pa.ListArray.from_arrays(pa.array(ends), values, mask=missing)
        folded = replace_column(folded, name, lists, List(rows.features[name]))
    return folded.select_columns(rows.column_names)


def unfold(rows: Dataset) -> Dataset:
    """Rows that `fold` put together, taken apart again; others unchanged."""
    column = _folded(rows.features)
    if column is None:
        return rows
    rows = rows.with_format(None)
    counts = [len(places) for places in rows[PLACE + column][:]]
    flat = _repeat(rows, np.repeat(np.arange(len(rows)), counts))
    table = rows.with_format("arrow")
    places = [place for one in rows[PLACE + column][:] for place in one]
    for name in _listed(rows.column_names, column):
        if not isinstance(rows.features[name], List):
            continue
        values = table.select_columns([name])[:][name].combine_chunks().flatten()
        if name == column:
            captions = iter(values.to_pylist())
            values = [None if place in (None, EMPTY) else next(captions) for place in places]
        flat = replace_column(flat, name, values, rows.features[name].feature)
    return flat.select_columns(rows.column_names)


def count_pairs_of(files: Iterable[Path]) -> int:
    """Number of captions in parquet files of rows that `fold` put together; of others, of rows."""
    return sum(map(_count_pairs, files))


def _count_pairs(file: Path) -> int:
    known = pq.ParquetFile(file)
    features = Features.from_arrow_schema(known.schema_arrow)
    column = _folded(features)
    if column is None:
        return int(known.metadata.num_rows)
    places = known.read([PLACE + column]).column(0).combine_chunks()
    return len(places.flatten())


def _places(texts: Sequence[str | None] | None) -> Sequence[tuple[int | None, str | None]]:
    if texts is None:
        return [(None, None)]
    return list(enumerate(texts)) or [(EMPTY, None)]


def _exploded(features: Mapping[str, Any]) -> str | None:
    """The column that rows were taken apart by; None of others."""
    for name, kind in features.items():
        if name.startswith(PLACE) and isinstance(kind, Value):
            return name.removeprefix(PLACE)
    return None


def _folded(features: Mapping[str, Any]) -> str | None:
    """The column of lists that rows were put together by; None of others."""
    for name, kind in features.items():
        if name.startswith(PLACE) and isinstance(kind, List):
            return name.removeprefix(PLACE)
    return None


def _listed(names: Sequence[str], column: str) -> list[str]:
    """Columns of which a caption has a value of its own."""
    own = [name for name in names if is_influence_column(name) or name == CAPTION]
    return [column, *own, PLACE + column]


def _captions(
    values: pa.Array, bounds: np.ndarray[Any, Any], places: Sequence[int | None]
) -> tuple[pa.Array, np.ndarray[Any, Any], pa.Array]:
    """Captions without those that stand for none, where each list begins, and which are null."""
    real = np.array([place is not None and place >= 0 for place in places], dtype=bool)
    ends = np.concatenate([[0], np.cumsum(real)])[bounds].astype(np.int32)
    missing = pa.array([places[start] is None for start in bounds[:-1]], type=pa.bool_())
    return values.filter(pa.array(real)), ends, missing


def _in_order(rows: Dataset, changed: Dataset) -> list[str]:
    """Columns in their order before, which adding columns does not keep, and then the new ones."""
    return [*rows.column_names, *(c for c in changed.column_names if c not in rows.column_names)]


def _repeat(rows: Dataset, numbers: Sequence[int] | np.ndarray[Any, Any]) -> Dataset:
    """Rows by their numbers, on disk as often as they occur."""
    if not len(numbers):  # `datasets` would go on to count the rows that were not chosen
        return Dataset.from_dict({name: [] for name in rows.column_names}, features=rows.features)
    return rows.select(numbers).flatten_indices(cache_file_name=str(scratch_file(".arrow")))
