"""What an audit found, in figures and in words: its `Summary`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_ecif.applications.analysis import Analysis
from hf_ecif.applications.judged import GroupCounts, JudgedRows
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
from hf_ecif.detection.signals import PLACE
from hf_ecif.detection.suggestions import Evidence
from hf_ecif.influence.saving import find_commit
from hf_ecif.utils.formatting import Bools, Floats


def summarise(
    options: AuditOptions,
    found: Analysis,
    notes: Sequence[str],
    judged: JudgedRows | None = None,
) -> Summary:
    """What was found, without times and fingerprints.

    Args:
        options: of the audit.
        found: what was found of the rows that it learned from.
        notes: further warnings.
        judged: verdicts on all rows, where it learned from some of them alone.
    """
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
        groups=_describe_groups(options, found, judged),
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
        else _judge(
            truth[rows.positions.numpy()],
            str(options.truth_column),
            detection.flag,
            detection.suspicion,
        ),
    )
    if judged is not None:
        summary = summary.replace(**_of_all_rows(options, summary, found, judged))
    warnings = [
        *_warn_of_likeness(found),
        *_warnings(summary),
        *opened.warnings(rows, found.query),
        *notes,
    ]
    return summary.replace(warnings=warnings)


def _of_all_rows(
    options: AuditOptions, sample: Summary, found: Analysis, judged: JudgedRows
) -> dict[str, Any]:
    """What of a summary is of all rows, where it was learned from some of them alone."""
    unreadable, truth = sum(judged.unreadable.values()), None
    if found.beside.truth is not None:
        flag, suspicion, rows = judged.flags_and_suspicion()
        truth = _judge(found.beside.truth[rows], str(options.truth_column), flag, suspicion)
    suggestions = sample.suggestions and sample.suggestions.replace(
        count=judged.suggested, expected_right=judged.expected_right
    )
    return {
        "learned_from": sample.scored,
        "scored": judged.scored,
        "unreadable": unreadable,
        "unreadable_reasons": judged.unreadable,
        "findings": judged.findings,
        "flagged": judged.flagged,
        "kept": judged.scored - judged.flagged,
        "removed": judged.flagged + unreadable,
        "noise": sample.noise.replace(borderline=judged.borderline),
        "suggestions": suggestions,
        "duplicates": judged.duplicates,
        "truth": truth,
    }


def _describe_loading(opened: Opened) -> Loaded:
    model, processor = opened.model, opened.model.processor
    return Loaded(
        revision=find_commit(opened.sources.model),
        dtype=str(model.encoder.input_dtype).removeprefix("torch."),
        image_processor=type(getattr(processor, "image_processor", processor)).__name__,
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
            np.concatenate(injected.kinds)[:, PLACE["relative"]],
            injected.reference[:, PLACE["relative"]],
        ),
    )


def _describe_groups(
    options: AuditOptions, found: Analysis, judged: JudgedRows | None
) -> Groups | None:
    if options.group_column is None:
        return None
    if judged is not None:
        return _describe_judged_groups(options.group_column, found.detection, judged)
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


def _describe_judged_groups(column: str, detection: Detection, judged: JudgedRows) -> Groups:
    """The groups of the sample that have a rate of their own, with the counts of all rows."""
    table = [
        GroupFacts(**asdict(group) | asdict(judged.groups.get(group.group, GroupCounts())))
        for group in detection.groups
    ]
    return Groups(
        column=column,
        smallest=SMALLEST_GROUP,
        other_rows=judged.scored - sum(group.rows for group in table),
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


def _judge(wrong: Bools, column: str, flag: Bools, suspicion: Floats) -> Truth:
    """How much was found of the readable rows that are known to be wrong, ``(N,)`` booleans."""
    found = int((wrong & flag).sum())
    figures: dict[str, float] = {}
    if 0 < wrong.sum() < len(wrong):
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
        precision=found / int(flag.sum()) if flag.any() else None,
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
            "wrong to it: judge some rows of these groups before you remove any of them."
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
