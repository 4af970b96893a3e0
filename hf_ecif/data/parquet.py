"""Output of rows as parquet files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image

from hf_ecif.data.columns import URL
from hf_ecif.data.embeddings import without_folders
from hf_ecif.data.images import image_bytes
from hf_ecif.errors import UserError
from hf_ecif.utils.files import aside, aside_folder
from hf_ecif.utils.hub_paths import public_name

NO_ROWS = """There are no rows here.

`datasets.load_dataset` says of a folder without rows that it "corresponds to no data";
`load_dataset(folder, streaming=True)` opens it.
"""
ROWS_PER_GROUP = 50  # bounds memory: images of this many rows are held at a time


def write_shards(dataset: Dataset, folder: Path, max_shard_bytes: int = 256 * 2**20) -> None:
    """Write parquet files that `datasets.load_dataset(str(folder))` opens.

    Images keep their bytes; images stored as paths are read into the files. The folder appears only
    when it is complete. Without rows, one file holds the schema alone, and a README says that
    `load_dataset` opens it only with `streaming=True`.

    Args:
        dataset: the rows.
        folder: a folder that does not exist yet, or is empty.
        max_shard_bytes: largest uncompressed size of a file.

    Raises:
        UserError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists. Remove it, or choose another folder.")
    with aside_folder(folder) as partial:
        shards = _write_files(dataset, partial, max_shard_bytes)
        for number, shard in enumerate(shards):
            shard.rename(partial / f"data-{number:05d}-of-{len(shards):05d}.parquet")
        if not len(dataset):
            (partial / "README.md").write_text(NO_ROWS, encoding="utf-8")


def write_rows(dataset: Dataset, path: Path) -> None:
    """Write one parquet file atomically, with images as in `write_shards`."""
    features = _decodable(dataset.features)
    with aside(path) as partial, pq.ParquetWriter(partial, features.arrow_schema) as writer:
        for group in _row_groups(dataset, features):
            writer.write_table(group)


def parquet_files(folder: Path) -> list[Path]:
    """Parquet files in a folder from `write_shards`, in order."""
    return sorted(folder.glob("*.parquet"))


def without_places(files: Sequence[Path], folder: Path) -> list[Path]:
    """Parquet files in which rows name their tars, but not where these lie on this machine.

    Args:
        files: whose column ``__url__`` holds paths, as the builder of WebDataset writes them.
        folder: for copies; files without such a column are given as they are.
    """
    found = []
    for file in files:
        source = pq.ParquetFile(file)
        if URL in source.schema_arrow.names:
            folder.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(folder / file.name, source.schema_arrow) as writer:
                for group in range(source.num_row_groups):
                    writer.write_table(_named_by_tar(source.read_row_group(group)))
            file = folder / file.name
        found.append(file)
    return found


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


def _named_by_tar(rows: pa.Table) -> pa.Table:
    place = rows.schema.get_field_index(URL)
    names = [url and public_name(url) for url in rows.column(URL).to_pylist()]
    return rows.set_column(
        place, rows.schema.field(URL), [pa.array(names, rows.schema.field(URL).type)]
    )


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
            _embedded(batch[name]) if isinstance(feature, Image) else without_folders(batch[name])
            for name, feature in features.items()
        ]
        yield pa.table(columns, schema=features.arrow_schema)


def _embedded(column: pa.ChunkedArray) -> pa.Array:
    """Images as bytes, or without any, under names that say which image it was.

    Names of the folders of this machine stay here.
    """
    cells = [
        cell
        and {"bytes": image_bytes(cell), "path": cell["path"] and os.path.basename(cell["path"])}
        for cell in column.to_pylist()
    ]
    return pa.array(cells, type=Image.pa_type)


def _decodable(features: Features) -> Features:
    """Types in which image columns are decoded for readers of the files."""
    return Features(
        **{
            name: Image(mode=feature.mode) if isinstance(feature, Image) else feature
            for name, feature in features.items()
        }
    )
