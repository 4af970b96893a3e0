"""Arrays of embeddings with their captions beside them."""

from __future__ import annotations

from pathlib import Path

from hf_ecif.data.embeddings import files_of, load_embeddings
from hf_ecif.data.readers.splits import Tables


def open_embeddings(path: Path, key: str | None = None) -> Tables:
    """The one split of embedded pairs.

    Args:
        path: a file or a folder, see `hf_ecif.data.embeddings.LAYOUTS`.
        key: which embeddings, where there are those of several models.
    """
    states = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files_of(path)]
    version = f"{key} {states}".encode()
    return Tables("embeddings", {"train": 1}, lambda _: load_embeddings(str(path), key), version)
