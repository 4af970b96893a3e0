"""Shards of WebDataset: tars in which the files of a row lie side by side and share their name.

The builder of `datasets` reads the tars, here and on the Hub, at once or as a stream. It takes the
columns of the first rows for those of all; what people have is less even: a shard holds jpg and png
and webp, some rows lack a file, captions are not UTF-8, and every JSON has other fields. Hence:

- where every row has one image, of whatever suffix, all stand in one column: jpg if there are any,
  else the suffix that comes first. Each keeps its bytes and, as its path, its own name;
- a row without a file has null in its column;
- JSON stays the text that it is, and where there is no text file, a column `caption` is taken out
  of it.
"""

from __future__ import annotations

import logging
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, Image, SplitGenerator, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_ecif.data.columns import KEY, URL
from hf_ecif.data.readers.texts import IMAGES, caption_in, decode
from hf_ecif.errors import UserError

try:  # what later versions of `datasets` number rows by
    from datasets.builder import Key
except ImportError:
    Key = "{}_{}".format  # type: ignore[assignment, misc]

LOOKED_AT = 20  # rows of a shard from which the columns are known
MOST_LOOKED_AT = 16  # shards
TEXTS = ("txt", "text", "caption", "transcript")
JSONS = ("json", "jsn")
CAPTION, USUAL = "caption", "jpg"
_NAME = re.compile(r"(?P<key>(?:.*/)?[^/]+?)\.(?P<suffix>[^/]+)", re.DOTALL)
_NAME_WITH_DOTS = re.compile(r"(?P<key>(?:.*/)?[^/]+)\.(?P<suffix>[^/.]+)", re.DOTALL)

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class Shards(WebDataset):
    """Builder of rows out of tars; see the head of this module."""

    DEFAULT_WRITER_BATCH_SIZE = 100
    _name = _NAME

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        tars = dl_manager.download(self.config.data_files)
        paths = [path for of_split in tars.values() for path in of_split]
        some = paths[:: -(-len(paths) // MOST_LOOKED_AT)]

        def look(name: re.Pattern[str]) -> list[Row]:
            return [
                row
                for path in some
                for row in islice(_rows_of(path, dl_manager.iter_archive(path), name), LOOKED_AT)
            ]

        self._name, first = _NAME, look(_NAME)
        if _differ(first):
            self._name, first = _NAME_WITH_DOTS, look(_NAME_WITH_DOTS)
        if not self.info.features:
            self.info.features = _features(first)
        return [
            SplitGenerator(
                name=split,
                gen_kwargs={
                    "tar_paths": paths,
                    "tar_iterators": [dl_manager.iter_archive(path) for path in paths],
                },
            )
            for split, paths in tars.items()
        ]

    def _generate_examples(  # type: ignore[override]
        self, tar_paths: list[str], tar_iterators: list[Any]
    ) -> Iterator[tuple[Any, Row]]:
        features = self.info.features or Features()
        images = [name for name in features if name in IMAGES]
        image = images[0] if len(images) == 1 else None  # the one that stands for all suffixes
        for shard, (path, files) in enumerate(zip(tar_paths, tar_iterators, strict=True)):
            for number, row in enumerate(_rows_of(path, files, self._name)):
                self._warn_of_others(row)
                yield Key(shard, number), _cells(row, features, image)

    def _warn_of_others(self, row: Row) -> None:
        """Say once that a file is left out, whose like was in none of the first rows."""
        others = [name for name in row if name not in (self.info.features or ())]
        if others[1:] or (others and others[0] not in IMAGES):
            _log.warning(
                "%s in %s has %s, which the first rows of the tars have not: such files are left "
                "out.",
                row[KEY],
                row[URL],
                ", ".join(others),
            )
            self._warn_of_others = lambda row: None  # type: ignore[method-assign]


def require_whole(tars: Iterable[Path]) -> None:
    """Refuse tars that end within a block: what reads them would take them for whole.

    Raises:
        UserError: there is one.
    """
    for tar in tars:
        if tar.suffix.lower() == ".tar" and tar.stat().st_size % tarfile.BLOCKSIZE:
            raise UserError(f"the tar {tar} is damaged: its end is missing. Get it again.")


def _rows_of(tar: str, files: Iterable[tuple[str, Any]], pattern: re.Pattern[str]) -> Iterator[Row]:
    """Contents by suffix, of files that follow each other and have one name without it.

    Raises:
        UserError: the tar is damaged.
    """
    row: Row = {}
    try:
        for name, file in files:
            match = pattern.fullmatch(name)
            base = posixpath.basename(name)
            if match is None or base.startswith("."):
                continue
            key, suffix = match["key"], match["suffix"].lower()
            if row and (row[KEY] != key or suffix in row):
                yield row
                row = {}
            row |= {KEY: key, URL: str(tar), suffix: file.read()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"the tar {tar} is damaged: {error}. Get it again, or leave it out."
        ) from error
    if row:
        yield row


def _differ(rows: Sequence[Row]) -> bool:
    """Whether there are dots in the names of rows, after which their suffixes are taken to begin.

    Then every row has suffixes of its own, or all seem to be one.
    """
    suffixes = {name for row in rows for name in row} - {KEY, URL}
    most = max((len(row) - 2 for row in rows), default=0)
    if len(rows) == 1:
        return max(Counter(name.rpartition(".")[2] for name in suffixes).values(), default=0) > 2
    return len(rows) > 2 and len(suffixes) > 2 * most


def _features(rows: Iterable[Row]) -> Features:
    """Columns of the first rows of shards.

    Raises:
        UserError: there are none, or the files of a row are not side by side.
    """
    suffixes: dict[str, None] = {}
    has_caption, has_several, is_apart = False, False, True
    for row in rows:
        is_apart = is_apart and len(row) == 3
        suffixes |= dict.fromkeys(name for name in row if name not in (KEY, URL))
        has_several = has_several or len(IMAGES.intersection(row)) > 1
        has_caption = has_caption or any(caption_in(row.get(name)) for name in JSONS)
    if not suffixes:
        raise UserError("there is no file in the tars that has a name and a suffix.")
    if is_apart and {*TEXTS, *JSONS}.intersection(suffixes) and IMAGES.intersection(suffixes):
        raise UserError(
            "the image and the caption of a row do not follow each other in the tars, as they must "
            "in a WebDataset. Write them in the order of their names (tar --sort=name)."
        )
    images = sorted(filter(IMAGES.__contains__, suffixes), key=lambda name: name != USUAL)
    joined = () if has_several else images[1:]
    kinds: dict[str, Any] = {name: _kind(name) for name in suffixes if name not in joined}
    if has_caption and not any(name in TEXTS for name in suffixes):
        kinds[CAPTION] = Value("string")
    return Features(**{**kinds, KEY: Value("string"), URL: Value("string")})


def _kind(suffix: str) -> Any:
    last = suffix.rpartition(".")[2]
    if last in IMAGES:
        return Image()
    if last in ("cls", "cls2", "index", "inx", "id"):
        return Value("int64")
    return Value("string" if last in (*TEXTS, *JSONS) else "binary")


def _cells(row: Row, features: Features, image: str | None) -> Row:
    cells = {name: _cell(row, name, kind) for name, kind in features.items()}
    if image is not None and cells[image] is None:
        other = next((name for name in row if name in IMAGES), "")
        cells[image] = _cell(row, other, features[image])
    if CAPTION in features and CAPTION not in row:
        cells[CAPTION] = next(filter(None, (caption_in(row.get(name)) for name in JSONS)), None)
    return cells


def _cell(row: Row, name: str, kind: Any) -> Any:
    content = row.get(name)
    if content is None or name in (KEY, URL):
        return content
    if isinstance(kind, Image):
        return {"path": f"{row[KEY]}.{name}", "bytes": content}
    if kind.dtype == "int64":
        return _integer(content)
    return decode(content) if kind.dtype == "string" else content


def _integer(content: bytes) -> int | None:
    try:
        return int(content)
    except ValueError:
        return None
