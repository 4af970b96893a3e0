"""Folders written by `save_to_disk`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from datasets import Dataset, load_from_disk

from hf_ecif.data.readers.splits import Tables


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def open_saved(folder: Path) -> Tables:
    """Splits as from `load_from_disk`, which itself fails if any split is empty."""
    if (folder / "dataset_dict.json").exists():
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        folders = {name: folder / name for name in names}
    else:
        folders = {_own_split(folder): folder}
    files = {name: len([*place.glob("*.arrow")]) for name, place in folders.items()}
    states = sorted(folder.rglob("state.json"))

    def load(split: str) -> Dataset:
        return cast(Dataset, load_from_disk(str(folders[split])))

    # Its own fingerprint tells a saved data set from its other versions.
    return Tables("saved", files, load, b"".join(state.read_bytes() for state in states), [folder])


def _own_split(folder: Path) -> str:
    """The split that a saved data set knows it is, if it does."""
    has_rows = any(folder.glob("*.arrow"))
    split = cast(Dataset, load_from_disk(str(folder))).split if has_rows else None
    return str(split or "train")
