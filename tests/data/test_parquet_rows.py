"""Rows read where they lie, against pyarrow's own reader."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ecif.data import parquet_rows
from hf_ecif.data.parquet_rows import ParquetRows
from hf_ecif.errors import UserError

COUNT = 23


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of several row groups, one of which has no rows."""
    image = [{"bytes": bytes([row]) * 900, "path": f"{row}.png"} for row in range(COUNT)]
    text = [None if row % 7 == 3 else f"row {row}" for row in range(COUNT)]
    table = pa.table({"image": image, "text": text, "score": [row / 2 for row in range(COUNT)]})
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(table.slice(0, 11), paths[0], row_group_size=4)
    with pq.ParquetWriter(paths[1], table.schema) as writer:
        writer.write_table(table.slice(11, 0))
        writer.write_table(table.slice(11), row_group_size=5)
    return paths


def test_rows_and_columns_are_those_of_the_files(files):
    rows = ParquetRows(files)
    expected = pa.concat_tables([pq.read_table(file) for file in files]).to_pylist()
    assert len(rows) == COUNT
    assert rows.column_names == ["image", "text", "score"]
    assert [rows[row] for row in reversed(range(COUNT))] == expected[::-1]
    assert rows.column("text").to_pylist() == [row["text"] for row in expected]
    with pytest.raises(IndexError):
        rows[COUNT]


def test_what_is_large_is_not_kept(files, monkeypatch):
    monkeypatch.setattr(parquet_rows, "GROUPS_KEPT", 1)
    rows = ParquetRows(files)
    for row in range(COUNT):
        rows[row]
    assert rows._held["image"] is None
    assert rows._held["text"] is not None
    assert len(rows._cached) <= 3


def test_threads_may_share_it(files):
    rows = ParquetRows(files)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: rows.value(row, "score"), list(range(COUNT)) * 20))
    assert found == [row / 2 for row in range(COUNT)] * 20


def test_missing_and_damaged_files_are_said(tmp_path):
    with pytest.raises(UserError, match="missing"):
        ParquetRows([])
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        ParquetRows([tmp_path / "a.parquet"])
