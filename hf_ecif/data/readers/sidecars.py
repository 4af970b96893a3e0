"""Pictures with their captions beside them: ``0001.png`` and ``0001.txt``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from datasets import Dataset, Features, Image, Value

from hf_ecif.data.readers.splits import Tables
from hf_ecif.data.readers.texts import IMAGES, caption_in, decode

CAPTIONS = (".txt", ".caption", ".json")  # the first that is there
PICTURES = frozenset(f".{suffix}" for suffix in IMAGES)
_FEATURES = Features(image=Image(), text=Value("string"), file_name=Value("string"))


class Pair(NamedTuple):
    """A picture, and the file of its caption, if there is one."""

    picture: Path
    caption: Path | None


def has_sidecars(folder: Path) -> bool:
    """Whether a picture in a folder, or below, has its caption beside it."""
    return any(pair.caption for pair in _pairs(folder))


def open_sidecars(folder: Path) -> Tables:
    """One split, `train`, of all pictures in a folder and below, in the order of their names.

    A picture without a caption is a row without one.
    """
    pairs = sorted(_pairs(folder))
    digest = xxhash.xxh3_128()
    for path in (path for pair in pairs for path in pair if path is not None):
        digest.update(f"{path} {path.stat().st_mtime_ns}".encode())

    def load(split: str) -> Dataset:
        columns: dict[str, list[Any]] = {
            "image": [{"bytes": None, "path": str(pair.picture)} for pair in pairs],
            "text": [_read(pair.caption) for pair in pairs],
            "file_name": [str(pair.picture.relative_to(folder)) for pair in pairs],
        }
        return Dataset.from_dict(columns, features=_FEATURES)

    return Tables("sidecars", {"train": len(pairs)}, load, digest.digest())


def _pairs(folder: Path) -> Iterator[Pair]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = {name.lower(): name for name in names}
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() not in PICTURES or name.startswith("."):
                continue
            beside = (here.get(f"{path.stem}{suffix}".lower()) for suffix in CAPTIONS)
            caption = next(filter(None, beside), None)
            yield Pair(path, Path(place, caption) if caption else None)


def _read(caption: Path | None) -> str | None:
    if caption is None:
        return None
    content = caption.read_bytes()
    return caption_in(content) if caption.suffix.lower() == ".json" else decode(content).strip()
