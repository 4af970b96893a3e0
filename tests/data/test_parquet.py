"""Parquet files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_ecif.data.parquet import without_places


def test_tars_are_named_without_the_folders_that_they_lie_in(tmp_path: Path) -> None:
    urls = [str(tmp_path / "secret" / "00000.tar"), "hf://datasets/me/pairs@main/1.tar", None]
    table = pa.table({"text": ["a", "b", "c"], "__url__": urls}).replace_schema_metadata({"k": "v"})
    with pq.ParquetWriter(tmp_path / "rows.parquet", table.schema) as writer:
        writer.write_table(table[:2])
        writer.write_table(table[2:])
    (file,) = without_places([tmp_path / "rows.parquet"], tmp_path / "public")
    found = pq.read_table(file)
    assert found.column("__url__").to_pylist() == ["00000.tar", urls[1], None]
    assert found.schema.equals(table.schema, check_metadata=True)
    assert found.column("text") == table.column("text")
    assert pq.ParquetFile(file).num_row_groups == 2


def test_other_files_are_given_as_they_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "rows.parquet")
    files = [tmp_path / "rows.parquet"]
    assert without_places(files, tmp_path / "public") == files
