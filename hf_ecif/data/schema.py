"""Which columns matter, and what they must hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    Value,
    Video,
    concatenate_datasets,
)
from numpy.typing import NDArray

from hf_ecif.data.columns import CAPTION, KEY, PLACE, ROW, URL
from hf_ecif.data.embeddings import COLUMN as EMBEDDING
from hf_ecif.data.embeddings import is_reference
from hf_ecif.data.images import decode_base64
from hf_ecif.errors import UserError
from hf_ecif.utils.files import scratch_file

# Columns that are meant where several could be, the likeliest first.
USUAL = {
    "image": ("image", "jpg", EMBEDDING),
    "text": ("text", "caption", "captions", "txt", "sentence", "sentences", "title", "prompt"),
}
NO_CAPTIONS = (KEY, URL, "json", "file_name")  # that are text, but nobody's caption
_ADDRESS = re.compile(r"(https?|s3|gs|ftp)://", re.IGNORECASE)
_LOOKED_AT = 32  # cells from which it is told what a column of strings holds

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def check_columns(dataset: AnyDataset, image_column: str, text_column: str) -> AnyDataset:
    """Check that both columns can be read, and stop the image column from decoding.

    Args:
        dataset: rows as loaded; of a stream, the types of the columns must be known.
        image_column: a column of images; see `as_images`.
        text_column: a column of strings.

    Returns:
        The same rows with the image column as `Image(decode=False)`: cells of `bytes` and `path`.

    Raises:
        UserError: a column is missing or of another type.
    """
    types: Mapping[str, Any] = dataset.features or {}
    require_columns(types, image_column, text_column)
    require_text(types, text_column)
    images = as_images(dataset, image_column)
    now: Mapping[str, Any] = images.features or {}
    if is_text(now[image_column]):  # references to embeddings
        return images
    return images.cast_column(image_column, Image(decode=False))


def require_columns(types: Mapping[str, Any], image_column: str, text_column: str) -> None:
    """Refuse columns that are not there, or are one and the same.

    Raises:
        UserError: that is so.
    """
    if image_column == text_column:
        raise UserError(
            f"`image_column` and `text_column` are both {text_column!r}. Name a column of images "
            "and one of captions."
        )
    for role, column in (("image", image_column), ("text", text_column)):
        if column not in types:
            raise UserError(
                f"There is no {role} column {column!r}. The columns are: "
                f"{', '.join(types)}. Name the right one with `{role}_column`."
            )


def find_columns(
    dataset: Dataset | IterableDataset,
    image_column: str | None = None,
    text_column: str | None = None,
) -> tuple[str, str]:
    """Names of the columns of images and captions, those that are not given found by their types.

    Of several columns that could be meant, one with a usual name is, ``image`` or ``text`` above
    all. A list of strings, or a class, is a caption where there is no string.

    Raises:
        UserError: there is no such column, or it cannot be told which of several is meant.
    """
    kinds: Mapping[str, Any] = dataset.features or {}
    own = [name for name in kinds if not is_influence_column(name)]
    images = [name for name in own if _is_image_like(kinds[name])]
    surely = [name for name in images if not is_text(kinds[name])]
    if image_column is None and len(images) > 1 and not surely:
        images = _telling(dataset, images) or images
    image = image_column or _only("image", surely or images, kinds)
    others = [name for name in own if name != image and name not in NO_CAPTIONS]
    texts = [name for name in others if is_text(kinds[name])]
    lists = [name for name in others if is_list_of_texts(kinds[name])]
    classes = [name for name in others if isinstance(kinds[name], ClassLabel)]
    usual = [name for name in USUAL["text"] if name in (*texts, *lists, *classes)]
    return image, text_column or _only("text", usual[:1] or texts or lists or classes, kinds)


def _only(what: str, candidates: list[str], kinds: Mapping[str, Any]) -> str:
    usual = next((name for name in USUAL[what] if name in candidates), None)
    if usual or len(candidates) == 1:
        return usual or candidates[0]
    told = f"columns that could hold the {what}s"
    if candidates:
        raise UserError(f"There are several {told}: {', '.join(candidates)}. Give `{what}_column`.")
    columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    raise UserError(
        f"There are no {told}. The columns are: {columns}. Give data with such a column, or name "
        f"the right one with `{what}_column`."
    )


def require_text(types: Mapping[str, Any], column: str) -> None:
    """Refuse a column of captions that holds no strings.

    Raises:
        UserError: it holds something else.
    """
    if not is_text(types[column]):
        raise UserError(
            f"The text column {column!r} must hold strings, but it is {types[column]}. Name "
            "another one with `text_column`."
        )


def as_images(dataset: AnyDataset, column: str) -> AnyDataset:
    """The rows with a column of images as `Image`, if it is one already unchanged.

    Args:
        dataset: rows; of a stream, the types of the columns must be known.
        column: bytes, paths, structs of both, or base64. Further parts of a struct become columns,
            named ``image.width`` for instance. References to embeddings stay as they are.

    Raises:
        UserError: the column holds something else, or addresses of images.
    """
    known: Mapping[str, Any] = dataset.features or {}
    kind = known[column]
    if not _is_image_like(kind):
        raise UserError(
            f"The image column {column!r} must hold images, their bytes or their paths, but "
            f"it is {kind}. Name another one with `image_column`."
        )
    _refuse_addresses(dataset, column, kind)
    if isinstance(kind, Image):
        return dataset
    if is_text(kind) and any(map(is_reference, _first_texts(dataset, column))):
        return dataset
    if is_text(kind) and any(map(decode_base64, _first_texts(dataset, column))):
        return _from_base64(dataset, column)
    if isinstance(kind, dict):
        dataset = _part_struct(dataset, column, kind)
    return dataset.cast_column(column, Image())


def _telling(dataset: Dataset | IterableDataset, names: list[str]) -> list[str]:
    """Columns of strings that hold images or their addresses, by their first cells."""

    def tells(text: str) -> bool:
        return bool(_ADDRESS.match(text)) or decode_base64(text) is not None

    return [name for name in names if any(map(tells, _first_texts(dataset, name)))]


def _refuse_addresses(dataset: Dataset | IterableDataset, column: str, kind: Any) -> None:
    if isinstance(kind, Image):
        dataset = dataset.cast_column(column, Image(decode=False))
    texts = _first_texts(dataset, column)
    addresses = [text for text in texts if _ADDRESS.match(text)]
    if addresses and 2 * len(addresses) >= len(texts):
        raise UserError(
            f"The image column {column!r} holds addresses, such as {addresses[0][:80]}, and not "
            "pictures. Download them first, with img2dataset for instance, and give the folder of "
            "tars that it writes."
        )


def _first_texts(dataset: Dataset | IterableDataset, column: str) -> list[str]:
    """The first strings in a column, or paths where it holds structs without bytes."""
    first = [row[column] for row in dataset.select_columns([column]).take(_LOOKED_AT)]
    paths = [
        cell.get("path") if not cell.get("bytes") else None
        for cell in first
        if isinstance(cell, dict)
    ]
    return [text for text in (*first, *paths) if isinstance(text, str) and text]


def _from_base64(dataset: AnyDataset, column: str) -> AnyDataset:
    """Images out of their base64 text; what is none stays as it is, to be told of."""

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {column: [_decoded(text) for text in batch[column]]}

    kind = Image(decode=False)
    if isinstance(dataset, IterableDataset):
        kinds = Features(**{**(dataset.features or {}), column: kind})
        return dataset.map(read, batched=True, features=kinds).cast_column(column, Image())
    alone = dataset.select_columns([column]).map(
        read,
        batched=True,
        batch_size=64,
        features=Features(**{column: kind}),
        cache_file_name=str(scratch_file(".arrow")),
    )
    rest = dataset.remove_columns(column)
    joined = concatenate_datasets([rest, alone], axis=1) if rest.column_names else alone
    return joined.select_columns(dataset.column_names).cast_column(column, Image())


def _decoded(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    content = decode_base64(text)
    return {"bytes": text.encode() if content is None else content, "path": None}


def _part_struct(dataset: AnyDataset, column: str, kind: dict[str, Any]) -> AnyDataset:
    """The rows with the parts of a struct that are no image's as columns of their own."""
    more = [name for name in kind if name not in ("bytes", "path")]
    if not more:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset
    flat = dataset.select_columns([column]).flatten()
    extra = flat.select_columns([f"{column}.{name}" for name in more])
    return concatenate_datasets([dataset, extra], axis=1)


def drop_influence_columns(dataset: Dataset) -> Dataset:
    """Remove the columns that an earlier run added, so that a second run starts clean."""
    return dataset.remove_columns(list(filter(is_influence_column, dataset.column_names)))


# Of influence columns without the prefix.
OTHER_NAMES = ("clip_score", "neg_clip_loss", "caption_truncated")


def is_influence_column(name: str) -> bool:
    """Whether a column is none of the source's own, nor tells what a pair was read from."""
    if name == CAPTION or name.startswith((ROW, PLACE)):
        return False
    return name.startswith("ecif_") or name in OTHER_NAMES


def is_ours(name: str) -> bool:
    """Whether a column is none of the source's own."""
    return name.startswith("ecif_") or is_influence_column(name)


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
            "must be null where there is no verdict."
        )
    return np.where(missing, 0, np.where(flags, 1, -1)).astype(np.int8)


def is_text(feature: Any) -> bool:
    """Whether a column holds strings."""
    return _is_value(feature, "string")


def is_list_of_texts(feature: Any) -> bool:
    """Whether a column holds lists of strings."""
    return isinstance(feature, List) and is_text(feature.feature)


def _is_value(feature: Any, *kinds: str) -> bool:
    known = (*kinds, *(f"large_{kind}" for kind in kinds))
    return isinstance(feature, Value) and feature.dtype in known


def _is_image_like(feature: Any) -> bool:
    if isinstance(feature, dict):
        kinds = {"bytes": "binary", "path": "string"}
        parts = [(kind, feature[name]) for name, kind in kinds.items() if name in feature]
        return bool(parts) and all(_is_value(part, kind, "null") for kind, part in parts)
    return isinstance(feature, Image) or _is_value(feature, "binary", "string")
