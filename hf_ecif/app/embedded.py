"""The demo's audit: influence columns that are stored, with images from the demo's data.

The demo holds a model, its data and ``audit/``, their audit without images. These are joined when
an app starts, so every picture is stored only once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_ecif.data.audit_folder import SUMMARY, AuditFolder
from hf_ecif.data.loading import load_rows
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.summary import Summary
from hf_ecif.errors import UserError
from hf_ecif.utils.demo import demo_folder
from hf_ecif.utils.files import write_json
from hf_ecif.utils.hub_paths import hide_folders

ABOUT = "A CLIP with 1.7 M parameters on pictures it has never seen; every fifth caption is wrong."
_SCORES = "scores.parquet"


def save_columns(audit: Path, place: Path) -> None:
    """Store an audit's influence columns and summary in ``place / "audit"``.

    Args:
        audit: folder of an audit of ``place / "data"``.
        place: the demo's folder.
    """
    from hf_ecif.data.columns import COLUMNS  # imports torch, which an app needs later, if at all

    scored = load_rows(str(AuditFolder(audit).scored), "train")
    columns = [name for name in scored.column_names if name in COLUMNS]
    (place / "audit").mkdir(exist_ok=True)
    scored.select_columns(columns).to_parquet(place / "audit" / _SCORES)
    told = hide_folders(AuditFolder(audit).read_summary().to_dict())
    write_json(told, place / "audit" / SUMMARY)


def open_embedded(folder: Path, place: Path | None = None) -> Summary:
    """Write the demo's audit, with its images, into a folder.

    Args:
        folder: a new folder for the audit.
        place: the demo's folder; the embedded one if absent.

    Returns:
        The summary, with the present places of model and data.

    Raises:
        UserError: the demo is not there, or its audit does not belong to its data.
    """
    place = place or demo_folder()
    if not (place / "audit" / _SCORES).is_file():
        raise UserError(f"{place} holds no audit. Name the folder of one: hf-ecif demo OUT.")
    summary = Summary.load(place / "audit" / SUMMARY)
    data, model = str(place / "data"), str(place / "model")
    rows = load_rows(data, summary.split)
    columns: Any = Dataset.from_parquet(
        str(place / "audit" / _SCORES), keep_in_memory=True, cache_dir=str(folder / "cache")
    )
    if len(rows) != len(columns):
        raise UserError(f"{place / 'audit'} is no audit of {data}. Run build_assets.py again.")
    write_shards(concatenate_datasets([rows, columns], axis=1), AuditFolder(folder).scored)
    query = summary.query.replace(dataset=data)
    summary = summary.replace(model=model, dataset=data, query=query, about=ABOUT)
    AuditFolder(folder).finish(summary)
    return summary
