"""Scores as columns of a data set, null for rows without scores."""

from __future__ import annotations

from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import RelativeForm, Scores

REASON = "ecif_reason"


def score_columns(
    rows: Rows, scores: Scores, given: Scores, relative: RelativeForm = "deletion"
) -> dict[str, list[float | None]]:
    """Score columns among `COLUMNS`, with a value for every row, null for unreadable rows.

    Args:
        rows: the readable rows.
        scores: scores of the readable rows, at the fitted parameters.
        given: scores of the readable rows, at the model's own parameters.
        relative: form of the relative score.
    """
    values = score_values(scores, given, relative)
    return {name: rows.spread(column) for name, column in values.items()}


def score_values(
    scores: Scores, given: Scores, relative: RelativeForm = "deletion"
) -> dict[str, list[float]]:
    """`score_columns` of the readable rows alone."""
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
    return {name: values.tolist() for name, values in columns.items()}


def reason_column(rows: Rows, otherwise: str | None = None) -> list[str | None]:
    """Reason of every row without scores; ``otherwise`` for the others.

    Args:
        rows: the readable rows.
        otherwise: reason of readable rows; None if they have scores.
    """
    return [rows.reasons.get(row, otherwise) for row in range(rows.total)]
