"""Rows in: where they come from, which columns matter and what is in one row.

Everything here treats a data set as a stranger's: nothing in it is executed, no image is decoded
before its header has been judged, and images that are passed on keep their bytes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import xxhash
from datasets import Dataset, Image, IterableDataset, Value, load_dataset_builder, load_from_disk
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from hf_ecif.errors import UserError
from hf_ecif.hub_errors import explain_hub_error, is_unreachable
from hf_ecif.hub_paths import HubPath, parse_hub_path

# Formats that hold photographs and drawings. Pillow reads many more, some through other programs
# (EPS runs Ghostscript), which no data set needs to reach.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
SOURCES = (
    "Give a folder written by save_to_disk, parquet files, an image folder with metadata.csv or "
    "metadata.jsonl, a Hub id (owner/name or owner/name@revision), or a path on the Hub "
    "(hf://datasets/owner/name/folder)."
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One row, decoded.

    Attributes:
        image: The image as RGB, or None if the row cannot be scored.
        text: The caption; empty if there is none.
        reason: Why the row cannot be scored, in plain words; None if it can.
    """

    image: PILImage.Image | None
    text: str
    reason: str | None


def load_rows(source: str, split: str) -> Dataset:
    """Load one split of a data set from disk or from the Hub.

    Args:
        source: A folder written by `save_to_disk`, a folder or a file of parquet, an image folder
            with `metadata.csv` or `metadata.jsonl`, a Hub id, optionally `owner/name@revision`, or
            a folder or a parquet file there, `hf://datasets/owner/name@revision/path`. Private
            ones are read with the user's own login.
        split: Name of the split, such as `train`. Data without named splits is `train`.

    Raises:
        UserError: If the source or the split does not exist, cannot be read or has no rows.
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
        return load_dataset_builder(name, **options).as_streaming_dataset(split)

    return _explained(source, read)


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


def check_columns(dataset: Dataset, image_column: str, text_column: str) -> Dataset:
    """Check that both columns can be read, and stop the image column from decoding.

    Args:
        dataset: Rows as loaded.
        image_column: A column of images: an `Image` feature, or raw bytes, paths or both.
        text_column: A column of strings.

    Returns:
        The same rows with the image column as `Image(decode=False)`: cells of `bytes` and `path`.

    Raises:
        UserError: If a column is missing or of another type.
    """
    if image_column == text_column:
        raise UserError(
            f"--image-column and --text-column are both {text_column!r}. Name a column of images "
            "and one of captions."
        )
    for role, column in (("image", image_column), ("text", text_column)):
        if column not in dataset.column_names:
            raise UserError(
                f"There is no {role} column {column!r}. The columns are: "
                f"{', '.join(dataset.column_names)}. Name the right one with --{role}-column."
            )
    require_text(dataset, text_column)
    image_type = dataset.features[image_column]
    if not _is_image_like(image_type):
        raise UserError(
            f"The image column {image_column!r} must hold images, their bytes or their paths, but "
            f"it is {image_type}. Name another one with --image-column."
        )
    return dataset.cast_column(image_column, Image(decode=False))


def require_text(dataset: Dataset, column: str) -> None:
    """Refuse a column of captions that holds no strings.

    Raises:
        UserError: it holds something else.
    """
    if not _is_value(dataset.features[column], "string"):
        raise UserError(
            f"The text column {column!r} must hold strings, but it is "
            f"{dataset.features[column]}. Name another one with --text-column."
        )


def drop_influence_columns(dataset: Dataset) -> Dataset:
    """Remove the columns that an earlier run added, so that a second run starts clean."""
    return dataset.remove_columns(list(filter(is_influence_column, dataset.column_names)))


def is_influence_column(name: str) -> bool:
    """Whether a column is none of the source's own."""
    return name.startswith("ecif_") or name in ("clip_score", "neg_clip_loss")


def read_flags(dataset: Dataset, column: str, option: str, meaning: str) -> NDArray[np.bool_]:
    """A boolean column; a missing value is false.

    Args:
        dataset: All rows.
        column: Its name.
        option: What the user named it by, for the error.
        meaning: Of true, said of a row, for the error.

    Raises:
        UserError: The column is missing, or not boolean.
    """
    if column not in dataset.column_names:
        raise UserError(
            f"{option} {column!r} is not in the data set. It has: "
            f"{', '.join(dataset.column_names)}."
        )
    kind = dataset.features[column].dtype
    if kind != "bool":
        raise UserError(
            f"{option} {column!r} must be boolean, true where a row {meaning}, but it is {kind}."
        )
    return np.array(dataset[column][:], dtype=bool)


def read_pair(
    image_cell: dict[str, Any] | PILImage.Image | None, text: str | None, max_pixels: int
) -> Pair:
    """Decode one row, whatever is in it.

    The image comes upright, on white where it was transparent, and as its first frame where it was
    animated. Its size is judged by its header, before any pixel is decoded.

    Args:
        image_cell: The cell of an `Image(decode=False)` column (`bytes`, `path` or both), or an
            image that was decoded already.
        text: The caption.
        max_pixels: Images of more pixels than this are refused.

    Returns:
        A pair that has either an image or a reason.

    Example:
        >>> read_pair(None, "a cat", max_pixels=1_000_000).reason
        'image missing'
    """
    try:
        image = _read_image(image_cell, max_pixels)
    except _RefusedError as refusal:
        return Pair(None, text or "", str(refusal))
    if text is None:
        return Pair(None, "", "caption missing")
    if not text.strip():
        return Pair(None, text, "caption empty")
    return Pair(image, text, None)


def image_bytes(image_cell: dict[str, Any] | None) -> bytes | None:
    """The undecoded bytes of an image cell, from its local file where only a path is stored.

    A table can name any file of this machine. Only files that open as images are read, so that
    no other file is carried off into a result.

    Returns:
        The bytes, or None if there are none to be had.
    """
    if not image_cell:
        return None
    if image_cell.get("bytes") is not None:
        return bytes(image_cell["bytes"])
    try:
        with _open_cell(image_cell) as file:
            _open_image(file)
            file.seek(0)
            return file.read()
    except Exception:  # damaged files make Pillow raise nearly anything
        return None


def image_hashes(dataset: Dataset, image_column: str) -> set[bytes]:
    """Of the images that can be read, by which equal ones of two data sets are known."""
    contents = (image_bytes(cell) for cell in dataset[image_column])
    return {xxhash.xxh3_128_digest(content) for content in contents if content}


def fingerprint_rows(dataset: Dataset) -> str:
    """A hash of what is in the rows, for provenance.

    It depends on the names and contents of the columns and on the order of the rows, not on the
    file format, the process or the place on disk: images count by their bytes, wherever they lie.

    Args:
        dataset: Rows as returned by `check_columns`.
    """
    names = sorted(dataset.column_names)
    images = {name for name in names if isinstance(dataset.features[name], Image)}
    digest = xxhash.xxh3_128(repr((dataset.num_rows, names)).encode())
    # Arrow batches, since rows in the usual format would be decoded.
    for batch in dataset.with_format("arrow").iter(batch_size=64):
        for row in batch.to_pylist():
            for name in names:
                value = image_bytes(row[name]) if name in images else row[name]
                content = value if isinstance(value, bytes) else repr(value).encode()
                digest.update(len(content).to_bytes(8, "little"))
                digest.update(content)
    return digest.hexdigest()


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


class _RefusedError(Exception):
    """An image that will not be scored; the message is the reason."""


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
    """What `load_dataset` is to be asked for."""
    path, place = Path(source).expanduser(), parse_hub_path(source)
    if place is not None:
        return _loader_on_hub(place)
    if path.is_file():
        return "parquet", {"data_files": {_split_of(path): str(path)}}
    if path.is_dir():  # resolved, since "csv" and the like are also names of loaders
        return str(_rows_in(path).resolve()), {}
    raise UserError(f"no such file or folder. {SOURCES}")


def _rows_in(folder: Path) -> Path:
    """The rows of an audit lie in it thrice, once scored, and once as kept and removed."""
    if (folder / "scored").is_dir() and (folder / "summary.json").is_file():
        return folder / "scored"
    if (folder / "cleaning.json").is_file():
        raise UserError("this is a cleaning's folder. Name its folder kept, or removed.")
    return folder


def _loader_on_hub(place: HubPath) -> _Loader:
    """All of a repository, a folder in it, or one parquet file."""
    options: dict[str, Any] = {"revision": place.revision}
    if not _ask_hub(place) and not place.path:
        options |= _default_of_copy(place)
    if place.path.endswith(".parquet"):
        options["data_files"] = {_split_of(Path(place.path)): place.path}
    elif place.path:
        options["data_dir"] = place.path
    return place.repo_id, options


def _ask_hub(place: HubPath) -> bool:
    """Whether the Hub answers; tell the user where the copy of an earlier run must do."""
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
    default = {"name": "default"}
    try:
        load_dataset_builder(place.repo_id, **default, revision=place.revision)
    except Exception:  # no copy, or one of a repository where it has another name
        return {}
    return default


def _prepare(name: str, options: dict[str, Any]) -> _Splits:
    """What `load_dataset` does, but it fails as a whole where any split is empty."""
    builder = load_dataset_builder(name, **options)
    builder.download_and_prepare()
    sizes = {info.name: info.num_examples for info in builder.info.splits.values()}
    return _Splits(sizes, lambda split: cast(Dataset, builder.as_dataset(split)))


def _find_saved(path: Path) -> _Splits:
    """What `load_from_disk` does, but it fails as a whole where any split is empty."""
    if (path / "dataset_dict.json").exists():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        folders = {name: path / name for name in names}
    else:
        folders = {_saved_state(path)["_split"] or "train": path}
    files = {name: len(_saved_state(folder)["_data_files"]) for name, folder in folders.items()}
    return _Splits(files, lambda split: cast(Dataset, load_from_disk(str(folders[split]))))


def _saved_state(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((folder / "state.json").read_text()))


def _check_split(split: str, sizes: dict[str, int]) -> None:
    if split not in sizes:
        raise UserError(f"there is no split {split!r}. Choose one of: {', '.join(sizes)}.")
    if not sizes[split]:
        raise UserError(f"the split {split!r} has no rows. Choose one that has some.")


def _split_of(path: Path) -> str:
    """The split that a file name tells, by the same words that count in a folder of files."""
    if path.suffix != ".parquet":
        raise UserError(f"a single file must be parquet. {SOURCES}")
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return next((str(name) for name, known in SPLIT_KEYWORDS.items() if words & {*known}), "train")


def _cause(error: BaseException) -> str:
    """The line that tells most: the general error of a failed build hides the particular one."""
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    line = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
    return line if line.endswith(".") else f"{line}."


def _is_value(feature: Any, kind: str) -> bool:
    return isinstance(feature, Value) and feature.dtype in (kind, f"large_{kind}")


def _is_image_like(feature: Any) -> bool:
    if isinstance(feature, dict):
        parts = {"bytes": "binary", "path": "string"}
        return bool(feature) and all(
            key in parts and _is_value(value, parts[key]) for key, value in feature.items()
        )
    return (
        isinstance(feature, Image) or _is_value(feature, "binary") or _is_value(feature, "string")
    )


def _read_image(
    image_cell: dict[str, Any] | PILImage.Image | None, max_pixels: int
) -> PILImage.Image:
    try:
        with _header_of(image_cell) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _RefusedError(
                    f"image of {width} x {height} pixels is over the limit of {max_pixels}"
                )
            image.load()
            return _on_white(_upright(_eight_bits(image)))
    except _RefusedError:
        raise
    except UnidentifiedImageError:
        raise _RefusedError("image unreadable: not a known image format") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _RefusedError(f"image unreadable: {str(error) or type(error).__name__}") from error


@contextmanager
def _header_of(image_cell: dict[str, Any] | PILImage.Image | None) -> Iterator[PILImage.Image]:
    """An image of which the header alone is read, unless it is decoded already."""
    if isinstance(image_cell, PILImage.Image):
        yield image_cell
        return
    with _open_cell(image_cell) as file:
        yield _open_image(file)


def _open_cell(image_cell: dict[str, Any] | None) -> BinaryIO:
    content, path = (image_cell or {}).get("bytes"), (image_cell or {}).get("path")
    if content:
        return io.BytesIO(content)
    if content is not None or not path:
        raise _RefusedError("image missing")
    if not os.path.isfile(path):
        raise _RefusedError(f"image unreadable: no local file {os.path.basename(path)!r}")
    return open(path, "rb")


def _open_image(file: BinaryIO) -> PILImage.Image:
    """Read the header of an image.

    `PIL.Image.open` does the same, but raises on a large image without telling how large it is.
    """
    PILImage.init()
    start = file.read(16)
    for name in IMAGE_FORMATS:
        if name not in PILImage.OPEN:
            continue
        factory, accepts = PILImage.OPEN[name]
        accepted = accepts is not None and accepts(start)
        # A reader whose codec is not installed answers with a string that says so.
        if accepted and not isinstance(accepted, str):
            file.seek(0)
            return factory(file, "")
    raise UnidentifiedImageError


def _eight_bits(image: PILImage.Image) -> PILImage.Image:
    """Scale 16-bit greyscale, of which `convert` would clip nearly all to white."""
    if not image.mode.startswith("I"):
        return image
    grey = image.convert("I").point(lambda value: value / 257)
    grey.info.pop("transparency", None)
    return grey.convert("L")


def _upright(image: PILImage.Image) -> PILImage.Image:
    with suppress(Exception):  # damaged metadata says nothing against the pixels
        return ImageOps.exif_transpose(image)
    return image


def _on_white(image: PILImage.Image) -> PILImage.Image:
    """Convert to RGB; `convert` alone shows whatever colour lies under transparent pixels."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawing = image.convert("RGBA")
    return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), drawing).convert(
        "RGB"
    )
