"""Rows as tars, which `webdataset`, open_clip and `load_dataset("webdataset", ...)` read.

Rows from tars that are still there are copied out of them, every member of a key byte for byte.
Other rows are made of their columns, a member each.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image

from hf_ecif.data.cleaning import ORIGINAL_TEXT, WEIGHT
from hf_ecif.data.columns import KEY, URL
from hf_ecif.data.exports.pictures import picture
from hf_ecif.data.exports.rows import Exported, ExportRows
from hf_ecif.data.exports.shards import Shard, shards_of
from hf_ecif.data.images import image_bytes
from hf_ecif.data.schema import is_influence_column
from hf_ecif.utils.files import aside, to_json

Members = dict[str, bytes]  # by field, what follows the first point in the name of a file
CAPTION, REST, WEIGHTS = "txt", "json", f"{WEIGHT}.txt"


def write_tars(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """A tar for each that the rows are from, or for every ten thousand rows.

    Where captions were replaced, the new one stands in place of the old one; where rows have
    weights, each has a member ``ecif_weight.txt``.
    """
    shards, fields = shards_of(rows), _fields(rows)
    for shard in shards:
        part = rows.select(np.array(shard.rows, dtype=np.int64))
        with aside(folder / f"{shard.name}.tar") as partial, tarfile.open(partial, "w") as tar:
            for key, members in _samples(part, shard, fields):
                for field, content in members.items():
                    _add(tar, f"{key}.{field}", content)
                advance(1)
    opens = 'datasets.load_dataset("webdataset", data_files="*.tar")'
    return Exported(len(rows), [f"{shard.name}.tar" for shard in shards], opens)


def _samples(
    rows: ExportRows, shard: Shard, fields: dict[str, str]
) -> Iterator[tuple[str, Members]]:
    """Key and members of every row; copies of a row have keys of their own."""
    seen: Counter[str] = Counter()
    source = _source_of(shard)
    with closing(source) if source else io.BytesIO():
        for number, cells in rows.records():
            key = cells.get(KEY) or f"{number:09d}"
            copied = source.members(key) if source else {}
            made = _changes(cells, rows) if copied else _make(cells, fields, rows)
            name = f"{key}-{seen[key]}" if seen[key] else key
            seen[key] += 1
            yield name, copied | made


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# ------------------------------------------------------------------------ rows that are from a tar


class _Source:
    """A tar whose members are read in any order."""

    def __init__(self, path: str) -> None:
        self._tar = tarfile.open(path)  # noqa: SIM115  # closed by `close`
        self._members: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in self._tar:
            folder, slash, file = member.name.rpartition("/")
            stem, _, field = file.partition(".")
            if member.isfile() and stem and field:
                self._members.setdefault(f"{folder}{slash}{stem}", {})[field] = member

    def members(self, key: str) -> Members:
        """All that the tar has of a key."""
        files = {
            name: self._tar.extractfile(one) for name, one in self._members.get(key, {}).items()
        }
        return {name: file.read() for name, file in files.items() if file}

    def close(self) -> None:
        self._tar.close()


def _source_of(shard: Shard) -> _Source | None:
    path = Path(shard.source) if shard.source else None
    return _Source(str(path)) if path and path.is_file() and tarfile.is_tarfile(path) else None


def _changes(cells: dict[str, Any], rows: ExportRows) -> Members:
    """What differs from the tar: a new caption, and a weight."""
    made = {}
    if cells.get(ORIGINAL_TEXT) is not None:
        made[rows.columns.text] = str(cells[rows.columns.text]).encode()
    if cells.get(WEIGHT) is not None:
        made[WEIGHTS] = str(cells[WEIGHT]).encode()
    return made


# ----------------------------------------------------------------------- rows that are from a table


def _fields(rows: ExportRows) -> dict[str, str]:
    """Field of a tar by column; columns without one go into the json.

    All samples need the same fields, or readers that look at the first ones miss the others: an
    image is called png or jpg where all of them are, and jpg where they differ, since readers look
    at the bytes.
    """
    own = [name for name in rows.names if not is_influence_column(name)]
    if KEY in own:
        return {name: name for name in own if name not in (KEY, URL)}
    suffix = _common_suffix(rows)
    images = {
        name: suffix if name == rows.columns.image else f"{name.replace('.', '_')}.{suffix}"
        for name in rows.image_columns
    }
    return images | {rows.columns.text: CAPTION}


def _common_suffix(rows: ExportRows) -> str:
    name = rows.columns.image
    images = replace(rows, dataset=rows.dataset.select_columns([name]))
    found = {one[1] for _, cells in images.records() if (one := picture(cells[name]))}
    return found.pop() if len(found) == 1 else "jpg"


def _make(cells: dict[str, Any], fields: dict[str, str], rows: ExportRows) -> Members:
    kinds = rows.dataset.features
    made = {
        field: content
        for name, field in fields.items()
        if (content := _content(cells[name], isinstance(kinds[name], Image))) is not None
    }
    if KEY not in cells:
        rest = [name for name in cells if name not in fields and not is_influence_column(name)]
        made[REST] = to_json({name: cells[name] for name in rest}).encode()
    return made | _changes({WEIGHT: cells.get(WEIGHT)}, rows)


def _content(value: Any, is_image: bool) -> bytes | None:
    if value is None:
        return None
    if is_image:
        return image_bytes(value)
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else to_json(value)).encode()
