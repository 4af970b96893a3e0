"""The influence columns: their names, their meaning, and the groups that rows are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_ecif.errors import UserError

# What a pair was read from, where that is not a cell of its own; see `hf_ecif.data.pairs` and
# `hf_ecif.data.lists`.
CAPTION = "ecif_caption"
ROW, PLACE = "ecif_row:", "ecif_place:"  # before the name of a column of lists


KEY, URL = "__key__", "__url__"  # of rows from tars: their name, and the tar

COLUMNS = {
    "ecif_score": "predicted change of the query's loss if the pair were removed, in nats: "
    "negative is harmful, positive is valuable",
    "ecif_positive": "the part of ecif_score from the pair's role as a positive",
    "ecif_negative": "the part from its role as a negative of other pairs; they add up",
    "ecif_stderr": "standard error of ecif_score over random partitions into batches",
    "ecif_relative": "ecif_score over the size of the parameter change that the removal causes "
    "(or its norm within the span of both roles, where that was asked for)",
    "ecif_self": "self-influence: by how much the pair's own loss would rise without it, in nats",
    "ecif_loo_loss": "the loss that the pair would have, had it not been trained on, in nats",
    "clip_score": "cosine of image and caption under the model as given",
    "neg_clip_loss": "the negated loss per term over the logit scale, as given; higher is better",
    "ecif_noise_probability": "probability that the pair is misaligned; null where the model "
    "cannot tell",
    "ecif_suspicion": "logarithm of how much likelier the pair's signals are among misaligned "
    "pairs than among right ones: it ranks the pairs even where no probability can be given",
    "ecif_flag": "whether that probability is above the threshold",
    "ecif_borderline": "whether the threshold is within two standard errors of that probability",
    "ecif_image_neighbours": "how far the caption is from those of the most similar images: their "
    "mean cosine distance, weighted by how near they are and how well they fit themselves",
    "ecif_text_neighbours": "the same for the image and those of the most similar captions",
    "ecif_suggested_text": "a caption that fits a flagged image better than its own and than all "
    "other candidates, where it is probably the right one",
    "ecif_suggested_probability": "probability that it is the right one",
    "ecif_suggested_margin": "by how much its logit stands above the next best one, in nats",
    "ecif_wrong_words": "words of a flagged caption that its image contradicts, the worst first: "
    "each with the places of its first character and of the one after its last",
    "ecif_finding": "what makes it idle to ask whether the caption fits: placeholder_image (one "
    "image under many captions that have nothing in common), stock_phrase (one caption under many "
    "images that have nothing in common), says_nothing (a file name, an address, a number, "
    "'image'), truncated_equal (equal to others as far as the model reads), unknown_script (which "
    "the tokenizer does not know); null elsewhere",
    "caption_truncated": "whether the caption is longer than the model reads",
    "ecif_duplicate_group": "number of the first row that has nearly the same image or the same "
    "caption, also by way of other rows; null where a row is alone",
    "ecif_reason": "why the pair was flagged, or could not be scored",
}


ADDED_LATER = {
    CAPTION: "what the model was given to read: the name of the class, within the sentence around "
    "it that was asked for",
    "ecif_weight": "1 - ecif_noise_probability, for a weighted loss; 0 of an unreadable row",
    "ecif_original_text": "the caption before it was replaced; null where it was not",
    "ecif_decision": "what a person decided in a review: keep, remove, recaption or unsure",
    "ecif_verdict": "a person's verdict on the pair: right, wrong or cannot tell; null where "
    "there is none",
    "ecif_audit_probability": "ecif_noise_probability as the audit had it, before verdicts",
    "ecif_audit_flag": "ecif_flag as the audit had it, before verdicts",
}


WRONG_WORDS = List({"word": Value("string"), "start": Value("int32"), "end": Value("int32")})


SCORES = tuple(COLUMNS)[: tuple(COLUMNS).index("ecif_noise_probability")]


NAMES = (
    "string",
    "large_string",
    "bool",
    *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)),
)


def set_column(
    dataset: Dataset, name: str, values: Sequence[Any], kind: str | List = ""
) -> Dataset:
    """Data set with these values in a column, in its old place and type, or else as the last.

    Args:
        dataset: the rows.
        name: name of the column.
        values: one for each row.
        kind: of a new column: a type of Arrow by its name, or a feature.
    """
    if name in dataset.column_names:
        return replace_column(dataset, name, values, dataset.features[name])
    return replace_column(dataset, name, values, Value(kind) if isinstance(kind, str) else kind)


def replace_column(dataset: Dataset, name: str, values: Any, feature: Any) -> Dataset:
    """Data set with these values of this type in a column, in its old place, or else as the last.

    Args:
        dataset: the rows.
        name: name of the column.
        values: one for each row; a list, or an array of NumPy or Arrow.
        feature: their type.
    """
    order = dataset.column_names
    if name not in order:
        return dataset.add_column(name, values, feature=feature)
    rest = dataset.remove_columns(name)
    if not rest.column_names:  # has lost the number of its rows
        kinds = Features(**{name: feature})
        return Dataset(pa.table({name: values}, schema=kinds.arrow_schema))
    return rest.add_column(name, values, feature=feature).select_columns(order)


def read_groups(dataset: Dataset, column: str, option: str = "group_column") -> list[str | None]:
    """The group of every row as text; None where it has none.

    Args:
        dataset: All rows.
        column: Its name.
        option: The argument that named it, for the error.

    Raises:
        UserError: the column is missing, or its values are no names.
    """
    if column not in dataset.column_names:
        raise UserError(
            f"`{option}={column!r}` is not in the data set. It has: "
            f"{', '.join(dataset.column_names)}."
        )
    feature = dataset.features[column]
    values = dataset.with_format(None)[column][:]
    if isinstance(feature, ClassLabel):
        return [None if value is None else str(feature.int2str(value)) for value in values]
    if not isinstance(feature, Value) or feature.dtype not in NAMES:
        raise UserError(
            f"`{option}={column!r}` must hold strings, integers or booleans, but it is "
            f"{feature}. Name another column."
        )
    return [None if value is None else str(value) for value in values]
