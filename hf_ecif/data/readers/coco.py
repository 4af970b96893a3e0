"""Captions as COCO annotates them: a JSON of `images` and `annotations`, beside the pictures."""

from __future__ import annotations

import json
import mmap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from hf_ecif.data.readers.builders import split_of
from hf_ecif.data.readers.splits import Tables
from hf_ecif.data.readers.tables import leads_to
from hf_ecif.errors import UserError

_FEATURES = Features(
    image=Image(),
    captions=List(Value("string")),
    image_id=Value("string"),
    file_name=Value("string"),
)


def is_coco(table: Path) -> bool:
    """Whether a JSON file has captions as COCO annotates them."""
    if table.suffix.lower() != ".json" or not table.stat().st_size:
        return False
    with table.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        is_object = content[:64].lstrip().startswith(b"{")
        return is_object and all(
            content.find(name) >= 0 for name in (b'"annotations"', b'"images"', b'"caption"')
        )


def open_coco(tables: Sequence[Path], root: Path, bases: Sequence[Path]) -> Tables:
    """Splits by the names of the files; a row an image, with the list of its captions.

    Args:
        tables: the JSON files.
        root: a folder that they lie in.
        bases: folders that the pictures may lie in.
    """
    splits = {split_of(table.relative_to(root)): table for table in tables}
    if len(splits) < len(tables):
        raise UserError("several files of annotations have the same split. Name one of them.")

    def load(split: str) -> Dataset:
        return Dataset.from_dict(_columns(splits[split], bases), features=_FEATURES)

    key = "".join(f"{table} {table.stat().st_mtime_ns}" for table in tables)
    return Tables("coco", dict.fromkeys(splits, 1), load, key.encode())


def _columns(table: Path, bases: Sequence[Path]) -> dict[str, list[Any]]:
    known = json.loads(table.read_bytes())
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    for one in known["annotations"]:
        captions[one["image_id"]].append(one.get("caption"))
    images = known["images"]
    return {
        "image": [_cell(one["file_name"], bases) for one in images],
        "captions": [captions[one["id"]] for one in images],
        "image_id": [str(one["id"]) for one in images],
        "file_name": [one["file_name"] for one in images],
    }


def _cell(name: str, bases: Sequence[Path]) -> dict[str, Any]:
    return {"bytes": None, "path": str(leads_to(name, bases))}
