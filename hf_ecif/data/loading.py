"""Input of rows: data sets from disk and from the Hub."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets.config
from datasets import Dataset, Image, IterableDataset
from datasets.exceptions import DatasetGenerationError

from hf_ecif.config import RowFormat
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.lists import unfold
from hf_ecif.data.parquet import ROWS_PER_GROUP
from hf_ecif.data.readers.find import SOURCES, open_source
from hf_ecif.data.readers.splits import (
    Built,
    PartUnknownError,
    choose_split,
    open_split,
    stream_split,
)
from hf_ecif.data.readers.tables import find_pictures
from hf_ecif.data.schema import check_columns
from hf_ecif.data.summary import Columns
from hf_ecif.errors import UserError
from hf_ecif.utils.files import scratch_file
from hf_ecif.utils.hub_errors import explain_hub_error

_T = TypeVar("_T")
_CANNOT_WRITE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EEXIST, errno.ENOTDIR),  # a file where a folder should be
)


class Source(NamedTuple):
    """Rows that a user names.

    Attributes:
        name: a folder, a file, a pattern of files, or a place on the Hub; see `SOURCES`. What is
            private is read with the user's own login.
        split: of it, or a part: ``train``, ``train[:10%]``, ``train+test``. If absent, the usual
            one, or the only one there is.
        usual: the split that is meant if none is given.
        config: which configuration, where there are several.
        format: what the files are, where it is not found by what is there.
        image_column: where the images are, if their paths may be relative to a table.
        limit: how many of the first rows are wanted, so that no more need to be downloaded.
    """

    name: str
    split: str | None = None
    usual: str = "train"
    config: str | None = None
    format: RowFormat | None = None
    image_column: str | None = None
    limit: int | None = None


class Found(NamedTuple):
    """Rows as they were found.

    Attributes:
        rows: all of the split.
        split: its name.
        format: what they were read as.
    """

    rows: Dataset
    split: str
    format: str


def load_rows(
    source: str,
    split: str | None = None,
    *,
    config_name: str | None = None,
    format: RowFormat | None = None,
) -> Dataset:
    """One split of a data set from disk or from the Hub.

    Args:
        source: see `Source`.
        split: see `Source`.
        config_name: see `Source`.
        format: see `Source`.

    Raises:
        UserError: the source or the split does not exist, cannot be read or has no rows.

    Examples:
        >>> import hf_ecif
        >>> from pathlib import Path
        >>> folder = Path(hf_ecif.load_demo().model).parent / "data"
        >>> len(hf_ecif.load_rows(str(folder), "validation"))
        200
    """
    return find_rows(Source(source, split, config=config_name, format=format)).rows


def find_rows(source: Source) -> Found:
    """Rows of a source, by index; those of an audit with lists of captions taken apart again.

    Raises:
        UserError: the source or the split does not exist, cannot be read or has no rows.
    """

    def read() -> Found:
        splits = open_source(source.name, source.config, source.format)
        split = choose_split(splits.names, source.split, source.usual)
        if source.limit is not None and isinstance(splits, Built) and splits.is_far:
            with suppress(PartUnknownError):
                rows, _ = read_stream(stream_split(splits, split), source.limit)
                return Found(unfold(rows), split, splits.format)
        rows = find_pictures(open_split(splits, split), splits.bases, source.image_column)
        return Found(unfold(rows), split, splits.format)

    return _explained(source.name, read)


def stream_rows(source: Source) -> IterableDataset:
    """Rows of a source as a stream, nothing of it downloaded ahead.

    Raises:
        UserError: the source or the split does not exist, or cannot be read.
    """

    def read() -> IterableDataset:
        splits = open_source(source.name, source.config, source.format)
        split = choose_split(splits.names, source.split, source.usual)
        return find_pictures(stream_split(splits, split), splits.bases, source.image_column)

    return _explained(source.name, read)


def read_stream(stream: IterableDataset, most: int) -> tuple[Dataset, bool]:
    """The first rows of a stream, kept on disk until the program ends.

    Args:
        stream: a stream of rows.
        most: largest number of rows to read.

    Returns:
        The rows, and whether the stream has more of them.

    Raises:
        UserError: the stream has no rows.
    """
    features = stream.features
    for name, kind in (features or {}).items():
        if isinstance(kind, Image):  # to be kept as it is, not decoded and encoded again
            stream = stream.cast_column(name, Image(decode=False))
    rows, folder = iter(stream), scratch_file()
    folder.mkdir()
    parts = iter(lambda: list(islice(rows, ROWS_PER_GROUP)), [])
    files: list[str | bytes | PathLike[Any]] = []
    count = 0
    while count < most and (part := next(parts, None)) is not None:
        file = str(folder / f"{count}.parquet")
        Dataset.from_list(part[: most - count], features=stream.features).to_parquet(file)
        files.append(file)
        count += len(part)
    if not files:
        raise UserError("The stream has no rows.")
    read = Dataset.from_parquet(files, cache_dir=str(folder))
    has_more = count > most or next(rows, None) is not None
    return read.cast(features) if features is not None else read, has_more


def load_scored(audit: AuditFolder, columns: Columns) -> Dataset:
    """The rows of an audit with their influence columns, images undecoded.

    Args:
        audit: folder of the audit.
        columns: names of the columns of images and captions.

    Raises:
        UserError: the rows are missing or damaged.
    """
    return check_columns(load_rows(str(audit.scored), "train"), columns.image, columns.text)


def load_splits(source: str, config_name: str | None = None) -> dict[str, Dataset]:
    """All splits of a data set that have rows, by name.

    Args:
        source: see `Source`.
        config_name: see `Source`.

    Raises:
        UserError: the source does not exist or cannot be read.
    """

    def read() -> dict[str, Dataset]:
        splits = open_source(source, config_name)
        opened = {name: splits.open(name) for name, size in splits.sizes.items() if size}
        return {
            name: find_pictures(rows, splits.bases, None)
            for name, rows in opened.items()
            if rows.num_rows
        }

    return _explained(source, read)


def fingerprint_source(source: Source) -> str:
    """A hash of which files `find_rows` or `stream_rows` would read, without reading their rows.

    Files count by name and time of their last change, those of the Hub by their commit, and a
    folder of `save_to_disk` by the fingerprint that it was saved with.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    return _explained(
        source.name, lambda: open_source(source.name, source.config, source.format).fingerprint()
    )


def _explained(source: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except Exception as error:  # the loaders raise nearly anything
        ours = next((one for one in _causes(error) if isinstance(one, UserError)), None)
        if ours is not None:
            raise UserError(f"{source}: {ours}") from None
        full = next(filter(_cannot_write, _causes(error)), None)
        if full is not None:
            raise UserError(_explain_cache(source, full)) from error
        here = Path(source).expanduser().exists()
        problem = "cannot be read" if here else "no such folder, and the Hub does not give it"
        cause = (None if here else explain_hub_error(error)) or _cause(error)
        raise UserError(f"{source}: {problem}. {cause} {SOURCES}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _cannot_write(error: BaseException) -> bool:
    """Whether the cache of `datasets` is read-only or full."""
    if not isinstance(error, OSError) or error.errno not in _CANNOT_WRITE:
        return False
    folder = str(Path(datasets.config.HF_DATASETS_CACHE).expanduser())
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or str(error.filename).startswith(folder)


def _explain_cache(source: str, error: BaseException) -> str:
    why = error.strerror if isinstance(error, OSError) else str(error)
    return (
        f"{source}: `datasets` cannot write its copy of the rows to "
        f"{datasets.config.HF_DATASETS_CACHE} ({why}). Make room there, or set HF_DATASETS_CACHE "
        "to a folder that can be written to."
    )


def _cause(error: BaseException) -> str:
    """Most specific line of an error, which the general error of a failed build hides."""
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    line = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
    return line if line.endswith(".") else f"{line}."
