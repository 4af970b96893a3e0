"""Small audits as folders, written by the library's own functions on made-up scores."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_ecif.data.cleaning import clean
from hf_ecif.data.columns import COLUMNS, WRONG_WORDS, set_column
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.summary import Summary
from hf_ecif.reports.audit import write_report
from hf_ecif.utils.files import write_text

README = """---
license: cc-by-4.0
language: no
tags:
- birds
dataset_info:
- config_name: default
  splits:
  - {name: train, num_bytes: 6546, num_examples: 12}
  - {name: validation, num_bytes: 2182, num_examples: 4}
  - {name: test, num_bytes: 1637, num_examples: 3}
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
  - split: test
    path: test.parquet
- config_name: extra
  data_files: extra.parquet
---
# Birds of Oslo

Taken by **Kari**. Please cite her.
"""
FEATURES = Features(
    {"image": Image(), "text": Value("string"), "kind": ClassLabel(names=["tit", "crow"])}
)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rows(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_dict(
        {
            "image": [{"bytes": picture(seed + row), "path": None} for row in range(count)],
            "text": [f"bird number {seed + row}" for row in range(count)],
            "kind": [row % 2 for row in range(count)],
        },
        features=FEATURES,
    )


def write_source(folder: Path, readme: str | None = README, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    for name, data in (
        ("train", rows(count)),
        ("validation", rows(4, 100)),
        ("test", rows(3, 200)),
        ("extra", rows(2, 300)),
    ):
        data.to_parquet(folder / f"{name}.parquet")
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


def write_audit(
    output: Path,
    source: str,
    *,
    data: Dataset | None = None,
    flagged: Sequence[int] = (1, 5),
    unreadable: Sequence[int] = (7,),
    captions: dict[int, str] | None = None,
    suggestions: dict[int, str] | None = None,
    report: bool = False,
) -> Path:
    """What an audit of the split `train` leaves behind."""
    data = rows(12) if data is None else data
    count = len(data)
    texts = data["text"][:]
    for row, caption in (captions or {}).items():
        texts[row] = caption
    data = data.cast_column("image", Image(decode=False)).remove_columns("text")
    data = data.add_column("text", texts).select_columns(list(FEATURES))
    random = np.random.default_rng(3)
    for name in COLUMNS:
        kind, values = _fake(name, count, flagged, random)
        if name == "ecif_suggested_text":
            values = [(suggestions or {}).get(row) for row in range(count)]
        hidden = [
            None if row in unreadable and name != "ecif_reason" else value
            for row, value in enumerate(values)
        ]
        if name == "ecif_reason":
            hidden = [
                "image unreadable" if row in unreadable else value
                for row, value in enumerate(hidden)
            ]
        data = set_column(data, name, hidden, kind)
    result = clean(data)
    for name, part in (("scored", data), ("kept", result.kept), ("removed", result.removed)):
        write_shards(part, output / name, max_shard_bytes=2**20)
    summary = Summary.from_dict(fake_summary(source, count, len(flagged), len(unreadable)))
    assert summary.removed == len(result.removed)
    if report:  # takes a second
        write_report(data, summary, output / "report.html")
    else:
        write_text(f"<p>{source}</p>", output / "report.html")
    summary.save(output / "summary.json")
    return output


def _fake(
    name: str, count: int, flagged: Sequence[int], random: np.random.Generator
) -> tuple[str | List, list]:
    if name == "ecif_reason":
        return "string", ["looks <b>wrong</b>" if r in flagged else None for r in range(count)]
    if name == "ecif_flag":
        return "bool", [row in flagged for row in range(count)]
    if name == "ecif_noise_probability":
        return "float32", [0.9 if row in flagged else 0.1 for row in range(count)]
    if name == "ecif_borderline":
        return "bool", [False] * count
    if name == "ecif_suggested_text":
        return "string", [None] * count
    if name == "ecif_wrong_words":
        word = {"word": "bird", "start": 0, "end": 4}
        return WRONG_WORDS, [[word] if row in flagged else None for row in range(count)]
    if name == "ecif_duplicate_group":
        return "int64", [None] * count
    return "float32", random.normal(size=count).tolist()


def fake_summary(source: str, count: int, flagged: int, unreadable: int) -> dict:
    """The values of a summary, as version 0.1 wrote them."""
    solver = {
        "purpose": "task score",
        "method": "cg",
        "relative_residual": 8e-4,
        "tolerance": 1e-3,
        "damping": 0.5,
        "relative_damping": 30.0,
    }
    return {
        "rows": count,
        "scored": count - unreadable,
        "unreadable": unreadable,
        "unreadable_reasons": {"image unreadable": unreadable},
        "flagged": flagged,
        "kept": count - flagged - unreadable,
        "removed": flagged + unreadable,
        "noise": {"rate": 0.16, "threshold": 0.4, "borderline": 0},
        "query": {"source": f"{source}, split validation", "rows": 4, "chosen": False},
        "fit": {"loss_before": 1.3, "loss_after": 1.1, "count": 16384},
        "solvers": [solver],
        "config": {"parameters": "projections", "fit_epochs": 2, "curvature": "ggn", "seed": 0},
        "versions": {"python": "3.11.7", "hf_ecif": "0.1.0"},
        "fingerprints": {"model": "e115", "data": "85a6", "query": "66a8", "config": "69ed"},
        "seed": 0,
        "columns": {"image": "image", "text": "text"},
        "model": "some/clip",
        "loaded": {"revision": "c0ffee", "dtype": "float32"},
        "dataset": source,
        "split": "train",
        "warnings": ["With 11 rows, everything is a guess."],
        "seconds": {"load": 0.1, "total": 0.2},
    }
