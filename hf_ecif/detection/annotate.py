"""What was found, as columns of the data set; null where a row has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from hf_ecif.data.columns import COLUMNS, SCORES, WRONG_WORDS, set_column
from hf_ecif.detection.detect import Detection
from hf_ecif.detection.explain import Ranks, explain_flags
from hf_ecif.detection.findings import Findings
from hf_ecif.detection.mixture import Floats
from hf_ecif.detection.signals import Signals
from hf_ecif.detection.suggestions import Evidence
from hf_ecif.influence.columns import score_values
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import RelativeForm, Scores

_NUMBERS = dict.fromkeys(
    (
        *SCORES,
        "ecif_noise_probability",
        "ecif_suspicion",
        "ecif_image_neighbours",
        "ecif_text_neighbours",
        "ecif_suggested_probability",
        "ecif_suggested_margin",
    ),
    "float32",
)
_OTHERS: dict[str, Any] = {
    "ecif_flag": "bool",
    "ecif_borderline": "bool",
    "ecif_suggested_text": "string",
    "ecif_wrong_words": WRONG_WORDS,
    "ecif_finding": "string",
    "caption_truncated": "bool",
    "ecif_duplicate_group": "int64",
    "ecif_reason": "string",
}
TYPES: dict[str, Any] = {name: (_NUMBERS | _OTHERS)[name] for name in COLUMNS}
FEATURES = Features(
    **{name: Value(kind) if isinstance(kind, str) else kind for name, kind in TYPES.items()}
)


def add_columns(
    dataset: Dataset,
    rows: Rows,
    scores: Scores,
    given: Scores,
    signals: Signals,
    detection: Detection,
    relative: RelativeForm = "deletion",
    evidence: Evidence | None = None,
    findings: Findings | None = None,
) -> Dataset:
    """The data set with `COLUMNS`; its own columns are untouched.

    Args:
        dataset: all rows.
        rows: the readable ones.
        scores: as for `column_values`, as all others.
        given: likewise.
        signals: likewise.
        detection: likewise.
        relative: likewise.
        evidence: likewise.
        findings: likewise.
    """
    values = column_values(rows, scores, given, signals, detection, relative, evidence, findings)
    for name, column in spread_columns(rows, values).items():
        dataset = set_column(dataset, name, column, TYPES[name])
    return dataset


def spread_columns(rows: Rows, values: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns of all ``rows.total`` rows; those that cannot be read have a reason alone.

    Args:
        rows: the readable rows.
        values: columns of these, as from `column_values`.
    """
    columns = {name: rows.spread(column) for name, column in values.items()}
    for row, reason in rows.reasons.items():
        columns["ecif_reason"][row] = reason
    return columns


def column_values(
    rows: Rows,
    scores: Scores,
    given: Scores,
    signals: Signals,
    detection: Detection,
    relative: RelativeForm = "deletion",
    evidence: Evidence | None = None,
    findings: Findings | None = None,
    ranks: Ranks | None = None,
) -> dict[str, list[Any]]:
    """`COLUMNS` of the readable rows.

    Args:
        rows: the readable rows.
        scores: of these rows, at the fitted parameters.
        given: the same at the model's own parameters.
        signals: of these rows.
        detection: of these rows.
        relative: which relative score; over the size of the change, or within its span.
        evidence: of these rows; without it, suggestions and duplicates are null.
        findings: of these rows; without them, their columns are null.
        ranks: of the rows that these are ranked among; themselves if absent.
    """
    found: dict[str, list[Any]] = dict(score_values(scores, given, relative))
    found |= {
        "ecif_noise_probability": _null_if_nan(detection.probability),
        "ecif_suspicion": detection.suspicion.tolist(),
        "ecif_flag": detection.flag.tolist(),
        "ecif_borderline": detection.borderline.tolist(),
        "ecif_image_neighbours": signals.image_neighbours.tolist(),
        "ecif_text_neighbours": signals.text_neighbours.tolist(),
    }
    found |= _evidence_columns(evidence, len(rows)) | _finding_columns(findings, len(rows))
    found["ecif_reason"] = explain_flags(
        rows, scores, signals, detection, evidence, findings, ranks
    )
    return {name: found[name] for name in COLUMNS}


def _null_if_nan(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _evidence_columns(evidence: Evidence | None, count: int) -> dict[str, list[Any]]:
    """Suggested captions, contradicted words with their places, and duplicate groups."""
    names = (
        "ecif_suggested_text",
        "ecif_suggested_probability",
        "ecif_suggested_margin",
        "ecif_wrong_words",
        "ecif_duplicate_group",
    )
    if evidence is None:
        return {name: [None] * count for name in names}
    words = [
        None
        if words is None
        else [{"word": word.text, "start": word.start, "end": word.end} for word in words]
        for words in evidence.wrong_words
    ]
    columns = (
        evidence.suggested_text,
        evidence.suggested_probability,
        evidence.suggested_margin,
        words,
        evidence.duplicate_group,
    )
    return dict(zip(names, columns, strict=True))


def _finding_columns(findings: Findings | None, count: int) -> dict[str, list[Any]]:
    """Kinds of findings, and whether captions are cut off."""
    if findings is None:
        return {name: [None] * count for name in ("ecif_finding", "caption_truncated")}
    return {
        "ecif_finding": list(findings.kinds),
        "caption_truncated": findings.truncated.tolist(),
    }
