"""Output of rows as parquet files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image

from hf_ecif.data.images import image_bytes
from hf_ecif.errors import UserError
from hf_ecif.utils.files import aside

ROWS_PER_GROUP = 50  # bounds memory: images of this many rows are held at a time


def write_shards(dataset: Dataset, folder: Path, max_shard_bytes: int = 256 * 2**20) -> None:
    """Write parquet files that `datasets.load_dataset(str(folder))` opens.

    Images keep their bytes; images stored as paths are read into the files. The folder appears only
    when it is complete. Without rows, one file holds the schema alone, which `load_dataset` opens
    only with `streaming=True`.

    Args:
        dataset: the rows.
        folder: a folder that does not exist yet, or is empty.
        max_shard_bytes: largest uncompressed size of a file.

    Raises:
        UserError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists. Remove it, or choose another folder.")
    # A sibling, since a rename is only atomic within one file system.
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        shards = _write_files(dataset, partial, max_shard_bytes)
        for number, shard in enumerate(shards):
            shard.rename(partial / f"data-{number:05d}-of-{len(shards):05d}.parquet")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_rows(dataset: Dataset, path: Path) -> None:
    """Write one parquet file atomically, with images as in `write_shards`."""
    features = _decodable(dataset.features)
    with aside(path) as partial, pq.ParquetWriter(partial, features.arrow_schema) as writer:
        for group in _row_groups(dataset, features):
            writer.write_table(group)


def parquet_files(folder: Path) -> list[Path]:
    """Parquet files in a folder from `write_shards`, in order."""
    return sorted(folder.glob("*.parquet"))


def is_whole(path: Path) -> bool:
    """Whether a file is there and complete, by its last bytes."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def count_rows_of(files: Iterable[Path]) -> int:
    """Number of rows in parquet files."""
    return sum(pq.read_metadata(file).num_rows for file in files)


def _write_files(dataset: Dataset, folder: Path, max_bytes: int) -> list[Path]:
    """Write numbered files; how many there will be is known only at the end."""
    features = _decodable(dataset.features)
    groups = _row_groups(dataset, features)
    shards: list[Path] = []
    group = next(groups, None)
    while group is not None or not shards:
        shards.append(folder / str(len(shards)))
        with pq.ParquetWriter(shards[-1], features.arrow_schema) as writer:
            size = 0
            while group is not None and (size == 0 or size + group.nbytes <= max_bytes):
                writer.write_table(group)
                size += group.nbytes
                group = next(groups, None)
    return shards


def _row_groups(dataset: Dataset, features: Features) -> Iterator[pa.Table]:
    for batch in dataset.with_format("arrow").iter(batch_size=ROWS_PER_GROUP):
        columns = [
            _embedded(batch[name]) if isinstance(feature, Image) else batch[name]
            for name, feature in features.items()
        ]
        yield pa.table(columns, schema=features.arrow_schema)


def _embedded(column: pa.ChunkedArray) -> pa.Array:
    """Images as bytes; without bytes, the path remains, to say which image it was."""
    cells = []
    for cell in column.to_pylist():
        content = image_bytes(cell)
        if content is not None:
            cell = {"bytes": content, "path": cell["path"] and os.path.basename(cell["path"])}
        cells.append(cell)
    return pa.array(cells, type=Image.pa_type)


def _decodable(features: Features) -> Features:
    """Types in which image columns are decoded for readers of the files."""
    return Features(
        **{
            name: Image(mode=feature.mode) if isinstance(feature, Image) else feature
            for name, feature in features.items()
        }
    )
