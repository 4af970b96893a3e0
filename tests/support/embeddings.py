"""Embedded pairs in the layouts in which people keep them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def vectors(
    rows: int, width: int = 8, seed: int = 0, dtype: str = "float32"
) -> tuple[Array, Array]:
    """Embeddings of images, and of texts near them."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(rows, width))
    texts = images + 0.5 * random.normal(size=(rows, width))
    return images.astype(dtype), texts.astype(dtype)


def write_captions(path: Path, rows: int, column: str = "caption", first: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + rows)
    table = {"uid": [f"u{n}" for n in numbers], column: [f"caption {n}" for n in numbers]}
    pq.write_table(pa.table(table), path)


def write_datacomp(
    folder: Path,
    shards: list[tuple[Array, Array]],
    save: Callable[..., None] = np.savez,
    more: Mapping[str, Array] | None = None,
) -> Path:
    """As DataComp: archives of arrays of two models, and tables of the same names beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, (images, texts) in enumerate(shards):
        save(folder / f"{number:03d}.npz", l14_img=images, l14_txt=texts, **(more or {}))
        write_captions(folder / f"{number:03d}.parquet", len(images), "text", first)
        first += len(images)
    return folder


def write_clip_retrieval(folder: Path, shards: list[tuple[Array, Array]]) -> Path:
    """As clip-retrieval: a folder for each side, and one for what is known of the rows."""
    first = 0
    for number, (images, texts) in enumerate(shards):
        for side, array in (("img_emb", images), ("text_emb", texts)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            np.save(folder / side / f"{side}_{number}.npy", array)
        write_captions(folder / "metadata" / f"metadata_{number}.parquet", len(images), first=first)
        first += len(images)
    return folder
