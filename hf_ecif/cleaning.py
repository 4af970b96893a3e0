"""Rows out: what a detection keeps, mends and removes, and the parts as files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from numpy.typing import NDArray

from hf_ecif.data import check_columns, image_bytes, load_rows, require_text
from hf_ecif.errors import UserError
from hf_ecif.files import CHECKPOINTS, aside, read_json, require_new, write_json
from hf_ecif.progress import ProgressFactory, silent

if TYPE_CHECKING:
    from hf_ecif.comparison import Comparison

Bools = NDArray[np.bool_]

WEIGHT = "ecif_weight"
ORIGINAL_TEXT = "ecif_original_text"
NEEDED = {
    "worst": ("ecif_noise_probability", "ecif_score"),
    "weight": ("ecif_noise_probability",),
    "relabel": ("ecif_suggested_text",),
}
ROWS_PER_GROUP = 50  # bounds memory: images of this many rows are held at a time


Strategy = Literal["drop", "worst", "weight", "relabel"]


@dataclass(frozen=True, kw_only=True)
class CleanRequest:
    """What to clean and where to; the fields are the options of ``hf-ecif clean``.

    Attributes:
        audit: Folder of an audit, or its `scored` folder.
        output: New folder for `kept`, `removed` and `cleaning.json`, and for the audit's summary
            and report with the new counts, for `push`; None writes nothing.
        strategy: As in `clean`.
        share: As in `clean`.
        beside: Further strategies, which are counted and compared, but not written.
        text_column: Of the captions; the one that was audited, if absent.
        test: Data that nothing was decided by, on which to compare models fine-tuned on the rows
            before and after; None compares nothing.
        test_split: Split of them.
        repeats: Of every fine-tuning, each with its own order of batches.
        model: What is fine-tuned; the audited one, if absent.
    """

    audit: Path
    output: Path | None = None
    strategy: Strategy = "drop"
    share: float | None = None
    beside: tuple[Strategy, ...] = ()
    text_column: str | None = None
    test: str | None = None
    test_split: str = "test"
    repeats: int = 3
    model: str | None = None


@dataclass(frozen=True)
class CleanResult:
    """A data set in two parts, which together are all of its rows.

    Attributes:
        kept: Rows to go on with.
        removed: The others, each with its `ecif_reason`.
    """

    kept: Dataset
    removed: Dataset

    def counts(self) -> dict[str, int]:
        """Rows by what became of them; those kept include those relabelled."""
        flags = self.removed.with_format(None)["ecif_flag"][:]
        counts = {"kept": len(self.kept)}
        if ORIGINAL_TEXT in self.kept.column_names:
            originals = self.kept.with_format(None)[ORIGINAL_TEXT][:]
            counts["relabelled"] = sum(text is not None for text in originals)
        return counts | {
            "removed": len(flags),
            "removed_flagged": sum(flag is True for flag in flags),
            "removed_not_flagged": sum(flag is False for flag in flags),
            "removed_unreadable": sum(flag is None for flag in flags),
        }


@dataclass(frozen=True)
class Cleaning:
    """What `run_clean` made.

    Attributes:
        results: By strategy, the one that is written first.
        comparison: Of models fine-tuned on the rows before and after; None without a test.
    """

    results: dict[Strategy, CleanResult]
    comparison: Comparison | None

    @property
    def result(self) -> CleanResult:
        """Of the strategy that is written."""
        return next(iter(self.results.values()))


def clean(
    scored: Dataset,
    strategy: Strategy = "drop",
    *,
    share: float | None = None,
    text_column: str = "text",
) -> CleanResult:
    """Part a scored data set into the rows to keep and the rows to remove.

    ``drop`` removes the flagged rows, ``worst`` the ``share`` of the scored rows with the highest
    `ecif_noise_probability`, of equal ones those with the lowest `ecif_score`. ``relabel`` gives
    flagged rows their `ecif_suggested_text`, keeps the old caption as `ecif_original_text`, and
    removes those without a suggestion. All three remove what could not be scored. ``weight``
    removes nothing: `ecif_weight` is 1 - `ecif_noise_probability`, and 0 of what could not be
    scored.

    Args:
        scored: Rows with the influence columns; null in `ecif_flag` where a row could not be
            scored, null in `ecif_reason` where it is not flagged.
        strategy: What becomes of suspicious rows.
        share: In (0, 1), for ``worst`` alone.
        text_column: Of the captions, for ``relabel`` alone.

    Raises:
        UserError: If a column is missing, the data have been cleaned already, the share is none,
            or a row would be removed without a reason.
    """
    _check(scored, strategy, share, text_column)
    if strategy == "worst" and share is not None:
        return _part(*_mark_worst(scored, share))
    if strategy == "weight":
        return _part(_add_weight(scored), np.zeros(len(scored), dtype=bool))
    flags = _column(scored, "ecif_flag")
    suspicious = np.array([flag is None or flag for flag in flags], dtype=bool)
    if strategy == "relabel":
        mended = np.array([text is not None for text in _column(scored, "ecif_suggested_text")])
        relabelled = np.array([flag is True for flag in flags], dtype=bool) & mended
        return _part(_relabel(scored, relabelled, text_column), suspicious & ~relabelled)
    return _part(scored, suspicious)


def run_clean(request: CleanRequest, progress: ProgressFactory = silent) -> Cleaning:
    """Clean an audit's rows, and write what `CleanRequest.output` says.

    Raises:
        UserError: The audit or a column is missing, the output has something in it, or the test
            cannot be read.
    """
    output = request.output
    if output:
        require_new(output)
    home, scored, summary = _open_audit(request.audit)
    text_column = request.text_column or summary.get("columns", {}).get("text", "text")
    results = _clean_by_all(scored, request, text_column)
    comparison = None
    if request.test:
        from hf_ecif.comparison import compare_cleanings  # with torch, which the rest does without

        comparison = compare_cleanings(request, scored, results, summary, text_column, progress)
    cleaning = Cleaning(results, comparison)
    if output:
        told = _write(cleaning, request, output)
        if summary:
            _write_evidence(home, scored, summary | {"cleaning": told}, output)
    return cleaning


def write_shards(dataset: Dataset, folder: Path, max_shard_bytes: int = 256 * 2**20) -> None:
    """Write parquet files that `datasets.load_dataset(str(folder))` opens.

    Images keep their bytes; those that are only paths are read into the files. The folder appears
    when it is whole, and not before. No rows make one file of the schema alone, which
    `load_dataset` opens with `streaming=True`; without, it refuses whatever has no rows.

    Args:
        dataset: The rows.
        folder: A folder that does not exist yet, or is empty.
        max_shard_bytes: A file is closed before it would grow beyond this, uncompressed.

    Raises:
        UserError: If the folder already has something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists. Remove it, or choose another folder.")
    # A sibling, since a rename is only atomic within one file system.
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        shards = _write_files(dataset, partial, max_shard_bytes)
        for number, shard in enumerate(shards):
            shard.rename(partial / f"data-{number:05d}-of-{len(shards):05d}.parquet")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_rows(dataset: Dataset, path: Path) -> None:
    """Write one parquet file, in one step, as `write_shards` does."""
    features = _decodable(dataset.features)
    with aside(path) as partial, pq.ParquetWriter(partial, features.arrow_schema) as writer:
        for group in _row_groups(dataset, features):
            writer.write_table(group)


def _check(scored: Dataset, strategy: str, share: float | None, text_column: str) -> None:
    if strategy not in get_args(Strategy):
        raise UserError(f"strategy = {strategy!r}: must be one of {', '.join(get_args(Strategy))}.")
    for column in ("ecif_flag", "ecif_reason", *NEEDED.get(strategy, ())):
        if column not in scored.column_names:
            raise UserError(
                f"There is no column {column!r}. Run 'hf-ecif audit' first, and clean its output."
            )
    if strategy == "relabel" and text_column not in scored.column_names:
        raise UserError(
            f"There is no text column {text_column!r} to relabel. The columns are: "
            f"{', '.join(scored.column_names)}. Name the right one with --text-column."
        )
    if strategy == "relabel":
        require_text(scored, text_column)
    cleaned = {ORIGINAL_TEXT, WEIGHT} & set(scored.column_names)
    if cleaned:
        raise UserError(
            f"These rows have been cleaned before: they have {', '.join(sorted(cleaned))}. Clean "
            "the rows of the audit, its folder 'scored'."
        )
    if strategy == "worst" and (share is None or not 0 < share < 1):
        raise UserError(f"share = {share}: the strategy worst needs one between 0 and 1.")
    if strategy != "worst" and share is not None:
        raise UserError(f"share = {share}: only the strategy worst takes one.")


def _open_audit(folder: Path) -> tuple[Path, Dataset, dict[str, Any]]:
    """The folder of an audit, its scored rows, and its summary; empty where there is none."""
    if not folder.is_dir():
        raise UserError(f"There is no audit in {folder}. Name the --output of 'hf-ecif audit'.")
    inside = (folder / "scored").is_dir()
    if not inside and (folder / CHECKPOINTS).is_dir():
        raise UserError(
            f"The audit in {folder} was interrupted. Finish it first: hf-ecif audit --resume."
        )
    home = folder if inside else folder.parent
    path = home / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    return home, load_rows(str(folder / "scored" if inside else folder), "train"), summary


def _clean_by_all(
    scored: Dataset, request: CleanRequest, text_column: str
) -> dict[Strategy, CleanResult]:
    strategies = dict.fromkeys((request.strategy, *request.beside))
    # A share without the one strategy that takes it is passed on, to be refused.
    takers = [strategy for strategy in strategies if strategy == "worst"] or strategies
    return {
        strategy: clean(
            scored,
            strategy,
            share=request.share if strategy in takers else None,
            text_column=text_column,
        )
        for strategy in strategies
    }


def _write(cleaning: Cleaning, request: CleanRequest, output: Path) -> dict[str, Any]:
    """The rows, and what is told of them in ``cleaning.json``."""
    result = cleaning.result
    for name, part in (("kept", result.kept), ("removed", result.removed)):
        write_shards(part, output / name)
    summary: dict[str, Any] = {"audit": str(request.audit), "strategy": request.strategy}
    summary |= {"share": request.share, "counts": result.counts()}
    if cleaning.comparison:
        from hf_ecif.outcome_pages import write_cleaning_page  # with plots

        summary["comparison"] = cleaning.comparison.to_dict()
        write_cleaning_page(summary, output / "cleaning.html")
    write_json(summary, output / "cleaning.json")
    return summary


def _write_evidence(home: Path, scored: Dataset, summary: dict[str, Any], output: Path) -> None:
    """Summary and report of the audit with the new counts, so that the rows can be published."""
    counts = summary["cleaning"]["counts"]
    summary |= {name: counts[name] for name in ("kept", "removed")}
    if (home / "report.html").is_file():
        from hf_ecif.report import write_report  # with plots

        columns = summary["columns"]
        rows = check_columns(scored, columns["image"], columns["text"])
        write_report(rows, summary, output / "report.html")
    write_json(summary, output / "summary.json")


def _part(scored: Dataset, remove: Bools) -> CleanResult:
    reasons = _column(scored, "ecif_reason")
    unexplained = [row for row in np.flatnonzero(remove).tolist() if not reasons[row]]
    if unexplained:
        raise UserError(
            f"{len(unexplained)} rows would be removed without an 'ecif_reason', the first of them "
            f"row {unexplained[0]}. Run detect again, and clean what it returns."
        )
    kept, removed = (scored.select(np.flatnonzero(part)) for part in (~remove, remove))
    assert len(kept) + len(removed) == len(scored)
    return CleanResult(kept=kept, removed=removed)


def _mark_worst(scored: Dataset, share: float) -> tuple[Dataset, Bools]:
    """The rows with a reason for each that goes, and which go."""
    probability, score = (
        np.array(_column(scored, name), dtype=float)  # null becomes not-a-number
        for name in ("ecif_noise_probability", "ecif_score")
    )
    remove = np.isnan(probability)
    order = np.lexsort((score, -probability))  # not-a-number comes last
    worst = order[: round(share * int((~remove).sum()))]
    remove[worst] = True
    reasons = _column(scored, "ecif_reason")
    for row in worst.tolist():
        reasons[row] = reasons[row] or (
            f"among the worst {share:.3g} of the rows, at {probability[row]:.0%}; not flagged"
        )
    return _replace(scored, "ecif_reason", reasons), remove


def _add_weight(scored: Dataset) -> Dataset:
    probability = _column(scored, "ecif_noise_probability")
    weights = [0.0 if value is None else 1.0 - value for value in probability]
    return scored.add_column(WEIGHT, weights, feature=Value("float32"))


def _relabel(scored: Dataset, relabelled: Bools, text_column: str) -> Dataset:
    old, new = _column(scored, text_column), _column(scored, "ecif_suggested_text")
    texts = [after if r else before for before, after, r in zip(old, new, relabelled, strict=True)]
    originals = [text if r else None for text, r in zip(old, relabelled, strict=True)]
    scored = _replace(scored, text_column, texts)
    return scored.add_column(ORIGINAL_TEXT, originals, feature=Value("string"))


def _column(dataset: Dataset, name: str) -> list[Any]:
    return list(dataset.with_format(None)[name][:])


def _replace(dataset: Dataset, name: str, values: list[Any]) -> Dataset:
    """The data set with other values in a column, in its old place."""
    feature, order = dataset.features[name], dataset.column_names
    changed = dataset.remove_columns(name).add_column(name, values, feature=feature)
    return changed.select_columns(order)


def _write_files(dataset: Dataset, folder: Path, max_bytes: int) -> list[Path]:
    """Write numbered files; how many there will be is known only at the end."""
    features = _decodable(dataset.features)
    groups = _row_groups(dataset, features)
    shards: list[Path] = []
    group = next(groups, None)
    while group is not None or not shards:
        shards.append(folder / str(len(shards)))
        with pq.ParquetWriter(shards[-1], features.arrow_schema) as writer:
            size = 0
            while group is not None and (size == 0 or size + group.nbytes <= max_bytes):
                writer.write_table(group)
                size += group.nbytes
                group = next(groups, None)
    return shards


def _row_groups(dataset: Dataset, features: Features) -> Iterator[pa.Table]:
    for batch in dataset.with_format("arrow").iter(batch_size=ROWS_PER_GROUP):
        columns = [
            _embedded(batch[name]) if isinstance(feature, Image) else batch[name]
            for name, feature in features.items()
        ]
        yield pa.table(columns, schema=features.arrow_schema)


def _embedded(column: pa.ChunkedArray) -> pa.Array:
    """The same images by their bytes. Where there are none, the path stays to tell which it was."""
    cells = []
    for cell in column.to_pylist():
        content = image_bytes(cell)
        if content is not None:
            cell = {"bytes": content, "path": cell["path"] and os.path.basename(cell["path"])}
        cells.append(cell)
    return pa.array(cells, type=Image.pa_type)


def _decodable(features: Features) -> Features:
    """Image columns as images again, for whoever opens the files."""
    return Features(
        {
            name: Image(mode=feature.mode) if isinstance(feature, Image) else feature
            for name, feature in features.items()
        }
    )
