"""Rows as captions in COCO's format, with a script that opens them in LightlyStudio.

The script was run with lightly-studio 1.2.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_ecif.data.exports.fiftyone import NO_IMAGE, tags_of
from hf_ecif.data.exports.pictures import write_pictures
from hf_ecif.data.exports.rows import ROW, Exported, ExportRows
from hf_ecif.data.images import image_facts
from hf_ecif.data.schema import is_influence_column, is_plain
from hf_ecif.utils.files import write_json, write_text

IMAGES, SCORES, SCRIPT = "images", "scores.json", "open.py"
OPEN = '''"""Open these rows in LightlyStudio: python open.py"""

import json
from pathlib import Path

import lightly_studio as ls

EMBED = False  # True adds search and maps by embeddings, and downloads a model for them

here = Path(__file__).resolve().parent
dataset = ls.ImageDataset.load_or_create(here.name)
for captions in sorted(here.glob("captions-*.json")):
    tag = captions.stem.removeprefix("captions-")
    dataset.add_samples_from_coco_caption(captions, here / "images", split=tag, embed=EMBED)
scores = json.loads((here / "scores.json").read_text(encoding="utf-8"))
dataset.update_metadata([(sample.sample_id, scores[sample.file_name]) for sample in dataset])

if __name__ == "__main__":
    ls.start_gui()
'''


def write_captions(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """`captions-kept.json` and the like, a file for every tag; `images/`; `scores.json`, the
    influence columns of each image; and `open.py`."""
    names = [
        n for n, kind in rows.dataset.features.items() if is_influence_column(n) and is_plain(kind)
    ]
    kept = dict(zip(rows.numbers.tolist(), rows.kept.tolist(), strict=True))
    parts: dict[str, dict[str, Any]] = {}
    scores = {}
    for number, cells, file in write_pictures(rows, folder / IMAGES):
        part = parts.setdefault(tags_of(cells, kept[number])[-1], _empty())
        facts = image_facts((folder / IMAGES / file).read_bytes())
        assert facts is not None  # or there would be no file
        part["images"].append(
            {"id": number, "file_name": file, "width": facts.width, "height": facts.height}
        )
        text = str(cells[rows.columns.text] or "")
        part["annotations"].append({"id": number, "image_id": number, "caption": text})
        told = {name: cells[name] for name in names if cells[name] is not None}
        scores[file] = {ROW: number} | told
        advance(1)
    for tag, part in parts.items():
        write_json(part, folder / f"captions-{tag}.json")
    write_json(scores, folder / SCORES)
    write_text(OPEN, folder / SCRIPT)
    missing = len(rows) - len(scores)
    files = [*(f"captions-{tag}.json" for tag in sorted(parts)), IMAGES, SCORES, SCRIPT]
    notes = [NO_IMAGE.format(missing)] if missing else []
    return Exported(len(scores), files, f"python {SCRIPT}", notes)


def _empty() -> dict[str, Any]:
    return {"images": [], "annotations": [], "categories": []}
