"""Fit once, then score any number of rows: blocks in, parquet shards out, flat in memory.

A block of rows is scored on its own and written as one shard, aside and then renamed. So a run that
was killed goes on with the first shard that is missing, and gives the same rows the same scores.
Several processes take turns at the blocks.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets.distributed import split_dataset_by_node

from hf_ecif import processes
from hf_ecif.checkpoints import MANIFEST, Checkpoints, read_manifest, require_same
from hf_ecif.cleaning import write_rows
from hf_ecif.config import InfluenceConfig
from hf_ecif.data import (
    check_columns,
    drop_influence_columns,
    fingerprint_source,
    load_rows,
    stream_rows,
)
from hf_ecif.errors import UserError
from hf_ecif.files import CHECKPOINTS, PARTIAL, require_writable, sweep, write_json
from hf_ecif.fitted import Fitted
from hf_ecif.influence import InfluenceModel
from hf_ecif.pretrained import FIT
from hf_ecif.progress import ProgressFactory, silent
from hf_ecif.scorer import REASON, scored_columns
from hf_ecif.sources import Sources, open_sources

T = TypeVar("T")

SHARDS, SUMMARY = "scored", "scoring.json"
BATCHES = 4  # contrastive batches of a block: its rows can meet in many ways


@dataclass(frozen=True, kw_only=True)
class FitRequest(Sources):
    """What to fit; the fields are the options of ``hf-ecif fit``."""

    output: Path
    overwrite: bool = False
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What to score; the fields are the options of ``hf-ecif score``."""

    influence: str
    dataset: str
    output: Path
    split: str = "train"
    image_column: str = "image"
    text_column: str = "text"
    streaming: bool = False
    overwrite: bool = False
    resume: bool = False


def run_fit(
    request: FitRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> Fitted:
    """Fit, and save what scoring needs into a folder.

    Raises:
        UserError: something in the request cannot be.
    """
    processes.decide(lambda: _require_free(request))
    opened = open_sources(request, config)
    manifest = config.deciding() | opened.fingerprints() | {"columns": request.columns}
    known = Checkpoints.open(request.output / CHECKPOINTS, manifest, resume=request.resume)
    rows, query = opened.read(progress, known)
    fitted = opened.model.fit(rows, query, progress, known)
    if processes.is_main():
        opened.model.save_pretrained(request.output)
        sweep(request.output)
        known.clear()
    return fitted


def run_score(request: ScoreRequest, progress: ProgressFactory = silent) -> dict[str, Any]:
    """Score all rows with a saved fit; writes shards of parquet and ``scoring.json``.

    Returns:
        The content of ``scoring.json``.

    Raises:
        UserError: something in the request cannot be.
    """
    processes.decide(lambda: _require_free(request))
    model = _open_fit(request.influence)
    dataset, size = _open(request), BATCHES * model.config.batch_size
    manifest = {
        "fit": model.fingerprint,
        "dataset": request.dataset,
        "data": processes.decide(lambda: fingerprint_source(request.dataset)),
        "split": request.split,
        "streaming": request.streaming,
        "columns": {"image": request.image_column, "text": request.text_column},
        "processes": processes.count(),
        "rows_per_block": size,
    }
    processes.decide(lambda: _begin(request, manifest))
    mine = _score_blocks(request, model, dataset, size, progress)
    counts = sum(processes.collect(mine), Counter())
    if not counts["rows"]:
        processes.decide((request.output / MANIFEST).unlink)  # there is nothing to go on with
        raise UserError(f"{request.dataset}: the split {request.split!r} has no rows.")
    summary = manifest | {name: counts[name] for name in ("rows", "unscored", "shards")}
    if processes.is_main():
        write_json(summary, request.output / SUMMARY)
        sweep(request.output)
        (request.output / MANIFEST).unlink()
    return summary


def _open_fit(name: str) -> InfluenceModel:
    remedy = "give the folder of 'hf-ecif fit', or the Hub id of one that was pushed."
    try:
        model = InfluenceModel.from_pretrained(name)
    except UserError as error:
        raise UserError(f"There is no fit to score with: {error} Here, {remedy}") from error
    if model.fitted is None:
        raise UserError(f"{name} holds no fit: {remedy}")
    return model


# --------------------------------------------------------------------------------- blocks of rows


class _Block(NamedTuple):
    """Rows that are scored together.

    Attributes:
        shard: name of its file.
        load: reads the rows.
    """

    shard: str
    load: Callable[[], Dataset]


def _score_blocks(
    request: ScoreRequest,
    model: InfluenceModel,
    dataset: Dataset | IterableDataset,
    size: int,
    progress: ProgressFactory,
) -> Counter[str]:
    """Score this process's blocks; rows, those without a score, and shards."""
    folder = request.output / SHARDS
    counts: Counter[str] = Counter()
    if isinstance(dataset, IterableDataset):
        blocks = _blocks_of_stream(dataset, size, folder)
        advance = progress("Score rows", 0)
    else:
        blocks = _blocks_of(dataset, size)
        advance = progress("Score rows", sum(len(rows) for rows in _my_ranges(len(dataset), size)))
    for block in blocks:
        path = folder / block.shard
        if not _is_whole(path):
            with processes.alone():
                write_rows(_scored(model, block.load(), request), path)
        done = _count(path)
        counts.update(done)
        advance(done["rows"])
    return counts


def _scored(model: InfluenceModel, rows: Dataset, request: ScoreRequest) -> Dataset:
    """The rows with their influence columns."""
    names = request.image_column, request.text_column
    checked = check_columns(drop_influence_columns(rows), *names)
    columns = scored_columns(model, model.read_any(checked, *names))
    types = {name: Value("string" if name == REASON else "float32") for name in columns}
    scored = Dataset.from_dict(columns, features=Features(types))
    return concatenate_datasets([checked, scored], axis=1)


def _my_ranges(count: int, size: int) -> list[range]:
    """Rows of this process's blocks; the last rows join a block if they make none of their own."""
    starts = list(range(0, max(count - size // 2, 1), size))
    ranges = [range(*bounds) for bounds in zip(starts, [*starts[1:], count], strict=True)]
    return ranges[processes.rank() :: processes.count()]


def _blocks_of(dataset: Dataset, size: int) -> Iterator[_Block]:
    for rows in _my_ranges(len(dataset), size):
        yield _Block(f"rows-{rows.start:012d}.parquet", partial(dataset.select, rows))


def _blocks_of_stream(dataset: IterableDataset, size: int, folder: Path) -> Iterator[_Block]:
    """Blocks that are done already, then those still to be read; one is read ahead."""
    rank = processes.rank()
    mine = split_dataset_by_node(dataset, rank, processes.count())
    done = [*takewhile(_is_whole, sorted(folder.glob(f"part-{rank:04d}-*.parquet")))]
    for path in done:
        yield _Block(path.name, _never)
    rest = mine.skip(sum(_count(path)["rows"] for path in done))
    batches = _with_tail(_ahead(rest.iter(batch_size=size)), size)
    for number, cells in enumerate(batches, start=len(done)):
        load = partial(Dataset.from_dict, cells, features=dataset.features)
        yield _Block(f"part-{rank:04d}-{number:08d}.parquet", load)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one fetched while the last one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _with_tail(
    batches: Iterator[dict[str, list[Any]]], size: int
) -> Iterator[dict[str, list[Any]]]:
    """The same batches, but a last one of few rows joins the one before it."""
    held: dict[str, list[Any]] | None = None
    for batch in batches:
        few = len(next(iter(batch.values()))) <= size // 2
        if held is not None and few:
            held = {name: [*values, *batch[name]] for name, values in held.items()}
            continue
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def _never() -> Dataset:
    raise AssertionError("A block that is done is not read again.")


def _is_whole(path: Path) -> bool:
    """Whether a shard is there; its last bytes tell."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _count(path: Path) -> Counter[str]:
    """What is in a shard."""
    scores = pq.read_table(path, columns=["ecif_score"]).column(0)
    return Counter(rows=len(scores), unscored=scores.null_count, shards=1)


# --------------------------------------------------------------------------------------- output


def _open(request: ScoreRequest) -> Dataset | IterableDataset:
    names = request.image_column, request.text_column
    if not request.streaming:
        return check_columns(load_rows(request.dataset, request.split), *names)
    stream = stream_rows(request.dataset, request.split)
    return stream if stream.features is None else check_columns(stream, *names)


def _require_free(request: FitRequest | ScoreRequest) -> None:
    """Refuse a folder that holds what must not be lost."""
    output = request.output
    require_writable(output)
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    present = {name for name in names if not name.endswith(PARTIAL)}
    interrupted = present & {MANIFEST, CHECKPOINTS}
    if present & {SUMMARY, FIT} and not interrupted and not request.overwrite:
        raise UserError(f"The run in --output {output} is finished. --overwrite replaces it.")
    if interrupted and not (request.resume or request.overwrite):
        raise UserError(
            f"--output {output} holds an interrupted run: --resume goes on with it, --overwrite "
            "starts anew."
        )
    if present and not present & {SUMMARY, FIT, MANIFEST, CHECKPOINTS}:
        raise UserError(f"--output {output} holds other files. Give a new folder.")


def _begin(request: ScoreRequest, manifest: dict[str, Any]) -> None:
    """Go on with a run of the same manifest, or start anew."""
    path = request.output / MANIFEST
    before = read_manifest(path) if request.resume and path.exists() else {}
    if before:
        require_same(before, manifest, request.output)
        return
    write_json({}, path)  # until the old shards are gone, there is nothing to go on with
    shutil.rmtree(request.output / SHARDS, ignore_errors=True)
    (request.output / SUMMARY).unlink(missing_ok=True)
    write_json(manifest, path)
