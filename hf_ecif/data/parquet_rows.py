"""Rows of parquet files, read where they lie: a column at a time, or a single row.

Opening reads the footers alone. A column is read by itself, so that columns of numbers cost their
own bytes and never those of the images beside them; a row costs its row group.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_ecif.errors import UserError

GROUPS_KEPT = 4  # number of row groups in memory, whose neighbours are likely to be asked for
HELD = 300  # bytes a row: a column that is smaller is kept in memory once a value was asked for


class ParquetRows:
    """Rows of parquet files in their order; safe to share between threads.

    Args:
        files: parquet files with the same columns.

    Raises:
        UserError: there are no files, or one of them cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        if not files:
            raise UserError("The rows of this audit are missing: it has no parquet files.")
        try:
            self._files = [pq.ParquetFile(file) for file in files]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"The rows of this audit cannot be read: {error}.") from error
        self._schema: pa.Schema = self._files[0].schema_arrow
        self._groups = [
            (file, group)
            for file in self._files
            for group in range(file.metadata.num_row_groups)
            if file.metadata.row_group(group).num_rows
        ]
        sizes = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._ends = list(accumulate(sizes))
        self._lock = threading.Lock()
        self._cached: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._held: dict[str, pa.ChunkedArray | None] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self._schema.names)

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types, with what `datasets` has noted about them."""
        return self._schema

    def column(self, name: str) -> pa.ChunkedArray:
        """All values of a column."""
        with self._lock:
            parts = [file.read(columns=[name], use_threads=False)[name] for file in self._files]
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)

    def value(self, row: int, name: str) -> Any:
        """The value in a row of a column."""
        if name not in self._held:
            self._held[name] = self.column(name) if self._is_small(name) else None
        held = self._held[name]
        if held is not None:
            return held[row].as_py()
        group = bisect_right(self._ends, row)
        start = self._ends[group - 1] if group else 0
        return self._read(group, name)[row - start].as_py()

    def __getitem__(self, row: int) -> dict[str, Any]:
        """All values of a row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return {name: self.value(row, name) for name in self.column_names}

    def _is_small(self, name: str) -> bool:
        """Whether the column takes few bytes a row."""
        return self._sizes[name] <= HELD * len(self)

    @cached_property
    def _sizes(self) -> Counter[str]:
        """Bytes of every column, all its parts together."""
        sizes: Counter[str] = Counter()
        for file, group in self._groups:
            about = file.metadata.row_group(group)
            for number in range(about.num_columns):
                part = about.column(number)
                sizes[part.path_in_schema.split(".")[0]] += part.total_uncompressed_size
        return sizes

    def _read(self, group: int, name: str) -> pa.ChunkedArray:
        """The values of a row group in a column, of which the last few are kept."""
        with self._lock:
            if (found := self._cached.pop((group, name), None)) is None:
                file, number = self._groups[group]
                found = file.read_row_group(number, columns=[name], use_threads=False)[name]
            self._cached[group, name] = found
            while len(self._cached) > GROUPS_KEPT * len(self._schema.names):
                self._cached.popitem(last=False)
            return found
