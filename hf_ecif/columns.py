"""The influence columns: scores and flags as columns of the data set, null where a row has none."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Dataset, Value

from hf_ecif.detection import Detection
from hf_ecif.errors import UserError
from hf_ecif.evidence import Evidence
from hf_ecif.features import Rows
from hf_ecif.reasons import explain_flags
from hf_ecif.scoring import RelativeForm, Scores
from hf_ecif.witnesses import Witnesses

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
    "ecif_noise_probability": "probability that the pair is misaligned",
    "ecif_flag": "whether that probability is above the threshold",
    "ecif_borderline": "whether the threshold is within two standard errors of that probability",
    "ecif_image_neighbours": "how far the caption is from those of the most similar images: their "
    "mean cosine distance, weighted by how near they are and how well they fit themselves",
    "ecif_text_neighbours": "the same for the image and those of the most similar captions",
    "ecif_suggested_text": "a caption that fits a flagged image better than its own and than all "
    "other candidates, where one stands out",
    "ecif_suggested_margin": "by how much its logit stands above the next best one, in nats",
    "ecif_duplicate_group": "number of the first row that has nearly the same image or the same "
    "caption, also by way of other rows; null where a row is alone",
    "ecif_reason": "why the pair was flagged, or could not be scored",
}
ADDED_LATER = {
    "ecif_weight": "1 - ecif_noise_probability, for a weighted loss; 0 where a row has none",
    "ecif_original_text": "the caption before it was replaced; null where it was not",
    "ecif_decision": "what a person decided in a review: keep, remove or recaption",
}
SCORES = tuple(COLUMNS)[: tuple(COLUMNS).index("ecif_noise_probability")]
NAMES = (
    "string",
    "large_string",
    "bool",
    *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)),
)


def add_columns(
    dataset: Dataset,
    rows: Rows,
    scores: Scores,
    given: Scores,
    witnesses: Witnesses,
    detection: Detection,
    relative: RelativeForm = "deletion",
    evidence: Evidence | None = None,
) -> Dataset:
    """The data set with `COLUMNS`; its own columns are untouched.

    Args:
        dataset: all rows.
        rows: the readable ones.
        scores: of the readable rows, at the fitted parameters.
        given: the same at the model's own parameters.
        witnesses: of the readable rows.
        detection: of the readable rows.
        relative: which relative score; over the size of the change, or within its span.
        evidence: of the readable rows; without it, suggestions and duplicates are null.
    """
    columns = score_columns(rows, scores, given, relative)
    probability = _spread(detection.probability.tolist(), rows)
    for name, values in (columns | {"ecif_noise_probability": probability}).items():
        dataset = _append(dataset, name, values, "float32")
    for name, marks in (("ecif_flag", detection.flag), ("ecif_borderline", detection.borderline)):
        dataset = _append(dataset, name, _spread(marks.tolist(), rows), "bool")
    for side in ("image_neighbours", "text_neighbours"):
        values = _spread(getattr(witnesses, side).tolist(), rows)
        dataset = _append(dataset, f"ecif_{side}", values, "float32")
    texts, margins, duplicates = _evidence_columns(evidence, rows)
    dataset = _append(dataset, "ecif_suggested_text", _spread(texts, rows), "string")
    dataset = _append(dataset, "ecif_suggested_margin", _spread(margins, rows), "float32")
    dataset = _append(dataset, "ecif_duplicate_group", _spread(duplicates, rows), "int64")
    reasons = _spread(explain_flags(rows, scores, witnesses, detection, evidence), rows)
    for row, reason in rows.reasons.items():
        reasons[row] = reason
    return _append(dataset, "ecif_reason", reasons, "string")


def score_columns(
    rows: Rows, scores: Scores, given: Scores, relative: RelativeForm = "deletion"
) -> dict[str, list[float | None]]:
    """Those of `COLUMNS` that are scores, with a value for every row, null for unreadable ones.

    Args:
        rows: the readable ones.
        scores: of the readable rows, at the fitted parameters.
        given: the same at the model's own parameters.
        relative: which relative score.
    """
    columns = {
        "ecif_score": scores.task,
        "ecif_positive": scores.positive,
        "ecif_negative": scores.negative,
        "ecif_stderr": scores.stderr,
        "ecif_relative": scores.relative_to(relative),
        "ecif_self": scores.self_influence,
        "ecif_loo_loss": scores.loo_loss,
        "clip_score": given.clip_score,
        "neg_clip_loss": given.neg_clip_loss,
    }
    return {name: _spread(values.tolist(), rows) for name, values in columns.items()}


def read_groups(dataset: Dataset, column: str) -> list[str | None]:
    """The group of every row as text; None where it has none.

    Raises:
        UserError: the column is missing, or its values are no names.
    """
    if column not in dataset.column_names:
        raise UserError(
            f"--group-column {column!r} is not in the data set. It has: "
            f"{', '.join(dataset.column_names)}."
        )
    feature = dataset.features[column]
    values = dataset.with_format(None)[column][:]
    if isinstance(feature, ClassLabel):
        return [None if value is None else feature.int2str(value) for value in values]
    if not isinstance(feature, Value) or feature.dtype not in NAMES:
        raise UserError(
            f"--group-column {column!r} must hold strings, integers or booleans, but it is "
            f"{feature}. Name another column."
        )
    return [None if value is None else str(value) for value in values]


def _append(dataset: Dataset, name: str, values: list[Any], dtype: str) -> Dataset:
    return dataset.add_column(name, values, feature=Value(dtype))


def _spread(values: list[Any], rows: Rows) -> list[Any]:
    """Values of the readable rows, in a list of all rows with None for the others."""
    spread: list[Any] = [None] * rows.total
    for position, value in zip(rows.positions.tolist(), values, strict=True):
        spread[position] = value
    return spread


def _evidence_columns(
    evidence: Evidence | None, rows: Rows
) -> tuple[list[str | None], list[float | None], list[int | None]]:
    """Suggested captions with their margins, and duplicate groups, of the readable rows."""
    if evidence is None:
        nothing: list[Any] = [None] * len(rows)
        return nothing, nothing, nothing
    return evidence.suggested_text, evidence.suggested_margin, evidence.duplicate_group
