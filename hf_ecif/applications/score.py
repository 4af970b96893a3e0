"""Scoring of any number of rows with a saved fit, in constant memory."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import ScoreRequest
from hf_ecif.data.columns import PLACE, ROW
from hf_ecif.data.lists import fold
from hf_ecif.data.loading import Source, find_rows, fingerprint_source, stream_rows
from hf_ecif.data.pairs import PairOptions, draw, make_pairs
from hf_ecif.data.parquet import is_whole, write_rows
from hf_ecif.data.schema import as_images
from hf_ecif.errors import UserError
from hf_ecif.influence.influence import Influence
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import MANIFEST, read_manifest, require_same
from hf_ecif.utils.files import sweep, write_json
from hf_ecif.utils.progress import ProgressFactory, silent

T = TypeVar("T")


SHARDS, SCORING = "scored", "scoring.json"  # the second in a finished run


FIRST = 32  # rows from which the columns are known
BATCHES = 4  # contrastive batches in a block, so that its rows meet in many ways


def run_score(request: ScoreRequest, progress: ProgressFactory = silent) -> dict[str, Any]:
    """Score all rows with a saved fit; write shards of parquet and ``scoring.json``.

    Returns:
        Content of ``scoring.json``.

    Raises:
        UserError: the request cannot be carried out.
    """
    distributed.decide(
        lambda: require_free(
            request.output,
            finished=SCORING,
            resume=request.resume,
            overwrite=request.overwrite,
        )
    )
    source = Source(
        request.dataset,
        request.split,
        config=request.config_name,
        format=request.format,
        image_column=request.image_column,
        limit=request.limit,
    )
    dataset, split = _open(request, source)
    influence = _open_fit(request.influence)
    dataset = _draw(dataset, request, influence.config.seed)
    size, pairs = BATCHES * influence.config.batch_size, _options(request, dataset, split)
    manifest = {
        "fit": influence.fingerprint,
        "dataset": request.dataset,
        "data": distributed.decide(lambda: fingerprint_source(source)),
        "split": split,
        "config": request.config_name,
        "format": request.format,
        "limit": request.limit,
        "sample": request.sample,
        "template": request.template,
        "streaming": request.streaming,
        "columns": {"image": pairs.image_column, "text": pairs.text_column},
        "processes": distributed.count(),
        "rows_per_block": size,
    }
    distributed.decide(lambda: _begin(request, manifest))
    mine = _score_blocks(request.output / SHARDS, influence, dataset, pairs, size, progress)
    counts = sum(distributed.collect(mine), Counter())
    summary = manifest | {name: counts[name] for name in ("rows", "unscored", "shards")}
    if distributed.is_main():
        write_json(summary, request.output / SCORING)
        sweep(request.output)
        (request.output / MANIFEST).unlink()
    return summary


def _open_fit(name: str) -> Influence:
    remedy = "give the folder of 'hf-ecif fit', or the Hub id of one that was pushed."
    try:
        return Influence.from_pretrained(name)
    except UserError as error:
        raise UserError(f"There is no fit to score with: {error} Here, {remedy}") from error


class _Block(NamedTuple):
    """Rows that are scored together.

    Attributes:
        shard: name of the file.
        load: function that reads the rows.
    """

    shard: str
    load: Callable[[], Dataset]


def _score_blocks(
    folder: Path,
    influence: Influence,
    dataset: Dataset | IterableDataset,
    pairs: PairOptions,
    size: int,
    progress: ProgressFactory,
) -> Counter[str]:
    """Score this process's blocks; returns numbers of rows, unscored rows and shards."""
    counts: Counter[str] = Counter()
    if isinstance(dataset, IterableDataset):
        blocks = _blocks_of_stream(dataset, size, folder)
        advance = progress("Score rows", 0)
    else:
        blocks = _blocks_of(dataset, size)
        advance = progress("Score rows", sum(len(rows) for rows in _my_ranges(len(dataset), size)))
    for block in blocks:
        path = folder / block.shard
        if not is_whole(path):
            with distributed.alone():
                write_rows(_score(influence, block.load(), pairs), path)
        done = _count(path)
        counts.update(done)
        advance(done["rows"])
    return counts


def _score(influence: Influence, rows: Dataset, pairs: PairOptions) -> Dataset:
    """Rows with their scores; captions in lists have lists of scores."""
    made = make_pairs(rows, pairs)
    images = as_images(made.rows, made.columns.image)
    scored = fold(influence.score(images, *made.columns.names))
    # Lists are whole here, and rows of a block are numbered within it.
    places = [name for name in scored.column_names if name.startswith((ROW, PLACE))]
    return scored.remove_columns(places)


def _my_ranges(count: int, size: int) -> list[range]:
    """Rows of this process's blocks; too few last rows join the block before them."""
    starts = list(range(0, max(count - size // 2, 1), size))
    ranges = [range(*bounds) for bounds in zip(starts, [*starts[1:], count], strict=True)]
    return ranges[distributed.rank() :: distributed.count()]


def _blocks_of(dataset: Dataset, size: int) -> Iterator[_Block]:
    for rows in _my_ranges(len(dataset), size):
        yield _Block(f"rows-{rows.start:012d}.parquet", partial(dataset.select, rows))


def _blocks_of_stream(dataset: IterableDataset, size: int, folder: Path) -> Iterator[_Block]:
    """Blocks that are done already, then those still to be read, one of them ahead."""
    rank = distributed.rank()
    mine = split_dataset_by_node(dataset, rank, distributed.count())
    done = [*takewhile(is_whole, sorted(folder.glob(f"part-{rank:04d}-*.parquet")))]
    for path in done:
        yield _Block(path.name, _never)
    rest = mine.skip(sum(pq.read_metadata(path).num_rows for path in done))
    batches = _with_tail(_ahead(rest.iter(batch_size=size)), size)
    for number, cells in enumerate(batches, start=len(done)):
        load = partial(Dataset.from_dict, cells, features=dataset.features)
        yield _Block(f"part-{rank:04d}-{number:08d}.parquet", load)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Items, each read while the one before it is processed."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _with_tail(
    batches: Iterator[dict[str, list[Any]]], size: int
) -> Iterator[dict[str, list[Any]]]:
    """Batches; a last batch with few rows is joined to the one before it."""
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


def _count(path: Path) -> Counter[str]:
    """Numbers of rows, or captions in lists, and of those that are not scored, in a shard."""
    scores = pq.read_table(path, columns=["ecif_score"]).column(0)
    if pa.types.is_list(scores.type):
        scores = scores.combine_chunks().flatten()
    return Counter(rows=len(scores), unscored=scores.null_count, shards=1)


def _open(request: ScoreRequest, source: Source) -> tuple[Dataset | IterableDataset, str]:
    """Rows, and the name of their split."""
    if not request.streaming:
        found = find_rows(source)
        return found.rows, found.split
    if request.sample is not None:
        raise UserError("`sample` needs to know how many rows there are, which a stream does not.")
    stream = _undecoded(stream_rows(source))
    return stream, request.split or str(stream.split or source.usual)


def _draw(
    dataset: Dataset | IterableDataset, request: ScoreRequest, seed: int
) -> Dataset | IterableDataset:
    if isinstance(dataset, Dataset):
        return draw(dataset, request.limit, request.sample, seed)
    return dataset if request.limit is None else dataset.take(request.limit)


def _options(request: ScoreRequest, dataset: Dataset | IterableDataset, split: str) -> PairOptions:
    """How pairs are made of every block, by columns that are the same in all of them."""
    rows = _undecoded(dataset)
    cells = list(rows.take(FIRST))
    if not cells:
        raise UserError(f"{request.dataset}: the split {split!r} has no rows.")
    first = Dataset.from_list(cells, features=rows.features)
    options = PairOptions(request.image_column, request.text_column, request.template)
    source = make_pairs(first, options).source
    as_images(first, source.image)  # or says what is wrong with them
    return replace(options, image_column=source.image, text_column=source.text)


def _undecoded(dataset: Any) -> Any:
    """The rows with images as bytes, which need not be encoded again."""
    for name, kind in (dataset.features or {}).items():
        if isinstance(kind, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _begin(request: ScoreRequest, manifest: dict[str, Any]) -> None:
    """Resume a run with an equal manifest, or start anew."""
    path = request.output / MANIFEST
    before = read_manifest(path) if request.resume and path.exists() else {}
    if before:
        require_same(before, manifest, request.output)
        return
    write_json({}, path)  # until the old shards are gone, there is nothing to go on with
    shutil.rmtree(request.output / SHARDS, ignore_errors=True)
    (request.output / SCORING).unlink(missing_ok=True)
    write_json(manifest, path)
