"""From rows as they lie to pairs: which rows, which columns, and what stands for a caption.

The columns of the source stay as they are, with two exceptions. A list of captions is taken apart
(see `hf_ecif.data.lists`). And where a caption is not a cell of its own, but the name of a class or
of something that a template makes a sentence of, it stands in a new column, `ecif_caption`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Value, concatenate_datasets

from hf_ecif.data.columns import CAPTION, replace_column
from hf_ecif.data.lists import explode, unfold
from hf_ecif.data.schema import (
    find_columns,
    is_list_of_texts,
    is_text,
    require_columns,
    require_text,
)
from hf_ecif.data.summary import Columns
from hf_ecif.errors import UserError
from hf_ecif.utils.seeds import derive

HOLE = "{}"  # where a template takes the name in


@dataclass(frozen=True)
class PairOptions:
    """Which pairs are made of rows.

    Attributes:
        image_column: of images; found by its type if absent. A part of a struct, or of a column of
            JSON, is named with a dot: ``json.caption``.
        text_column: of captions, lists of captions or classes; likewise.
        template: a sentence for each name, with ``{}`` in its place.
        limit: how many of the first rows are read.
        sample: how many rows are drawn at random; of these, if both are given.
        seed: of the sample.

    Raises:
        UserError: the template has no place for the name.
    """

    image_column: str | None = None
    text_column: str | None = None
    template: str | None = None
    limit: int | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.template is not None and HOLE not in self.template:
            raise UserError(f"`template={self.template}`: must hold {HOLE}, where the name goes.")


class MadePairs(NamedTuple):
    """Pairs, and where they are from.

    Attributes:
        rows: the rows, one for each pair.
        columns: names of the columns that hold the pairs.
        source: names of the columns that they were made of.
    """

    rows: Dataset
    columns: Columns
    source: Columns


def make_pairs(rows: Dataset, options: PairOptions) -> MadePairs:
    """Pairs out of rows.

    Raises:
        UserError: a column is missing, holds something else, or it cannot be told which is meant.
    """
    rows = draw(rows, options.limit, options.sample, options.seed)
    if CAPTION in rows.column_names and options.text_column != CAPTION:
        rows = rows.remove_columns(CAPTION)  # of an earlier run
    rows = unfold(rows)
    for name in (options.image_column, options.text_column):
        rows = _lift(rows, name)
    image, text = find_columns(rows, options.image_column, options.text_column)
    require_columns(rows.features, image, text)
    if is_list_of_texts(rows.features[text]):
        rows = explode(rows, text)
    rows, caption = _with_captions(rows, text, options.template)
    require_text(rows.features, caption)
    return MadePairs(rows, Columns(image=image, text=caption), Columns(image=image, text=text))


def draw(rows: Dataset, limit: int | None, sample: int | None, seed: int) -> Dataset:
    """The first rows, or some of these at random, in their order."""
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    if sample is not None and sample < len(rows):
        chance = np.random.default_rng(derive(seed, "sample"))
        rows = rows.select(np.sort(chance.choice(len(rows), sample, replace=False)))
    return rows


def rename_like(rows: Dataset, columns: Columns, wanted: Columns) -> Dataset:
    """Rows whose pairs are in columns of other names.

    A column that had such a name gets the name that became free.
    """
    for name, new in ((columns.image, wanted.image), (columns.text, wanted.text)):
        if name == new or name not in rows.column_names:
            continue
        swapped = {name: new} | ({new: name} if new in rows.column_names else {})
        rows = rows.rename_columns(swapped)
        if columns.text == new:  # the caption stood where the image is wanted
            columns = Columns(image=new, text=name)
    return rows


def _with_captions(rows: Dataset, column: str, template: str | None) -> tuple[Dataset, str]:
    """Rows, and the column of their captions, a new one if these have to be made."""
    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        numbers = rows.with_format(None)[column][:]
        names = [None if one is None or one < 0 else kind.names[one] for one in numbers]
    elif is_text(kind) and template is not None:
        names = rows.with_format(None)[column][:]
    else:
        return rows, column
    captions = [_fill(template or HOLE, name) for name in names]
    return replace_column(rows.with_format(None), CAPTION, captions, Value("string")), CAPTION


def _fill(template: str, name: str | None) -> str | None:
    return template.replace(HOLE, name) if name else name


def _lift(rows: Dataset, name: str | None) -> Dataset:
    """Rows with a part of a struct, or of JSON, as a column of its own."""
    if name is None or name in rows.column_names or "." not in name:
        return rows
    head, *path = name.split(".")
    kind = rows.features.get(head)
    if isinstance(kind, dict):
        return _lift_struct(rows, head, name)
    if kind is None or not is_text(kind):
        return rows
    texts = rows.with_format(None)[head][:]
    values = [_text_at(text, path) for text in texts]
    return replace_column(rows.with_format(None), name, values, Value("string"))


def _lift_struct(rows: Dataset, head: str, name: str) -> Dataset:
    parts = rows.with_format(None).select_columns([head])
    while name not in parts.column_names:
        deeper = [one for one in parts.column_names if name.startswith(f"{one}.")]
        if not deeper or not isinstance(parts.features[deeper[0]], dict):
            return rows
        parts = parts.select_columns(deeper[:1]).flatten(max_depth=2)  # by one level
    return concatenate_datasets([rows.with_format(None), parts.select_columns([name])], axis=1)


def _text_at(text: str | None, path: Sequence[str]) -> str | None:
    try:
        value: Any = json.loads(text or "null")
    except ValueError:
        return None
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else str(value)
