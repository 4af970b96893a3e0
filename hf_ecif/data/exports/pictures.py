"""Images as files: their bytes as they are, under names that say what they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_ecif.data.exports.rows import ExportRows
from hf_ecif.data.images import image_bytes, image_facts


def picture(cell: dict[str, Any] | None) -> tuple[bytes, str] | None:
    """Bytes of an image and the ending of its name; None if there are none, or of no image."""
    content = image_bytes(cell)
    facts = image_facts(content) if content else None
    return (content, facts.suffix) if content and facts else None


def write_pictures(rows: ExportRows, folder: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Write the image of every row; number, cells and file of those that have one.

    Files are named by the number of their row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, cells in rows.records():
        found = picture(cells[rows.columns.image])
        if found is None:
            continue
        content, suffix = found
        name = f"{number:09d}.{suffix}"
        (folder / name).write_bytes(content)
        yield number, cells, name
