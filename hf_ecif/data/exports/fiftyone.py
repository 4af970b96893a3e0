"""Rows as a dataset of FiftyOne, which `fiftyone.Dataset.from_dir` reads.

The layout is the one of plain values, which newer versions read as well: fiftyone 1.22 does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_ecif.data.exports.pictures import write_pictures
from hf_ecif.data.exports.rows import ROW, Exported, ExportRows
from hf_ecif.data.schema import is_plain
from hf_ecif.utils.files import write_json

OPENS = 'fiftyone.Dataset.from_dir(".", dataset_type=fiftyone.types.FiftyOneDataset)'
TAKEN = ("id", "filepath", "tags", "metadata", "media_type", "created_at", "last_modified_at")
NO_IMAGE = "{:,} rows have no image that can be read, and are left out."


def write_samples(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """A sample a row: its image, what became of it as a tag, its plain columns as fields, and the
    audit's verdict as a classification with its confidence."""
    kinds = rows.dataset.features
    names = {name: _field_name(name) for name, kind in kinds.items() if is_plain(kind)}
    kept = dict(zip(rows.numbers.tolist(), rows.kept.tolist(), strict=True))
    samples: list[dict[str, Any]] = []
    for number, cells, file in write_pictures(rows, folder / "data"):
        sample = {"filepath": f"data/{file}", "tags": tags_of(cells, kept[number]), ROW: number}
        sample |= {field: cells[name] for name, field in names.items()}
        samples.append(sample | _verdict(cells))
        advance(1)
    write_json({"samples": samples}, folder / "samples.json")
    missing = len(rows) - len(samples)
    notes = [NO_IMAGE.format(missing)] if missing else []
    return Exported(len(samples), ["samples.json", "data"], OPENS, notes)


def tags_of(cells: dict[str, Any], is_kept: bool) -> list[str]:
    """What became of a row, in words to filter by."""
    flagged = ["flagged"] if cells.get("ecif_flag") else []
    return ["kept" if is_kept else "removed", *flagged]


def _verdict(cells: dict[str, Any]) -> dict[str, Any]:
    probability, flag = cells.get("ecif_noise_probability"), cells.get("ecif_flag")
    if probability is None or flag is None:
        return {}
    return {
        "verdict": {
            "_cls": "Classification",
            "label": "wrong" if flag else "right",
            "confidence": probability if flag else 1 - probability,
        }
    }


def _field_name(name: str) -> str:
    """A name that FiftyOne takes for a field: no point, no underscore in front, none of its own."""
    plain = name.replace(".", "_").replace("$", "_").strip("_") or "column"
    return f"own_{plain}" if plain in (*TAKEN, ROW, "verdict") else plain
