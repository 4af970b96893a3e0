"""The audit that comes with the demo: its influence columns are kept, its images are the data's.

``spaces_demo`` holds a model, the data and ``audit/``, an audit of theirs without the images. They
are put together when an app starts, so that a picture is in the repository once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_ecif.data.loading import load_rows
from hf_ecif.data.parquet import write_shards
from hf_ecif.errors import UserError
from hf_ecif.utils.files import read_json, write_json

PLACE = Path(__file__).parents[2] / "spaces_demo"
ABOUT = "A CLIP of 1.7 M parameters on pictures it has never seen; every fifth caption is wrong."
_SCORES = "scores.parquet"


def save_columns(audit: Path, place: Path) -> None:
    """Keep an audit's columns and summary in ``place / "audit"``.

    Args:
        audit: folder of an audit of ``place / "data"``.
        place: the demo's folder.
    """
    from hf_ecif.data.columns import COLUMNS  # with torch, which an app needs later, if at all
    from hf_ecif.hub.markdown import hide_folders

    scored = load_rows(str(audit / "scored"), "train")
    columns = [name for name in scored.column_names if name in COLUMNS]
    (place / "audit").mkdir(exist_ok=True)
    scored.select_columns(columns).to_parquet(place / "audit" / _SCORES)
    write_json(hide_folders(read_json(audit / "summary.json")), place / "audit" / "summary.json")


def open_embedded(folder: Path, place: Path = PLACE) -> dict[str, Any]:
    """Put the demo's audit together.

    Args:
        folder: new; it becomes that of an audit.
        place: the demo's folder.

    Returns:
        The summary, in which model and data are where they are found now.

    Raises:
        UserError: the demo is not there, or its audit is not of its data.
    """
    if not (place / "audit" / _SCORES).is_file():
        raise UserError(
            f"{place} holds no demo, which is part of the repository but not of an installed "
            "package. Name the folder of an audit: hf-ecif demo OUT."
        )
    summary = read_json(place / "audit" / "summary.json")
    data, model = str(place / "data"), str(place / "model")
    rows = load_rows(data, summary["split"])
    columns: Any = Dataset.from_parquet(
        str(place / "audit" / _SCORES), keep_in_memory=True, cache_dir=str(folder / "cache")
    )
    if len(rows) != len(columns):
        raise UserError(f"{place / 'audit'} is no audit of {data}. Run build_assets.py again.")
    write_shards(concatenate_datasets([rows, columns], axis=1), folder / "scored")
    query = summary["query"] | {"dataset": data}
    summary |= {"model": model, "dataset": data, "query": query, "about": ABOUT}
    write_json(summary, folder / "summary.json")
    return summary
