"""The influence columns: scores and flags as columns of the data set, null where a row has none."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, Value
from numpy.typing import NDArray

from hf_ecif.detection import Detection
from hf_ecif.features import Rows
from hf_ecif.scoring import RelativeForm, Scores

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
    "ecif_reason": "why the pair was flagged, or could not be scored",
}


def add_columns(
    dataset: Dataset,
    rows: Rows,
    scores: Scores,
    given: Scores,
    detection: Detection,
    relative: RelativeForm = "deletion",
) -> Dataset:
    """The data set with `COLUMNS`; its own columns are untouched.

    Args:
        dataset: all rows.
        rows: the readable ones.
        scores: of the readable rows, at the fitted parameters.
        given: the same at the model's own parameters.
        detection: of the readable rows.
        relative: which relative score; over the size of the change, or within its span.
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
        "ecif_noise_probability": detection.probability,
    }
    for name, values in columns.items():
        dataset = _append(dataset, name, _spread(np.asarray(values).tolist(), rows), "float32")
    dataset = _append(dataset, "ecif_flag", _spread(detection.flag.tolist(), rows), "bool")
    reasons = _spread(_reasons(scores, detection), rows)
    for row, reason in rows.reasons.items():
        reasons[row] = reason
    return _append(dataset, "ecif_reason", reasons, "string")


def _append(dataset: Dataset, name: str, values: list[Any], dtype: str) -> Dataset:
    return dataset.add_column(name, values, feature=Value(dtype))


def _spread(values: list[Any], rows: Rows) -> list[Any]:
    """Values of the readable rows, in a list of all rows with None for the others."""
    spread: list[Any] = [None] * rows.total
    for position, value in zip(rows.positions.tolist(), values, strict=True):
        spread[position] = value
    return spread


def _reasons(scores: Scores, detection: Detection) -> list[str | None]:
    loss = scores.loo_loss.double().numpy()
    rank = 100 * _share_below(loss)
    task = scores.task.tolist()
    return [
        f"probably misaligned ({probability:.0%}): its loss would be higher than that of "
        f"{share:.0f}% of the pairs if it had not been trained on, and without it the query's loss "
        f"is predicted to {'fall' if effect < 0 else 'rise'}"
        if flag
        else None
        for flag, probability, share, effect in zip(
            detection.flag, detection.probability, rank, task, strict=True
        )
    ]


def _share_below(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.searchsorted(np.sort(values), values, side="left") / len(values)
