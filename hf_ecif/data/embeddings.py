"""Pairs that were embedded elsewhere: arrays of image and text embeddings, with their captions.

A row names its embeddings by a reference, ``shards/0.npz#l14_img/17``: the array of its image, and
the number of its row there. The array of the text is found by its name beside it. Arrays are mapped
into memory, so that any number of them can be opened; only members of an ``.npz`` that are
compressed have to be read whole, one file at a time.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.lib import format as npy
from numpy.typing import NDArray

from hf_ecif.errors import UserError
from hf_ecif.utils.files import scratch_file

Vectors = NDArray[np.floating[Any]]
COLUMN, CAPTIONS = "embedding", "text"
LAYOUTS = (
    "Give an .npz file with arrays such as l14_img and l14_txt, or image and text; a folder of "
    "such files (DataComp), each with its .parquet of captions beside it; or a folder with "
    "img_emb/img_emb_0.npy, text_emb/text_emb_0.npy and metadata/metadata_0.parquet "
    "(clip-retrieval)."
)
_REFERENCE = re.compile(r"(?P<file>.+\.np[yz])#(?:(?P<member>[^/#]+)/)?(?P<row>\d+)")
_PLACEHOLDER = re.compile(r"row \d+")
_IMAGES, _TEXTS = {"image", "images", "img", "imgs", "visual"}, {"text", "texts", "txt", "captions"}
_OPEN_FILES = 8  # whose arrays are kept open, or in memory where they are compressed
_BLOCK = 2**16  # rows of references written at a time


def is_reference(cell: Any) -> bool:
    """Whether a cell names embeddings.

    >>> is_reference("shards/0.npz#l14_img/17"), is_reference("shards/0.png")
    (True, False)
    """
    return isinstance(cell, str) and _REFERENCE.fullmatch(cell) is not None


def is_placeholder(caption: str) -> bool:
    """Whether a caption is the number of its row, for want of another."""
    return _PLACEHOLDER.fullmatch(caption) is not None


def tell(reference: str) -> str:
    """Row and file of a reference, without the folders of this machine.

    >>> tell("/home/me/0.npz#l14_img/17")
    'row 17 of 0.npz'
    """
    found = _REFERENCE.fullmatch(reference)
    return f"row {found['row']} of {Path(found['file']).name}" if found else reference


def is_embeddings(path: Path) -> bool:
    """Whether a file or a folder holds arrays of embeddings."""
    if path.is_file():
        return path.suffix in (".npz", ".npy")
    return path.is_dir() and bool(files_of(path))


def files_of(path: Path) -> list[Path]:
    """Arrays that a file or a folder stands for, in the order of their rows."""
    if path.is_dir():
        found = [*path.glob("*.np[yz]"), *path.glob("*/*.np[yz]")]
        return sorted(found, key=lambda file: _natural(file.as_posix()))
    return sorted(_neighbours(path)) if path.suffix == ".npy" else [path]


def load_embeddings(source: str, key: str | None = None) -> Dataset:
    """Rows of embedded pairs: a reference each, and the columns of the parquet files beside them.

    Without such files, each row's number takes the place of its caption.

    Args:
        source: a file or a folder, see `LAYOUTS`.
        key: which embeddings, where there are those of several models: the part of their name that
            images and texts have in common, such as ``l14``.

    Raises:
        UserError: there are none, or numbers of rows or widths do not match.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"no such file or folder. {LAYOUTS}")
    shards = list(_find_shards(path, key))
    schema = _schema(shards)
    file = scratch_file()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for shard in shards:
            for table in shard.tables():
                writer.write_table(_fitting(table, schema, shard))
    return Dataset.from_file(str(file))


def width_of(source: str, key: str | None = None) -> int:
    """Size of the embeddings.

    Args:
        source: see `load_embeddings`.
        key: likewise.

    Raises:
        UserError: there are none.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"no such file or folder. {LAYOUTS}")
    first = next(_find_shards(path, key))
    return int(_open_pair(str(first.file), first.member)[0].shape[1])


def read_vectors(references: Sequence[str]) -> tuple[Vectors, Vectors]:
    """Embeddings of images and of texts, ``(n, d)`` each, in the order of the references.

    Raises:
        UserError: a file is no longer there, or has fewer rows.
    """
    places = [_parse(reference) for reference in references]
    rows: dict[tuple[str, str | None], list[int]] = {}
    for number, (file, member, _) in enumerate(places):
        rows.setdefault((file, member), []).append(number)
    found: list[Vectors] = [np.empty(0), np.empty(0)]
    for (file, member), numbers in rows.items():
        pair = _open_pair(file, member)
        wanted = np.array([places[number][2] for number in numbers])
        if wanted.max() >= len(pair[0]):
            raise UserError(f"{file} has {len(pair[0]):,} rows now, and not row {wanted.max():,}.")
        for side, array in enumerate(pair):
            if not found[side].size:
                found[side] = np.empty((len(places), array.shape[1]), dtype=np.float32)
            if array.shape[1] != found[side].shape[1]:
                raise UserError(
                    f"{file} has embeddings of width {array.shape[1]}, and others here have "
                    f"{found[side].shape[1]}. Give those of one model."
                )
            found[side][numbers] = array[wanted]
    return found[0], found[1]


def place_references(dataset: Dataset, source: str) -> Dataset:
    """Rows whose references are names of files alone, as results hold them, with their folders.

    Args:
        dataset: rows of a result.
        source: what `load_embeddings` read.
    """
    path = Path(source).expanduser()
    folders = {file.name: str(file) for file in files_of(path)}

    def place(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        parted = (cell.partition("#") for cell in batch[COLUMN])
        return {COLUMN: [f"{folders.get(Path(f).name, f)}#{rest}" for f, _, rest in parted]}

    return dataset.map(place, batched=True)


def without_folders(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings as they may be published: references without the folders of this machine."""
    first = next((cell.as_py() for cell in column if cell.is_valid), None)
    if not is_reference(first):
        return column
    folders = r"^.*[/\\]([^/\\#]+\.np[yz]#)"
    return pc.replace_substring_regex(column, pattern=folders, replacement=r"\1")


# ------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class _Shard:
    """Arrays of images and texts, and a table of what else is known of their rows.

    Attributes:
        file: of the images' array; as the user named it.
        member: of an ``.npz``.
        metadata: parquet file of as many rows, if there is one.
        first: number of its first row among all.
    """

    file: Path
    member: str | None
    metadata: Path | None
    first: int = 0

    @property
    def rows(self) -> int:
        return len(_open_pair(str(self.file), self.member)[0])

    def tables(self) -> Iterator[pa.Table]:
        """Its rows, some at a time."""
        prefix = f"{self.file}#" + (f"{self.member}/" if self.member else "")
        start = 0
        for own in self._own():
            references = [f"{prefix}{number}" for number in range(start, start + len(own))]
            yield own.append_column(COLUMN, pa.array(references))
            start += len(own)

    def _own(self) -> Iterator[pa.Table]:
        """What is known of the rows; without a table, their numbers."""
        if self.metadata is not None:
            for batch in pq.ParquetFile(self.metadata).iter_batches(_BLOCK):
                table = pa.Table.from_batches([batch])
                yield table.drop_columns([COLUMN] if COLUMN in table.column_names else [])
            return
        for start in range(0, self.rows, _BLOCK):
            numbers = range(start, min(start + _BLOCK, self.rows))
            yield pa.table({CAPTIONS: [f"row {self.first + number}" for number in numbers]})


def _find_shards(path: Path, key: str | None) -> Iterator[_Shard]:
    arrays, tables = files_of(path), _tables_of(path)
    pairs = [*_pairs_in_archives(arrays, key), *_pairs_of_files(arrays, key)]
    if path.is_file() and path.suffix == ".npy":
        pairs = [pair for pair in pairs if pair[0] == path]
    if not pairs:
        raise UserError(f"there are no arrays of images and texts. {LAYOUTS}")
    first, width = 0, None
    for file, member in pairs:
        name = f"{file.name}{f' ({member})' if member else ''}"
        rows, width = _size_of(_open_pair(str(file), member), name, width)
        metadata = _metadata_of(file, tables, len(pairs))
        if metadata is None and tables and path.is_dir():
            raise UserError(
                f"there is no table of the rows of {name}: it must be called like the array, or "
                f"have its number. There are {', '.join(table.name for table in tables[:3])}."
            )
        if metadata is not None and (count := pq.read_metadata(metadata).num_rows) != rows:
            raise UserError(
                f"{name} has {rows:,} embeddings, but {metadata.name} has {count:,} rows. They "
                "must be of the same rows."
            )
        yield _Shard(file, member, metadata, first)
        first += rows


def _size_of(pair: tuple[Vectors, Vectors], name: str, before: int | None) -> tuple[int, int]:
    """Rows and width of both arrays, which must be the same, and of the width of those before."""
    (rows, width), (texts, other) = (array.shape for array in pair)
    if rows != texts:
        raise UserError(
            f"{name} has {rows:,} embeddings of images, but there are {texts:,} of texts. They "
            "must be of the same rows."
        )
    if width != other:
        raise UserError(
            f"{name} has embeddings of images of width {width}, and of texts of width {other}. "
            "They must be of one model."
        )
    if before not in (None, width):
        raise UserError(
            f"{name} has embeddings of width {width}, and the files before it of {before}. They "
            "must be of one model."
        )
    return rows, width


def _pairs_in_archives(files: Iterable[Path], key: str | None) -> Iterator[tuple[Path, str]]:
    """Files with the name of their images' array."""
    for file in files:
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            yield file, _only(_matched(names), key, file.name)


def _pairs_of_files(files: Iterable[Path], key: str | None) -> Iterator[tuple[Path, None]]:
    by_name = {file.stem: file for file in files if file.suffix == ".npy"}
    matched = _matched(by_name)
    chosen = [n for rest, n in matched.items() if key is None or key in rest.split("_")]
    if matched and not chosen:
        raise UserError(f"no embeddings {key!r}, but those of {', '.join(_names(matched))}.")
    yield from ((by_name[name], None) for name in sorted(chosen, key=_natural))


def _matched(names: Iterable[str]) -> dict[str, str]:
    """The images' array of every pair of names, by what both names have in common."""
    names = list(names)
    texts = {rest for name in names if (rest := _without(name, _TEXTS)) is not None}
    images = {rest: name for name in names if (rest := _without(name, _IMAGES)) is not None}
    return {rest: name for rest, name in images.items() if rest in texts}


def _text_of(image: str, names: Iterable[str]) -> str:
    """Name of the texts' array that goes with one of images."""
    rest = _without(image, _IMAGES)
    for name in names:
        if rest is not None and _without(name, _TEXTS) == rest:
            return name
    raise UserError(f"There is no array of texts beside {image}. {LAYOUTS}")


def _without(name: str, words: set[str]) -> str | None:
    """The other words of a name; None where it has none of these.

    >>> _without("l14_img", _IMAGES), _without("text_emb_0", _TEXTS), _without("l14_img", _TEXTS)
    ('l14', 'emb_0', None)
    """
    parts = re.split(r"[_.\-]", name)
    rest = [part for part in parts if part.lower() not in words]
    return "_".join(rest) if len(rest) < len(parts) else None


def _only(matched: dict[str, str], key: str | None, file: str) -> str:
    if not matched:
        raise UserError(f"{file} has no arrays of images and texts. {LAYOUTS}")
    chosen = [n for rest, n in matched.items() if key is None or key in rest.split("_")]
    if len(chosen) != 1:
        given = "several embeddings" if key is None else f"no embeddings {key!r}"
        raise UserError(
            f"{file} has {given}. Give `embeddings_key`, or `config_name`, one of: "
            f"{', '.join(_names(matched))}."
        )
    return chosen[0]


def _names(matched: dict[str, str]) -> list[str]:
    return sorted(rest or name for rest, name in matched.items())


def _neighbours(file: Path) -> list[Path]:
    """Arrays that may be of the other side: in the folder of one, or in that of the texts."""
    return [array for folder in _folders_of(file) for array in folder.glob("*.npy")]


def _folders_of(file: Path) -> list[Path]:
    """Folder of an array, and the one beside it that is called like it, but of texts."""
    own = file.parent
    rest = _without(own.name, _IMAGES)
    beside = own.parent.iterdir() if rest is not None else ()
    return [own, *(folder for folder in beside if _without(folder.name, _TEXTS) == rest)]


def _tables_of(path: Path) -> list[Path]:
    if path.is_file():
        root = path.parent.parent if len(_folders_of(path)) > 1 else path.parent
        return [*path.parent.glob("*.parquet"), *root.glob("metadata/*.parquet")]
    return [*path.glob("*.parquet"), *path.glob("*/*.parquet")]


def _metadata_of(file: Path, tables: Sequence[Path], shards: int) -> Path | None:
    """Table of a file's rows: of the same name, or number, or the only one of the only file."""
    same = [table for table in tables if table.stem == file.stem]
    numbered = [table for table in tables if _number(table) == _number(file) is not None]
    only = tables if shards == 1 and len(tables) == 1 else []
    return next(iter((*same, *numbered, *only)), None)


def _number(file: Path) -> int | None:
    found = re.search(r"(\d+)$", file.stem)
    return int(found[1]) if found else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Key by which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _schema(shards: Sequence[_Shard]) -> pa.Schema:
    return next(shards[0].tables()).schema


def _fitting(table: pa.Table, schema: pa.Schema, shard: _Shard) -> pa.Table:
    if set(table.column_names) != set(schema.names):
        odd = sorted(set(table.column_names) ^ set(schema.names))
        of = shard.metadata.name if shard.metadata else shard.file.name
        raise UserError(f"{of} has other columns than the first table: {', '.join(odd)}.")
    return table.select(schema.names).cast(schema)


# -------------------------------------------------------------------------------------- arrays


def _parse(reference: str) -> tuple[str, str | None, int]:
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise UserError(f"{reference!r} names no embeddings, as 0.npz#l14_img/17 does.")
    return found["file"], found["member"], int(found["row"])


def _open_pair(file: str, member: str | None) -> tuple[Vectors, Vectors]:
    """Arrays of images and texts, mapped into memory where they are not compressed."""
    if not Path(file).is_file():
        raise UserError(f"There are no embeddings at {file}: the file was moved or deleted.")
    return _open_version(file, member, Path(file).stat().st_mtime_ns)


@lru_cache(maxsize=_OPEN_FILES)
def _open_version(file: str, member: str | None, changed: int) -> tuple[Vectors, Vectors]:
    path = Path(file)
    if member is not None:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        other = _text_of(member, names)
        return _open_member(path, member), _open_member(path, other)
    texts = {file.stem: file for file in _neighbours(path)}
    return _open_file(path), _open_file(texts[_text_of(path.stem, texts)])


def _open_file(path: Path) -> Vectors:
    try:
        return _checked(np.load(path, mmap_mode="r", allow_pickle=False), path.name)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path.name} is no array of numbers: {error}.") from error


def _open_member(path: Path, member: str) -> Vectors:
    name = f"{path.name} ({member})"
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{member}.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                return _checked(_map(path, info.header_offset), name)
        with np.load(path, allow_pickle=False) as arrays:
            return _checked(arrays[member], name)
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{name} is no array of numbers: {error}.") from error


def _map(path: Path, header: int) -> NDArray[Any]:
    """An array in an archive that is not compressed, mapped into memory where it lies."""
    with path.open("rb") as file:
        _skip_local_header(file, header)
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds objects")
        start = file.tell()
    if is_fortran:
        return np.memmap(path, dtype, "r", start, shape, "F")
    return np.memmap(path, dtype, "r", start, shape, "C")


def _skip_local_header(file: BinaryIO, start: int) -> None:
    """Go to the content of a member: after 30 bytes, its name and what else there is."""
    file.seek(start + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    file.seek(start + 30 + name + extra)


def _checked(array: NDArray[Any], name: str) -> Vectors:
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"{name} must be an array of floats with a row for each pair, but it is of "
            f"{array.dtype} and shape {array.shape}."
        )
    return array
