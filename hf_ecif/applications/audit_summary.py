"""What an audit found, in figures and in words: its `Summary`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_ecif.applications.analysis import Analysis
from hf_ecif.applications.requests import AuditOptions
from hf_ecif.applications.sources import Opened, describe_solves
from hf_ecif.data.summary import (
    DuplicateCounts,
    Duplicates,
    FitFacts,
    GroupFacts,
    Groups,
    Loaded,
    Noise,
    Suggestions,
    Summary,
    Truth,
    Verified,
)
from hf_ecif.detection.detect import (
    RIGHT,
    SMALLEST_GROUP,
    WRONG,
    Detection,
    auroc,
)
from hf_ecif.detection.findings import tell
from hf_ecif.detection.groups import often_flagged
from hf_ecif.detection.suggestions import Evidence
from hf_ecif.influence.saving import find_commit


def summarise(options: AuditOptions, found: Analysis, notes: Sequence[str]) -> Summary:
    """What was found, without times and fingerprints."""
    opened, rows, fitted = found.opened, found.rows, found.influence.fitted
    detection, evidence, truth = found.detection, found.evidence, found.beside.truth
    flagged = int(detection.flag.sum())
    provenance = opened.provenance(
        rows,
        found.query,
        loss_before_fit=fitted.query_loss_before,
        loss=fitted.query_loss,
        alignment=fitted.alignment,
    )
    provenance["config"] |= options.detection.to_dict()
    summary = Summary(
        **provenance,
        findings=found.findings.counts(),
        unreadable_reasons=dict(Counter(rows.reasons.values())),
        flagged=flagged,
        kept=len(rows) - flagged,
        removed=flagged + len(rows.reasons),
        noise=_describe_noise(found),
        groups=_describe_groups(options, found),
        suggestions=_describe_suggestions(options, evidence),
        duplicates=_describe_duplicates(evidence) if evidence else None,
        fit=FitFacts(
            **asdict(fitted.fit),
            parameters=opened.model.config.parameters,
            count=opened.model.encoder.count,
        ),
        solvers=describe_solves(fitted),
        loaded=_describe_loading(opened),
        truth=None
        if truth is None
        else _judge(truth[rows.positions.numpy()], str(options.truth_column), detection),
    )
    warnings = [
        *_warn_of_likeness(found),
        *_warnings(summary),
        *opened.warnings(rows, found.query),
        *notes,
    ]
    return summary.replace(warnings=warnings)


def _describe_loading(opened: Opened) -> Loaded:
    model = opened.model
    return Loaded(
        revision=find_commit(opened.sources.model),
        dtype=str(model.encoder.input_dtype).removeprefix("torch."),
        image_processor=type(model.processor.image_processor).__name__,
    )


def _describe_noise(found: Analysis) -> Noise:
    detection, injected = found.detection, found.injected
    right, wrong = (int((found.verdicts == verdict).sum()) for verdict in (RIGHT, WRONG))
    return Noise(
        rate=detection.noise_rate,
        threshold=detection.threshold,
        borderline=int(detection.borderline.sum()),
        interval=detection.rate_interval,
        rate_is_bound=detection.rate_is_bound,
        abstains=detection.abstains,
        verified=Verified(right=right, wrong=wrong) if right or wrong else None,
        injected_auroc=detection.injected_auroc,
        injected_score_auroc=auroc(
            -np.concatenate(injected.kinds)[:, 1], -injected.reference[:, 1]
        ),
    )


def _describe_groups(options: AuditOptions, found: Analysis) -> Groups | None:
    if options.group_column is None:
        return None
    names, detection = found.beside.groups or [], found.detection
    of_row = np.array([names[row] for row in found.rows.positions.tolist()], dtype=object)
    table = []
    for group in detection.groups:
        here = of_row == group.group
        counts = {
            "rows": int(here.sum()),
            "flagged": int(detection.flag[here].sum()),
            "borderline": int(detection.borderline[here].sum()),
        }
        table.append(GroupFacts(**asdict(group) | counts))
    return Groups(
        column=options.group_column,
        smallest=SMALLEST_GROUP,
        other_rows=len(detection.flag) - sum(group.rows for group in table),
        table=table,
    )


def _describe_suggestions(options: AuditOptions, evidence: Evidence | None) -> Suggestions | None:
    if evidence is None:
        return None
    return Suggestions(
        count=int(evidence.suggested.sum()),
        expected_right=evidence.expected_right,
        least_probability=evidence.least_probability,
        least_margin=evidence.least_margin,
        vocabulary=_name_of(options.vocabulary),
    )


def _name_of(vocabulary: Path | Sequence[str] | None) -> str | None:
    if vocabulary is None:
        return None
    if isinstance(vocabulary, Path):
        return str(vocabulary)
    return f"{len(vocabulary):,} captions given"


def _describe_duplicates(evidence: Evidence) -> Duplicates:
    counts = evidence.describe_duplicates()
    return Duplicates(**{kind: DuplicateCounts(**counts[kind]) for kind in counts})


def _judge(wrong: np.ndarray, column: str, detection: Detection) -> Truth:
    """How much was found of the readable rows that are known to be wrong, ``(N,)`` booleans."""
    found = int((wrong & detection.flag).sum())
    figures: dict[str, float] = {}
    if 0 < wrong.sum() < len(wrong):
        suspicion = detection.suspicion
        top = np.argsort(-suspicion, kind="stable")[:20]
        figures = {
            "auroc": float(roc_auc_score(wrong, suspicion)),
            "average_precision": float(average_precision_score(wrong, suspicion)),
            "precision_at_20": float(wrong[top].mean()),
        }
    return Truth(
        column=column,
        misaligned=int(wrong.sum()),
        found=found,
        precision=found / int(detection.flag.sum()) if detection.flag.any() else None,
        recall=found / int(wrong.sum()) if wrong.any() else None,
        **figures,
    )


def _warn_of_likeness(found: Analysis) -> Iterator[str]:
    likeness = found.likeness
    if likeness and not likeness.is_alike:
        yield (
            "The pairs of the query are of another kind than the data (told apart with an AUROC of "
            f"{likeness.image:.2f} by their images, {likeness.text:.2f} by their captions). They "
            "do not say what right pairs look like here: the noise rate is judged without them."
        )


def _warn_of_groups(summary: Summary) -> Iterator[str]:
    groups = summary.groups.table if summary.groups else []
    named = [groups[number] for number in often_flagged(groups, summary.scored, summary.flagged)]
    if summary.groups and named:
        told = ", ".join(f"{group.group} ({group.flagged:,} of {group.rows:,})" for group in named)
        yield (
            f"By {summary.groups.column!r}, some groups are flagged more often than all others "
            f"together, beyond chance: {told}. Right pairs that the model knows less well look "
            "wrong to it: judge some rows of these groups before any of them goes."
        )


def _warnings(summary: Summary) -> Iterator[str]:
    if summary.groups and not summary.groups.table:
        yield (
            f"No group of {summary.groups.column!r} has {SMALLEST_GROUP} rows, so all rows "
            "are judged by one noise rate and threshold."
        )
    yield from _warn_of_groups(summary)
    if summary.noise.injected_score_auroc < 0.5:
        yield (
            "ecif_score is inverted here: wrong pairs made on purpose look valuable, not harmful. "
            "The model is far from an optimum on these data (see gradient_norm): fit it longer "
            "(`fit_epochs`), and rank by ecif_noise_probability or ecif_loo_loss meanwhile."
        )
    abstains = summary.noise.abstains is not None
    yield from tell(summary.findings, summary.scored, abstains=abstains)
    yield from filter(None, (solve.warning for solve in summary.solvers))
    if summary.scored < 200:
        yield (
            f"With {summary.scored} rows, the noise rate and the threshold are rough guesses; "
            "review the order of the rows rather than the flags."
        )
