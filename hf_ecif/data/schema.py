"""Which columns matter, and what they must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from datasets import Audio, Dataset, Image, IterableDataset, LargeList, List, Value, Video
from numpy.typing import NDArray

from hf_ecif.errors import UserError

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def check_columns(dataset: AnyDataset, image_column: str, text_column: str) -> AnyDataset:
    """Check that both columns can be read, and stop the image column from decoding.

    Args:
        dataset: Rows as loaded; of a stream, the types of the columns must be known.
        image_column: A column of images: an `Image` feature, or raw bytes, paths or both.
        text_column: A column of strings.

    Returns:
        The same rows with the image column as `Image(decode=False)`: cells of `bytes` and `path`.

    Raises:
        UserError: If a column is missing or of another type.
    """
    if image_column == text_column:
        raise UserError(
            f"`image_column` and `text_column` are both {text_column!r}. Name a column of images "
            "and one of captions."
        )
    types: Mapping[str, Any] = dataset.features or {}
    for role, column in (("image", image_column), ("text", text_column)):
        if column not in types:
            raise UserError(
                f"There is no {role} column {column!r}. The columns are: "
                f"{', '.join(types)}. Name the right one with `{role}_column`."
            )
    require_text(types, text_column)
    image_type = types[image_column]
    if not _is_image_like(image_type):
        raise UserError(
            f"The image column {image_column!r} must hold images, their bytes or their paths, but "
            f"it is {image_type}. Name another one with `image_column`."
        )
    return dataset.cast_column(image_column, Image(decode=False))


def find_columns(
    dataset: Dataset, image_column: str | None = None, text_column: str | None = None
) -> tuple[str, str]:
    """Names of the columns of images and captions, those that are not given found by their types.

    Of several columns that could be meant, the one called ``image``, or ``text``, is.

    Raises:
        UserError: there is no such column, or it cannot be told which of several is meant.
    """
    own = [name for name in dataset.column_names if not is_influence_column(name)]
    kinds = dataset.features
    images = [name for name in own if _is_image_like(kinds[name])]
    surely = [name for name in images if not _is_value(kinds[name], "string")]
    image = image_column or _only("image", "image_column", surely or images, dataset)
    texts = [name for name in own if _is_value(kinds[name], "string") and name != image]
    return image, text_column or _only("text", "text_column", texts, dataset)


def _only(usual: str, argument: str, candidates: list[str], dataset: Dataset) -> str:
    if usual in candidates:
        return usual
    if len(candidates) == 1:
        return candidates[0]
    what = f"columns that could hold the {usual}s"
    if candidates:
        raise UserError(f"There are several {what}: {', '.join(candidates)}. Give `{argument}`.")
    columns = ", ".join(f"{name} ({kind})" for name, kind in dataset.features.items())
    raise UserError(f"There are no {what}. The columns are: {columns}.")


def require_text(types: Mapping[str, Any], column: str) -> None:
    """Refuse a column of captions that holds no strings.

    Raises:
        UserError: it holds something else.
    """
    if not _is_value(types[column], "string"):
        raise UserError(
            f"The text column {column!r} must hold strings, but it is {types[column]}. Name "
            "another one with `text_column`."
        )


def drop_influence_columns(dataset: Dataset) -> Dataset:
    """Remove the columns that an earlier run added, so that a second run starts clean."""
    return dataset.remove_columns(list(filter(is_influence_column, dataset.column_names)))


# Of influence columns without the prefix.
OTHER_NAMES = ("clip_score", "neg_clip_loss", "caption_truncated")


def is_influence_column(name: str) -> bool:
    """Whether a column is none of the source's own."""
    return name.startswith("ecif_") or name in OTHER_NAMES


def is_plain(feature: Any) -> bool:
    """Whether a column holds numbers, booleans or strings."""
    return isinstance(feature, Value) and not feature.dtype.endswith("binary")


def holds_media(feature: Any) -> bool:
    """Whether a column holds images, sounds, videos or bytes, at any depth."""
    if isinstance(feature, dict):
        return any(map(holds_media, feature.values()))
    if isinstance(feature, list):
        return any(map(holds_media, feature))
    if isinstance(feature, List | LargeList):
        return holds_media(feature.feature)
    if isinstance(feature, Value):
        return "binary" in feature.dtype
    return isinstance(feature, Image | Audio | Video)


def read_flags(dataset: Dataset, column: str, option: str, meaning: str) -> NDArray[np.bool_]:
    """A boolean column; a missing value is false.

    Args:
        dataset: All rows.
        column: Its name.
        option: The argument that named it, for the error.
        meaning: Of true, said of a row, for the error.

    Raises:
        UserError: The column is missing, or not boolean.
    """
    if column not in dataset.column_names:
        raise UserError(
            f"`{option}={column!r}` is not in the data set. It has: "
            f"{', '.join(dataset.column_names)}."
        )
    kind = dataset.features[column].dtype
    if kind != "bool":
        raise UserError(
            f"`{option}={column!r}` must be boolean, true where a row {meaning}, but it is {kind}."
        )
    return np.array(dataset[column][:], dtype=bool)


def read_verdicts(dataset: Dataset, column: str, option: str) -> NDArray[np.int8]:
    """Verdicts ``(N,)`` from a boolean column: 1 is right, -1 wrong, and 0, of a missing value,
    unknown.

    Args:
        dataset: All rows.
        column: Its name.
        option: What the user named it by, for the error.

    Raises:
        UserError: The column is missing, not boolean, or has a verdict for every row.
    """
    flags = read_flags(dataset, column, option, "is verified to be right")
    missing = np.array([value is None for value in dataset[column][:]])
    if len(missing) and not missing.any():
        raise UserError(
            f"`{option}={column!r}` has a verdict for every row, so that none is left to judge. It "
            "must be null where nobody has looked."
        )
    return np.where(missing, 0, np.where(flags, 1, -1)).astype(np.int8)


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
