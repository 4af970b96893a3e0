"""What an audit computes: read, fit, score, inject mismatches, detect, compare, in that order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif.applications.requests import AuditOptions
from hf_ecif.applications.sources import Learning, Opened
from hf_ecif.applications.trace import (
    Found,
    find_and_trace,
)
from hf_ecif.data.columns import read_groups
from hf_ecif.data.schema import read_flags
from hf_ecif.data.schema import read_verdicts as read_verified
from hf_ecif.data.verdicts import read_verdicts, to_marks
from hf_ecif.detection.detect import (
    RIGHT,
    UNKNOWN,
    Detection,
    Verdicts,
    detect,
)
from hf_ecif.detection.explain import Ranks
from hf_ecif.detection.findings import Findings, find_findings, settle
from hf_ecif.detection.injection import Injected, inject_mismatches
from hf_ecif.detection.judging import Assessed, Learned, Sample
from hf_ecif.detection.known_findings import KnownFindings
from hf_ecif.detection.signals import TRUST, Known, Signals, signal_errors, signals_of_rows
from hf_ecif.detection.suggestions import Evidence, find_evidence, read_vocabulary
from hf_ecif.detection.verified import Likeness, compare, find_shift
from hf_ecif.errors import UserError
from hf_ecif.influence.contexts import Contexts
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.pairs import Pairs, distinct_pairs, join_near_images, least_cosine
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory
from hf_ecif.utils.seeds import stream
from hf_ecif.utils.stopwatch import Stopwatch

FEWEST = 20  # rows to audit
TRACED = "retrieval-text"  # the errors that the report shows


@dataclass(frozen=True)
class Beside:
    """What the user knows beside the pairs.

    Attributes:
        truth: ``(N,)``, which rows are wrong. The method never sees it.
        verdicts: ``(N,)``, which rows are verified to be right or wrong; the method builds on it.
        groups: the group of every row.
        vocabulary: captions to suggest.
    """

    truth: NDArray[np.bool_] | None
    verdicts: Verdicts | None
    groups: list[str | None] | None
    vocabulary: list[str] | None


@dataclass(frozen=True)
class Analysis:
    """Everything that an audit finds out of the rows that it learns from.

    Attributes:
        sample: ``(m,)``, ascending, their numbers where they are not all rows; None where they are.
        learned: what judges other rows alike.
        group_column: name of the column of groups, where there are groups.
    """

    opened: Opened
    beside: Beside
    rows: Rows
    query: Rows
    findings: Findings
    influence: Influence
    scores: Scores
    scores_as_given: Scores
    signals: Signals
    injected: Injected
    verdicts: Verdicts
    likeness: Likeness | None
    detection: Detection
    evidence: Evidence | None
    traced: Found | None
    sample: Tensor | None
    learned: Learned
    group_column: str | None


def read_beside(options: AuditOptions, opened: Opened) -> Beside:
    """Read early, so that a typo shows early.

    Raises:
        UserError: a column or a file is missing, or holds something else; or errors are to be
            traced of a query that is chosen from the data.
    """
    if options.trace and opened.query_set is None:
        raise UserError("`trace` looks for errors in the query: give one (`query`).")
    truth, group, words = options.truth_column, options.group_column, options.vocabulary
    return Beside(
        read_flags(opened.dataset, truth, "truth_column", "is known to be wrong")
        if truth
        else None,
        _read_known(options, opened),
        read_groups(opened.dataset, group) if group else None,
        read_vocabulary(words) if isinstance(words, Path) else list(words or []) or None,
    )


def _read_known(options: AuditOptions, opened: Opened) -> Verdicts | None:
    """What is known of the rows, by a column and by verdicts of a person, who has the last word."""
    column, path, dataset = options.verified_column, options.verdicts, opened.dataset
    known = read_verified(dataset, column, "verified_column") if column else None
    if path is None:
        return known
    captions = dataset[opened.like.columns.text][:]
    judged = to_marks(read_verdicts(path, len(dataset), captions), len(dataset))
    return judged if known is None else np.where(judged != UNKNOWN, judged, known)


def analyse(
    options: AuditOptions,
    opened: Opened,
    beside: Beside,
    known: Checkpoints,
    watch: Stopwatch,
    progress: ProgressFactory,
) -> Analysis:
    """Everything that an audit computes of the rows that it learns from; all processes take part.

    Copies are scored once. What is found of a pair is said of all of its rows.
    """
    model = opened.model
    sample = choose_sample(beside.verdicts, len(opened.dataset), options, model.config.seed)
    with watch("embed"):
        data, query, learning = opened.read_with_verified(progress, known, sample)
        findings = find_findings(data, model.embed_as_given(data))
        known_findings = KnownFindings.learn(findings, data)
        advance = progress("Compare images", len(data))
        least = least_cosine(data, model.embed_as_given(data).image)
        data = join_near_images(data, model.embed_as_given(data).image, advance)
    pairs = _require_enough(distinct_pairs(data), data)
    with watch("fit"):
        influence = model.fit(pairs.rows, query, progress, known)
    with watch("score"):
        scores = influence.scores(pairs.rows, progress, known)
        as_given = model.score_as_given(pairs.rows)
    with watch("detect"):
        learning, likeness = _trust(model, pairs.rows, query, _distinct(learning, data, pairs))
        verdicts = _verdicts(beside, data, pairs, learning)
        mute = torch.zeros(len(learning.rows), dtype=torch.bool)
        mute[: len(pairs.rows)] = findings.mute[pairs.first]
        _require_saying(mute[: len(pairs.rows)])
        injected = inject_mismatches(
            model,
            influence,
            learning.query,
            progress,
            known.within("injection"),
            options.detection,
            learning.rows,
            mute,
        )
        _require_injected(injected)
        signals, of_pairs = _detect(model, pairs.rows, scores, injected, verdicts, beside, mute)
        of_pairs = _look_for_shift(of_pairs, model, data)
        contexts = Contexts.draw(pairs.rows, model.config)
    detection = settle(pairs.spread(of_pairs), findings, verdicts[pairs.number.numpy()])
    evidence = None
    if options.suggest:
        with watch("compare"):
            evidence = find_evidence(
                model,
                data,
                detection,
                vocabulary=beside.vocabulary,
                margin=options.suggest_margin,
                probability=options.suggest_probability,
                seed=model.config.seed,
                mute=findings.mute,
            )
    traced = None
    if options.trace:
        with watch("trace"):
            traced = find_and_trace(
                influence, query, kind=TRACED, most=options.trace, progress=progress
            )
    given = model.embed_as_given(pairs.rows)
    learned = Learned(
        influence=influence,
        contexts=contexts,
        sample=Sample(
            known=Known(given, pairs.rows.siblings, mute[: len(pairs.rows)]),
            assessed=Assessed(scores, as_given, signals, replace(of_pairs, groups=())),
            verdicts=verdicts[: len(pairs.rows)],
        ),
        findings=known_findings,
        suggester=None if evidence is None else evidence.suggester,
        ranks=Ranks.of(pairs.spread(scores), pairs.spread(signals)),
        least_cosine=least,
    )
    return Analysis(
        opened=opened,
        beside=beside,
        rows=data,
        query=query,
        findings=findings,
        influence=influence,
        scores=pairs.spread(scores),
        scores_as_given=pairs.spread(as_given),
        signals=pairs.spread(signals),
        injected=injected,
        verdicts=verdicts,
        likeness=likeness,
        detection=detection,
        evidence=evidence,
        traced=traced,
        sample=sample,
        learned=learned,
        group_column=options.group_column,
    )


def choose_sample(
    verdicts: Verdicts | None, count: int, options: AuditOptions, seed: int
) -> Tensor | None:
    """Numbers ``(m,)`` of the rows to learn from, ascending; None for all.

    Rows with a verdict come first, but are no more than half of a sample.

    Args:
        verdicts: ``(N,)``, what is known of the rows; None where nothing is.
        count: ``N``, rows of the data.
        options: how many to learn from.
        seed: of the run.
    """
    most = options.learn_rows
    if count <= most:
        return None
    order = torch.randperm(count, generator=stream(seed, "sample"))
    if verdicts is None:
        return order[:most].sort().values
    known = torch.from_numpy(verdicts != UNKNOWN)[order]
    first = order[known][: most // 2]
    return torch.cat([first, order[~known][: most - len(first)]]).sort().values


def _require_enough(pairs: Pairs, data: Rows) -> Pairs:
    """The same pairs, if there are enough of them to audit."""
    if len(pairs.rows) < FEWEST:
        what = "rows" if len(pairs.rows) == len(data) else "different pairs"
        raise UserError(
            f"{len(pairs.rows)} {what} can be read, and an audit learns from the rows themselves "
            f"what a wrong one looks like: it takes at least {FEWEST}. Give more rows."
        )
    return pairs


def _require_saying(mute: Tensor) -> None:
    """Refuse pairs of which none says anything that a detector could learn from.

    Raises:
        UserError: that is so.
    """
    if (~mute).sum() < 2:
        raise UserError(
            "No caption says anything of its image: they are file names, addresses or numbers, the "
            "same on many images, or in a script that the model cannot read. Look at "
            "`text_column`, or give other captions."
        )


def _require_injected(injected: Injected) -> None:
    """Refuse pairs among which no captions could be exchanged on purpose.

    Raises:
        UserError: that is so.
    """
    if sum(map(len, injected.kinds)) < 2:
        raise UserError(
            "Hardly any caption can be exchanged with one of another image: to the model, nearly "
            "all images, or all captions, are the same. Look at `image_column` and `text_column`, "
            "or give pairs that differ more."
        )


def _detect(
    model: InfluenceModel,
    rows: Rows,
    scores: Scores,
    injected: Injected,
    verdicts: Verdicts,
    beside: Beside,
    mute: Tensor,
) -> tuple[Signals, Detection]:
    """Signals of distinct pairs, and what they say in the light of the injected mismatches."""
    count, groups = len(rows), beside.groups
    signals = signals_of_rows(model, rows, scores, mute[:count])
    detection = detect(
        signals.stack(),
        injected.reference,
        injected.kinds,
        verdicts=verdicts[:count],
        reference_verdicts=verdicts[injected.rows],
        errors=signal_errors(scores),
        groups=groups and [groups[row] for row in rows.positions.tolist()],
        images=rows.keys.images.numpy(),
        mute=mute[:count].numpy(),
        trust=TRUST,
        exchanged=injected.exchanged,
    )
    return signals, detection


def _distinct(learning: Learning, data: Rows, pairs: Pairs) -> Learning:
    """What a detector learns from, with distinct pairs in place of the rows of the data."""
    more = len(learning.rows) - len(data)
    if not more:
        return learning._replace(rows=pairs.rows)
    keys = learning.rows.keys.images.clone()
    keys[: len(data)] = data.keys.images
    chosen = torch.cat([pairs.first, torch.arange(len(data), len(learning.rows))])
    return learning._replace(rows=learning.rows.with_images(keys).select(chosen))


def _trust(
    model: InfluenceModel, rows: Rows, query: Rows, learning: Learning
) -> tuple[Learning, Likeness | None]:
    """What to learn from, and how like the data the verified half of the query is.

    Where it is of another kind than the data, nothing is learned from it; without such a half,
    there is no likeness.
    """
    if len(learning.rows) == len(rows):
        return learning, None
    verified = learning.rows.select(torch.arange(len(rows), len(learning.rows)))
    likeness = compare(model.embed_as_given(verified), model.embed_as_given(rows))
    return (learning if likeness.is_alike else Learning(rows, query)), likeness


def _verdicts(beside: Beside, data: Rows, pairs: Pairs, learning: Learning) -> Verdicts:
    """What is known of the pairs, and of the verified rows that are learned from after them."""
    verdicts = np.full(len(learning.rows), RIGHT)
    verdicts[: len(pairs.rows)] = UNKNOWN
    if beside.verdicts is not None:
        of_rows = beside.verdicts[data.positions.numpy()]
        verdicts[pairs.number.numpy()[of_rows != UNKNOWN]] = of_rows[of_rows != UNKNOWN]
    return verdicts


def _look_for_shift(detection: Detection, model: InfluenceModel, rows: Rows) -> Detection:
    """Where it abstains because captions and images are out of step, it says by how many rows."""
    shift = find_shift(model.embed_as_given(rows)) if detection.abstains else 0
    if not shift:
        return detection
    where = f"{abs(shift)} {'row' if abs(shift) == 1 else 'rows'} {'on' if shift > 0 else 'back'}"
    reason = (
        f"The captions are out of step with the images: those {where} fit far better than their "
        "own. Line them up, and audit again."
    )
    return replace(detection, abstains=reason)
