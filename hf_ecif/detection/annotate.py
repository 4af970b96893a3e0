"""The data set with everything that was found, as columns; null where a row has none."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from hf_ecif.data.columns import WRONG_WORDS, set_column
from hf_ecif.detection.detect import Detection
from hf_ecif.detection.explain import explain_flags
from hf_ecif.detection.findings import Findings
from hf_ecif.detection.mixture import Floats
from hf_ecif.detection.signals import Signals
from hf_ecif.detection.suggestions import Evidence
from hf_ecif.influence.columns import score_columns
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import RelativeForm, Scores


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
        scores: of the readable rows, at the fitted parameters.
        given: the same at the model's own parameters.
        signals: of the readable rows.
        detection: of the readable rows.
        relative: which relative score; over the size of the change, or within its span.
        evidence: of the readable rows; without it, suggestions and duplicates are null.
        findings: of the readable rows; without them, their columns are null.
    """
    columns = score_columns(rows, scores, given, relative)
    columns |= {
        "ecif_noise_probability": rows.spread(_null_if_nan(detection.probability)),
        "ecif_suspicion": rows.spread(detection.suspicion.tolist()),
    }
    for name, values in columns.items():
        dataset = set_column(dataset, name, values, "float32")
    for name, marks in (("ecif_flag", detection.flag), ("ecif_borderline", detection.borderline)):
        dataset = set_column(dataset, name, rows.spread(marks.tolist()), "bool")
    for side in ("image_neighbours", "text_neighbours"):
        values = rows.spread(getattr(signals, side).tolist())
        dataset = set_column(dataset, f"ecif_{side}", values, "float32")
    texts, margins, duplicates = _evidence_columns(evidence, rows)
    dataset = set_column(dataset, "ecif_suggested_text", rows.spread(texts), "string")
    chances = [None] * len(rows) if evidence is None else evidence.suggested_probability
    dataset = set_column(dataset, "ecif_suggested_probability", rows.spread(chances), "float32")
    dataset = set_column(dataset, "ecif_suggested_margin", rows.spread(margins), "float32")
    words = rows.spread(_word_cells(evidence, rows))
    dataset = set_column(dataset, "ecif_wrong_words", words, WRONG_WORDS)
    kinds, truncated = _finding_columns(findings, rows)
    dataset = set_column(dataset, "ecif_finding", rows.spread(kinds), "string")
    dataset = set_column(dataset, "caption_truncated", rows.spread(truncated), "bool")
    dataset = set_column(dataset, "ecif_duplicate_group", rows.spread(duplicates), "int64")
    reasons = rows.spread(explain_flags(rows, scores, signals, detection, evidence, findings))
    for row, reason in rows.reasons.items():
        reasons[row] = reason
    return set_column(dataset, "ecif_reason", reasons, "string")


def _null_if_nan(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _evidence_columns(
    evidence: Evidence | None, rows: Rows
) -> tuple[list[str | None], list[float | None], list[int | None]]:
    """Suggested captions with their margins, and duplicate groups, of the readable rows."""
    if evidence is None:
        nothing: list[Any] = [None] * len(rows)
        return nothing, nothing, nothing
    return evidence.suggested_text, evidence.suggested_margin, evidence.duplicate_group


def _word_cells(evidence: Evidence | None, rows: Rows) -> list[list[dict[str, Any]] | None]:
    """Contradicted words, with their places, of the readable rows."""
    if evidence is None:
        return [None] * len(rows)
    return [
        None
        if words is None
        else [{"word": word.text, "start": word.start, "end": word.end} for word in words]
        for words in evidence.wrong_words
    ]


def _finding_columns(findings: Findings | None, rows: Rows) -> tuple[list[Any], list[Any]]:
    """Kinds of findings, and whether captions are cut off, of the readable rows."""
    if findings is None:
        nothing: list[Any] = [None] * len(rows)
        return nothing, nothing
    return list(findings.kinds), findings.truncated.tolist()
