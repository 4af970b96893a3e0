"""Card of a cleaned data set, with its pictures and charts, from an audit's folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from huggingface_hub import DatasetCardData
from markupsafe import escape as escape_html
from PIL import Image
from pyarrow.dataset import dataset as parquet

from hf_ecif.data.images import read_pair
from hf_ecif.data.summary import Columns, Loaded, Summary
from hf_ecif.hub.markdown import (
    Metadata,
    as_list,
    describe_solve,
    merge_card,
    render,
)
from hf_ecif.reports.figures import probability_histogram
from hf_ecif.utils.hub_paths import hide_folders, parse_hub_path

EVIDENCE = "hf_ecif"
HISTOGRAM = f"{EVIDENCE}/histogram.png"
SUMMARY, REPORT = f"{EVIDENCE}/summary.json", f"{EVIDENCE}/report.html"
TAGS = ("hf-ecif", "data-valuation")
PICTURES = 8
PICTURE_SIDE = 160
CAPTION_LENGTH = 200
MAX_PIXELS = 64_000_000  # largest image that is opened to be shown
_SIZES = (
    "n<1K",
    "1K<n<10K",
    "10K<n<100K",
    "100K<n<1M",
    "1M<n<10M",
    "10M<n<100M",
    "100M<n<1B",
    "1B<n<10B",
)


@dataclass(frozen=True)
class Picture:
    """A removed pair as the card shows it.

    Attributes:
        path: where the small copy of its image is in the repository.
        content: the small copy, as a file.
    """

    path: str
    content: bytes
    caption: str
    probability: float
    reason: str


@dataclass(frozen=True)
class Layout:
    """Contents of the repository.

    Attributes:
        splits: number of rows of every split of the default configuration, the audited one first.
        removed: number of rows of the configuration `removed`; zero if there is none.
        columns: influence columns of the kept and removed rows, with their meaning.
        counts: number of rows by outcome, from `count_rows`.
        has_report: whether the report is among the files.
    """

    splits: dict[str, int]
    removed: int
    columns: dict[str, str]
    counts: dict[str, int]
    has_report: bool = True

    @property
    def audited(self) -> str:
        return next(iter(self.splits))

    def folder(self, split: str, removed: bool = False) -> str:
        """Folder of a split's parquet files."""
        return f"removed/{split}" if removed else f"data/{split}"


def write_card(
    card: str | None,
    repo_id: str,
    summary: Summary,
    layout: Layout,
    pictures: list[Picture],
    *,
    own: bool,
) -> str:
    """README of a cleaned data set.

    Args:
        card: the README into which our section goes; None if there is none.
        repo_id: repository of the new README.
        summary: summary of the audit, its folders hidden.
        layout: contents of the repository.
        pictures: removed pairs to show.
        own: whether ``card`` comes from this repository, so that its other configurations exist
            here; those of the source's card do not.

    Raises:
        UserError: the card's metadata is not a YAML mapping.
    """
    section = render(
        "dataset_card.md.j2",
        repo_id=repo_id,
        split=layout.audited,
        source=summary.dataset,
        rows=summary.rows,
        counts=layout.counts,
        cleaning=summary.cleaning,
        review=summary.review,
        noise=summary.noise,
        groups=summary.groups,
        others={name: rows for name, rows in layout.splits.items() if name != layout.audited},
        removed_config=layout.removed > 0,
        has_report=layout.has_report,
        histogram=HISTOGRAM,
        pictures=pictures,
        columns=layout.columns,
        settings=_settings(summary),
        warnings=summary.warnings,
    )

    def change(metadata: Metadata) -> Metadata:
        return _change(metadata, summary, layout, own)

    title = repo_id.partition("/")[2]
    return merge_card(card, section, title, change, DatasetCardData)


def count_rows(kept: Sequence[Path], removed: Sequence[Path]) -> dict[str, int]:
    """Number of rows by outcome; outcomes without rows are left out, but for the sums.

    Args:
        kept: parquet files of the kept rows.
        removed: parquet files of the removed rows.
    """
    counts: dict[str, int] = {}
    for name, shards in (("kept", kept), ("removed", removed)):
        flags = _read_column(shards, "ecif_flag")
        parts = {
            "flagged as probably misaligned": sum(flag is True for flag in flags),
            "not flagged": sum(flag is False for flag in flags) if name == "removed" else 0,
            "unreadable": sum(flag is None for flag in flags),
            "with another caption": sum(
                text is not None for text in _read_column(shards, "ecif_original_text")
            ),
        }
        counts[name] = len(flags)
        counts |= {f"{name}, {part}": count for part, count in parts.items() if count}
    return counts


def show_removed(shards: Sequence[Path], columns: Columns, limit: int = PICTURES) -> list[Picture]:
    """Flagged pairs with the highest noise probability, with small copies of their images.

    Args:
        shards: parquet files of the removed rows.
        columns: names of the columns of images and captions.
        limit: largest number of pairs.
    """
    rows = parquet([str(shard) for shard in shards])
    values = rows.to_table(columns=["ecif_noise_probability"])[0]
    places = _places(values)
    probability = np.array(_flat(values), dtype=float)
    order = np.argsort(-probability, kind="stable")[: int(np.isfinite(probability).sum())]
    wanted = [columns.image, columns.text, "ecif_noise_probability", "ecif_reason"]
    pictures: list[Picture] = []
    for number in order[:limit].tolist():
        row, place = places[number]
        cells = rows.take([row], columns=wanted).to_pylist()[0]
        cells |= {name: cells[name][place] for name in wanted if isinstance(cells[name], list)}
        pair = read_pair(cells[columns.image], cells[columns.text], MAX_PIXELS)
        if pair.image is None:
            continue
        pictures.append(
            Picture(
                path=f"{EVIDENCE}/removed/{len(pictures):02d}.webp",
                content=_small(pair.image),
                caption=_shorten(pair.text),
                probability=cells["ecif_noise_probability"],
                reason=_shorten(cells["ecif_reason"], "; "),
            )
        )
    return pictures


def draw_histogram(shards: Sequence[Path], threshold: float) -> bytes:
    """Histogram of the noise probabilities of all scored rows, as a PNG.

    Args:
        shards: parquet files of all rows.
        threshold: probability above which a row is flagged.
    """
    columns = ["ecif_noise_probability", "ecif_flag"]
    probability, flags = (np.array(_read_column(shards, name), dtype=float) for name in columns)
    known = np.isfinite(probability) & np.isfinite(flags)
    probability, flag = probability[known], flags[known] == 1.0
    stream = io.BytesIO()
    figure = probability_histogram(probability, flag, threshold)
    figure.savefig(stream, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def public_report(page: str, summary: Summary) -> str:
    """The report, with folders replaced as in `hide_folders`."""
    for before in (summary.model, summary.dataset, summary.query.source):
        page = page.replace(str(escape_html(before)), str(escape_html(hide_folders(before))))
    return page


def _change(metadata: Metadata, summary: Summary, layout: Layout, own: bool) -> Metadata:
    """Metadata with our configurations, without whatever they replace or make wrong."""
    ours = ("default", "removed")
    configs, infos = [], []
    if own:
        configs = [
            config
            for config in as_list(metadata.get("configs"))
            if isinstance(config, dict) and config.get("config_name", "default") not in ours
        ]
        infos = [
            info
            for info in as_list(metadata.get("dataset_info"))
            if isinstance(info, dict) and info.get("config_name", "default") not in ours
        ]
    tags = [str(tag) for tag in as_list(metadata.get("tags"))]
    sources = [str(name) for name in as_list(metadata.get("source_datasets"))]
    source = parse_hub_path(summary.dataset)
    if source and source.repo_id not in sources:
        sources.append(source.repo_id)
    changed = metadata | {
        "tags": tags + [tag for tag in TAGS if tag not in tags],
        "size_categories": [_size_category(sum(layout.splits.values()))],
        "configs": _configs(layout) + configs,
        "dataset_info": infos or None,
        "source_datasets": sources or None,
    }
    return {name: value for name, value in changed.items() if value is not None}


def _configs(layout: Layout) -> list[dict[str, Any]]:
    configs = [
        {
            "config_name": "default",
            "data_files": [
                {"split": split, "path": f"{layout.folder(split)}/*.parquet"}
                for split in layout.splits
            ],
        }
    ]
    if layout.removed:
        folder = layout.folder(layout.audited, removed=True)
        files = [{"split": layout.audited, "path": f"{folder}/*.parquet"}]
        configs.append({"config_name": "removed", "data_files": files})
    return configs


def _settings(summary: Summary) -> dict[str, Any]:
    config, marks, query, fit = summary.config, summary.fingerprints, summary.query, summary.fit
    settings: dict[str, Any] = {
        "model": f"{summary.model} ({_loaded(summary.loaded)}fingerprint {marks['model']})",
        "data": f"{summary.dataset}, split {summary.split} (fingerprint {marks['data']})",
        "query": f"{query.source}: {query.rows} rows (fingerprint {marks['query']})",
        "parameters attributed": f"{config['parameters']} ({fit.count:,})",
        "fit": f"{config['fit_epochs']} epochs, loss {fit.loss_before:.3g} to {fit.loss_after:.3g}",
    }
    for solve in summary.solvers:
        settings[f"solver for the {solve.purpose}"] = describe_solve(solve.to_dict(), config)
    versions = ", ".join(f"{name} {number}" for name, number in summary.versions.items())
    return settings | {
        "seed": summary.seed,
        "config": f"fingerprint {marks['config']}; every value is in summary.json",
        "versions": versions,
    }


def _loaded(loaded: Loaded) -> str:
    """How the model was loaded, such as its revision on the Hub; empty if not known."""
    known = {name: value for name, value in loaded.to_dict().items() if value is not None}
    return "".join(f"{name.replace('_', ' ')} {value}, " for name, value in known.items())


def _size_category(rows: int) -> str:
    return _SIZES[min(max(len(str(rows)) - 3, 0), len(_SIZES) - 1)]


def _small(image: Image.Image) -> bytes:
    small, stream = image.copy(), io.BytesIO()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    small.save(stream, "WEBP", quality=82)
    return stream.getvalue()


def _read_column(shards: Sequence[Path], name: str) -> list[Any]:
    """Values of a column, of lists all that are in them; empty if there is no such column."""
    rows = parquet([str(shard) for shard in shards])
    if name not in rows.schema.names:
        return []
    return _flat(rows.to_table(columns=[name])[name])


def _flat(values: pa.ChunkedArray) -> list[Any]:
    is_list = pa.types.is_list(values.type)
    return cast(list[Any], (values.combine_chunks().flatten() if is_list else values).to_pylist())


def _places(values: pa.ChunkedArray) -> list[tuple[int, int]]:
    """Row of each value, and its place in the list there."""
    if not pa.types.is_list(values.type):
        return [(row, 0) for row in range(len(values))]
    return [(row, place) for row, one in enumerate(values.to_pylist()) for place in range(len(one))]


def _shorten(text: str, between: str = "") -> str:
    """The text, or its beginning, cut after a whole part where ``between`` separates parts."""
    text = " ".join(text.split())
    if len(text) <= CAPTION_LENGTH:
        return text
    start = text[: CAPTION_LENGTH - 1].rstrip()
    return (start.rpartition(between)[0] if between in start and between else start) + "…"
