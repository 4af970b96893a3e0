"""Rows to export, as an audit would have them, from a table or from tars."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from hf_ecif.data.columns import set_column
from hf_ecif.data.exports.rows import ExportRows
from hf_ecif.data.summary import Columns

FLAGGED, UNREADABLE, COUNT = (1, 4), 3, 6


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def uid(row: int) -> str:
    """A uid whose order is not that of the rows."""
    return hashlib.md5(str(row).encode()).hexdigest()


def judged(rows: Dataset, image: str = "image", text: str = "text") -> ExportRows:
    """Rows with the influence columns that formats write; two are flagged, one is unreadable."""
    hidden = [row == UNREADABLE for row in range(len(rows))]
    flags = [None if hidden[row] else row in FLAGGED for row in range(len(rows))]
    chances = [None if flag is None else 0.9 if flag else 0.2 for flag in flags]
    columns = {
        "ecif_noise_probability": ("float32", chances),
        "ecif_flag": ("bool", flags),
        "ecif_reason": (
            "string",
            ["for a reason" if flag is not False else None for flag in flags],
        ),
        "ecif_suggested_text": ("string", ["a better one" if flag else None for flag in flags]),
        "ecif_duplicate_group": ("int64", [None] * len(rows)),
    }
    for name, (kind, values) in columns.items():
        rows = set_column(rows, name, values, kind)
    kept = np.array([flag is False for flag in flags])
    return ExportRows(
        rows.cast_column(image, Image(decode=False)),
        np.arange(len(rows)),
        kept,
        Columns(image=image, text=text),
    )


def table(kinds: Sequence[str] = ("PNG",), count: int = COUNT) -> ExportRows:
    """Rows of a table, with a nested column and a uid."""
    images = [picture(row, kinds[row % len(kinds)]) for row in range(count)]
    images[UNREADABLE] = b"no image"
    rows = Dataset.from_dict(
        {
            "image": [{"bytes": content, "path": None} for content in images],
            "text": [f"caption {row}" for row in range(count)],
            "uid": [uid(row) for row in range(count)],
            "about": [{"size": [row, 2], "note": None} for row in range(count)],
        }
    )
    return judged(rows)


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for field, content in members.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    """Contents of a tar by the names of its members, in order."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def tars(folder: Path, count: int = COUNT) -> ExportRows:
    """Rows as read from two tars, whose json has the uid."""
    samples = {
        f"{row // 3:05d}{row % 3:04d}": {
            "png": b"no image" if row == UNREADABLE else picture(row),
            "txt": f"caption {row}".encode(),
            # Bytes that no writer would make again: an order, spaces and an escape of their own.
            "json": json.dumps({"uid": uid(row), "b": [1, 2], "a": "\u00e9"}, indent=3).encode(),
        }
        for row in range(count)
    }
    keys = list(samples)
    folder.mkdir(parents=True)
    files = [
        str(
            write_tar(
                folder / f"{n:05d}.tar", {key: samples[key] for key in keys[3 * n : 3 * n + 3]}
            )
        )
        for n in range(count // 3)
    ]
    cache = str(folder.parent / "cache")
    rows = load_dataset("webdataset", data_files=files, split="train", cache_dir=cache)
    return judged(rows, "png", "txt")
