"""Input of rows: data sets from disk and from the Hub."""

from __future__ import annotations

import atexit
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from os import PathLike
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar, cast

import xxhash
from datasets import Dataset, Image, IterableDataset, load_dataset_builder, load_from_disk
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi

from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.parquet import ROWS_PER_GROUP
from hf_ecif.data.schema import check_columns
from hf_ecif.data.summary import Columns
from hf_ecif.errors import UserError
from hf_ecif.utils.hub_errors import explain_hub_error, is_unreachable
from hf_ecif.utils.hub_paths import HubPath, parse_hub_path

SOURCES = (
    "Give a folder written by save_to_disk, parquet files, an image folder with metadata.csv or "
    "metadata.jsonl, a Hub id (owner/name or owner/name@revision), or a path on the Hub "
    "(hf://datasets/owner/name/folder)."
)


_log = logging.getLogger(__name__)


def load_rows(source: str, split: str) -> Dataset:
    """Load one split of a data set from disk or from the Hub.

    Args:
        source: a folder written by `save_to_disk`, a folder or a file of parquet, an image folder
            with `metadata.csv` or `metadata.jsonl`, a Hub id, optionally `owner/name@revision`, or
            a folder or a parquet file there, `hf://datasets/owner/name@revision/path`. Private
            ones are read with the user's own login.
        split: name of the split, such as `train`. Data without named splits are `train`.

    Raises:
        UserError: the source or the split does not exist, cannot be read or has no rows.

    Example:
        >>> import hf_ecif
        >>> from pathlib import Path
        >>> folder = Path(hf_ecif.load_demo().model).parent / "data"
        >>> len(hf_ecif.load_rows(str(folder), "validation"))
        200
    """

    def read() -> Dataset:
        splits = _find(source)
        _check_split(split, splits.sizes)
        rows = splits.open(split)
        _check_split(split, {split: rows.num_rows})
        return rows

    return _explained(source, read)


def stream_rows(source: str, split: str) -> IterableDataset:
    """One split of a data set as a stream, nothing of it downloaded ahead; see `load_rows`.

    Raises:
        UserError: If the source or the split does not exist, or cannot be read.
    """

    def read() -> IterableDataset:
        path = Path(source).expanduser()
        if _is_saved(path):
            return _find_saved(path).open(split).to_iterable_dataset()
        name, options = _loader_of(source)
        return cast(
            IterableDataset, load_dataset_builder(name, **options).as_streaming_dataset(split)
        )

    return _explained(source, read)


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
    rows, folder = iter(stream), Path(mkdtemp(dir=_folder_of_streams()))
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


@cache
def _folder_of_streams() -> str:
    folder = mkdtemp(prefix="hf-ecif-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_scored(audit: AuditFolder, columns: Columns) -> Dataset:
    """The rows of an audit with their influence columns, images undecoded.

    Args:
        audit: folder of the audit.
        columns: names of the columns of images and captions.

    Raises:
        UserError: the rows are missing or damaged.
    """
    return check_columns(load_rows(str(audit.scored), "train"), columns.image, columns.text)


def load_splits(source: str) -> dict[str, Dataset]:
    """All splits of a data set that have rows, by name.

    Args:
        source: As for `load_rows`.

    Raises:
        UserError: If the source does not exist or cannot be read.
    """

    def read() -> dict[str, Dataset]:
        splits = _find(source)
        opened = {name: splits.open(name) for name, size in splits.sizes.items() if size}
        return {name: rows for name, rows in opened.items() if rows.num_rows}

    return _explained(source, read)


def fingerprint_source(source: str) -> str:
    """A hash of which files `load_rows` or `stream_rows` would read, without reading their rows.

    Files count by name and time of their last change, those of the Hub by their commit, and a
    folder of `save_to_disk` by the fingerprint that it was saved with.

    Raises:
        UserError: If the source does not exist or cannot be read.
    """

    def read() -> str:
        path = Path(source).expanduser()
        if _is_saved(path):
            states = sorted(path.rglob("state.json"))
            return xxhash.xxh3_128_hexdigest(b"".join(state.read_bytes() for state in states))
        name, options = _loader_of(source)
        builder = load_dataset_builder(name, **options)
        return xxhash.xxh3_128_hexdigest(f"{builder.config_id} {builder.hash}".encode())

    return _explained(source, read)


@dataclass(frozen=True)
class _Splits:
    """The splits of a source.

    Attributes:
        sizes: Rows of each, or anything that is zero where there are none.
        open: Loads one by its name.
    """

    sizes: dict[str, int]
    open: Callable[[str], Dataset]


_T = TypeVar("_T")


_Loader = tuple[str, dict[str, Any]]


def _explained(source: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # the loaders raise nearly anything
        here = Path(source).expanduser().exists()
        problem = "cannot be read" if here else "no such folder, and the Hub does not give it"
        cause = (None if here else explain_hub_error(error)) or _cause(error)
        raise UserError(f"{source}: {problem}. {cause} {SOURCES}") from error


def _find(source: str) -> _Splits:
    path = Path(source).expanduser()
    return _find_saved(path) if _is_saved(path) else _prepare(*_loader_of(source))


def _is_saved(path: Path) -> bool:
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _loader_of(source: str) -> _Loader:
    """Arguments of `load_dataset` for a source."""
    path, place = Path(source).expanduser(), parse_hub_path(source)
    if place is not None:
        return _loader_on_hub(place)
    if path.is_file():
        return "parquet", {"data_files": {_split_of(path): str(path)}}
    if path.is_dir():  # resolved, since "csv" and the like are also names of loaders
        return str(_rows_in(path).resolve()), {}
    raise UserError(f"no such file or folder. {SOURCES}")


def _rows_in(folder: Path) -> Path:
    """Folder to read; of an audit its scored rows, which it also holds as kept and removed."""
    audit = AuditFolder(folder)
    if audit.has_rows and audit.has_summary:
        return audit.scored
    if audit.is_cleaning:
        raise UserError("this is a cleaning's folder. Name its folder kept, or removed.")
    return folder


def _loader_on_hub(place: HubPath) -> _Loader:
    """Arguments of `load_dataset` for a repository, a folder in it, or a parquet file."""
    options: dict[str, Any] = {"revision": place.revision}
    if not _ask_hub(place) and not place.path:
        options |= _default_of_copy(place)
    if place.path.endswith(".parquet"):
        options["data_files"] = {_split_of(Path(place.path)): place.path}
    elif place.path:
        options["data_dir"] = place.path
    return place.repo_id, options


def _ask_hub(place: HubPath) -> bool:
    """Whether the Hub answers; warns if a copy from an earlier run is used instead."""
    try:
        HfApi().dataset_info(place.repo_id, revision=place.revision)
        return True
    except Exception as error:
        if not is_unreachable(error):
            raise
        _log.warning(
            "%s: %s Looking for a copy from an earlier run, the newest one%s.",
            place.repo_id,
            explain_hub_error(error),
            f", whether it is {place.revision!r} or not" if place.revision else "",
        )
        return False


def _default_of_copy(place: HubPath) -> dict[str, str]:
    """Names the default configuration: of several copies, `datasets` does not know which it is."""
    try:
        load_dataset_builder(place.repo_id, "default", revision=place.revision)
    except Exception:  # no copy, or one of a repository where it has another name
        return {}
    return {"name": "default"}


def _prepare(name: str, options: dict[str, Any]) -> _Splits:
    """Splits as from `load_dataset`, which itself fails if any split is empty."""
    builder = load_dataset_builder(name, **options)
    builder.download_and_prepare()
    sizes = {info.name: info.num_examples for info in (builder.info.splits or {}).values()}
    return _Splits(sizes, lambda split: cast(Dataset, builder.as_dataset(split)))


def _find_saved(path: Path) -> _Splits:
    """Splits as from `load_from_disk`, which itself fails if any split is empty."""
    if (path / "dataset_dict.json").exists():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        folders = {name: path / name for name in names}
    else:
        folders = {_saved_split(path): path}
    files = {name: len([*folder.glob("*.arrow")]) for name, folder in folders.items()}
    return _Splits(files, lambda split: cast(Dataset, load_from_disk(str(folders[split]))))


def _saved_split(folder: Path) -> str:
    """The split that a saved data set knows it is, if it does."""
    has_rows = any(folder.glob("*.arrow"))
    split = cast(Dataset, load_from_disk(str(folder))).split if has_rows else None
    return str(split or "train")


def _check_split(split: str, sizes: dict[str, int]) -> None:
    if split not in sizes:
        raise UserError(f"there is no split {split!r}. Choose one of: {', '.join(sizes)}.")
    if not sizes[split]:
        raise UserError(
            f"the split {split!r} has no rows, or has lost its files. Choose one that has some."
        )


def _split_of(path: Path) -> str:
    """Split named by a file name, by the words that count in a folder of files."""
    if path.suffix != ".parquet":
        raise UserError(f"a single file must be parquet. {SOURCES}")
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return next((str(name) for name, known in SPLIT_KEYWORDS.items() if words & {*known}), "train")


def _cause(error: BaseException) -> str:
    """Most specific line of an error, which the general error of a failed build hides."""
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    line = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
    return line if line.endswith(".") else f"{line}."
