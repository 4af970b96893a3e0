"""An audit: read, fit, score, inject mismatches, detect, and tell, in that order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import PreTrainedModel

from hf_ecif.applications.given import MOST_STREAMED, Rowset, open_given
from hf_ecif.applications.outputs import require_free, require_outside
from hf_ecif.applications.requests import AuditOptions, AuditRequest
from hf_ecif.applications.result import Audit, Traced
from hf_ecif.applications.sources import Learning, Opened, describe_solves, open_sources
from hf_ecif.applications.trace import (
    Found,
    describe_errors_and_causes,
    describe_found,
    find_and_trace,
)
from hf_ecif.config import SUGGEST_PROBABILITY, DetectionConfig, InfluenceConfig
from hf_ecif.data.audit_folder import RESULTS, SUMMARY, AuditFolder
from hf_ecif.data.columns import read_groups
from hf_ecif.data.schema import drop_influence_columns, read_flags, read_verdicts
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
    TraceFacts,
    TraceFindings,
    TraceSummary,
    Truth,
    Verified,
)
from hf_ecif.detection.annotate import add_columns
from hf_ecif.detection.detect import (
    RIGHT,
    SMALLEST_GROUP,
    UNKNOWN,
    WRONG,
    Detection,
    Verdicts,
    auroc,
    detect,
)
from hf_ecif.detection.findings import Findings, find_findings, settle, tell
from hf_ecif.detection.injection import Injected, inject_mismatches
from hf_ecif.detection.signals import Signals, signal_errors, signals_of_rows
from hf_ecif.detection.suggestions import Evidence, find_evidence, read_vocabulary
from hf_ecif.detection.verified import Likeness, compare, find_shift
from hf_ecif.errors import UserError
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.pairs import Pairs, distinct_pairs, join_near_images
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.saving import find_commit
from hf_ecif.influence.scoring import Scores
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.files import CHECKPOINTS
from hf_ecif.utils.progress import ProgressFactory, silent, tqdm_bars

FEWEST = 20  # rows to audit
TRACED = "retrieval-text"  # the errors that the report shows
SHOWN_TRACED = 8


def audit(
    model: InfluenceModel | PreTrainedModel | str | Path,
    dataset: Rowset,
    query: Rowset | None = None,
    *,
    split: str | None = None,
    query_split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    processor: Any = None,
    config: InfluenceConfig | None = None,
    truth_column: str | None = None,
    verified_column: str | None = None,
    group_column: str | None = None,
    vocabulary: str | Path | Sequence[str] | None = None,
    suggest: bool = True,
    suggest_probability: float = SUGGEST_PROBABILITY,
    suggest_margin: float = 0.0,
    trace: int = 0,
    detection: DetectionConfig | None = None,
    max_rows: int = MOST_STREAMED,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressFactory = tqdm_bars,
) -> Audit:
    """Find the pairs that look wrong, and what each pair does to a model.

    Args:
        model: a CLIP-like model: loaded, a name on the Hub, a folder, or an `InfluenceModel`.
        dataset: image-text pairs: a `Dataset`, a `DatasetDict` (with ``split``), an
            `IterableDataset`, a name on the Hub, or a folder.
        query: clean pairs like those that the model is for, in any of these forms. Chosen from
            the data if absent.
        split: of ``dataset``, where it has several; ``train`` if absent.
        query_split: of ``query``; ``validation`` if absent.
        image_column: of images, their bytes or their paths; found by its type if absent.
        text_column: of the captions; likewise.
        processor: what AutoProcessor loads for ``model``, where that is loaded.
        config: how influence is computed.
        truth_column: boolean, true of rows that are known to be wrong. Read after the detection
            alone, to tell how much it found.
        verified_column: boolean, true of rows that are known to be right, false of wrong ones, null
            of all others. The detection builds on it.
        group_column: of names, a language for instance. Groups of fifty rows or more get a noise
            rate and a threshold of their own.
        vocabulary: captions to suggest, or a file with one on each line. Those of rows that are
            not flagged, if absent.
        suggest: whether all rows are compared with each other, for better captions and
            duplicates; that takes the square of their number in time, not in memory.
        suggest_probability: a caption is suggested if it is right with this probability; 0 asks
            for none, where too few rows tell it.
        suggest_margin: and if its logit stands that far above the next, in
            nats.
        trace: errors of the query to trace to the pairs behind them, the worst first.
        detection: how it is learned what a wrong pair looks like.
        max_rows: to read of an `IterableDataset`.
        output: where `Audit.save` writes the result, if anywhere.
        overwrite: whether an earlier audit in ``output`` is replaced.
        progress: makes progress bars; these are hidden by ``datasets.disable_progress_bars()``.

    Returns:
        The rows with their influence columns, what was found, and the ways on from there.

    Raises:
        UserError: something given cannot be used; it says what, and what to do.

    Example:
        >>> audit = hf_ecif.audit("openai/clip-vit-base-patch32", pairs)  # doctest: +SKIP
        >>> audit.dataset.filter(lambda row: row["ecif_flag"])  # doctest: +SKIP
    """
    options = AuditOptions(
        truth_column=truth_column,
        verified_column=verified_column,
        group_column=group_column,
        vocabulary=Path(vocabulary) if isinstance(vocabulary, str) else vocabulary,
        suggest=suggest,
        suggest_probability=suggest_probability,
        suggest_margin=suggest_margin,
        trace=trace,
        detection=detection or DetectionConfig(),
    )
    folder = Path(output).expanduser() if output is not None else None
    if folder is not None:
        distributed.decide(lambda: _require_free(folder, overwrite=overwrite))
        named = [given for given in (model, dataset, query) if isinstance(given, str | Path)]
        require_outside(folder, named)
    watch = _Stopwatch()
    with watch("load"):
        given = open_given(
            model,
            dataset,
            query,
            split=split,
            query_split=query_split,
            image_column=image_column,
            text_column=text_column,
            processor=processor,
            config=config,
            max_rows=max_rows,
        )
        beside = _read_beside(options, given.opened)
        fingerprints = given.opened.fingerprints()
    found = _analyse(options, given.opened, beside, Checkpoints(), watch, progress)
    result = _conclude(options, found, fingerprints, watch, given.original, given.notes)
    if folder is not None:
        distributed.decide(lambda: result.save(folder, overwrite=overwrite))
    return result


def run_audit(
    request: AuditRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> Summary:
    """Audit a data set and write scored, kept and removed rows, a summary and a report.

    Unlike `audit`, it can be interrupted at any time and goes on where it was.

    Args:
        request: what and where.
        config: how.
        progress: makes progress bars.

    Returns:
        What ``summary.json`` holds.

    Raises:
        UserError: something in the request cannot be; nothing has been written then.
    """
    distributed.decide(lambda: _check_output(request))
    watch = _Stopwatch()
    with watch("load"):
        opened = open_sources(request, config)
        beside = _read_beside(request, opened)
        fingerprints = opened.fingerprints()
    settings = config.deciding() | request.detection.deciding()
    manifest = settings | fingerprints | {"columns": request.columns}
    known = Checkpoints.open(request.output / CHECKPOINTS, manifest, resume=request.resume)
    try:
        found = _analyse(request, opened, beside, known, watch, progress)
    except UserError:  # to go on would lead to the same error
        known.clear()
        raise

    def write() -> Summary:
        result = _conclude(request, found, fingerprints, watch, opened.dataset)
        result.write(AuditFolder(request.output))
        known.clear()
        return result.summary

    return distributed.decide(write)


@dataclass(frozen=True)
class _Beside:
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
class _Found:
    """Everything that an audit finds out."""

    opened: Opened
    beside: _Beside
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


def _read_beside(options: AuditOptions, opened: Opened) -> _Beside:
    """Read early, so that a typo shows early.

    Raises:
        UserError: a column or a file is missing, or holds something else; or errors are to be
            traced of a query that is chosen from the data.
    """
    if options.trace and opened.query_set is None:
        raise UserError("`trace` looks for errors in the query: give one (`query`).")
    truth, group, words = options.truth_column, options.group_column, options.vocabulary
    wrong, verified = "is known to be wrong", options.verified_column
    return _Beside(
        read_flags(opened.dataset, truth, "truth_column", wrong) if truth else None,
        read_verdicts(opened.dataset, verified, "verified_column") if verified else None,
        read_groups(opened.dataset, group) if group else None,
        read_vocabulary(words) if isinstance(words, Path) else list(words or []) or None,
    )


def _analyse(
    options: AuditOptions,
    opened: Opened,
    beside: _Beside,
    known: Checkpoints,
    watch: _Stopwatch,
    progress: ProgressFactory,
) -> _Found:
    """All of the computing; every process takes part."""
    model = opened.model
    with watch("embed"):
        data, query, learning = opened.read_with_verified(progress, known)
        given = model.embed_as_given(data)
        findings = find_findings(data, given)
        advance = progress("Compare images", len(data))
        data = join_near_images(data, given.image, advance)
    pairs = distinct_pairs(data)
    rows = pairs.rows
    if len(rows) < FEWEST:
        what = "rows" if len(rows) == len(data) else "different pairs"
        raise UserError(
            f"{len(rows)} {what} can be read, and an audit learns from the rows themselves what a "
            f"wrong one looks like: it takes at least {FEWEST}. Give more rows."
        )
    with watch("fit"):
        influence = model.fit(rows, query, progress, known)
    with watch("score"):
        scores, as_given = influence.scores(rows, progress, known), model.score_as_given(rows)
    with watch("detect"):
        within = known.within("injection")
        learning = _distinct(learning, data, pairs)
        mute = torch.zeros(len(learning.rows), dtype=torch.bool)
        mute[: len(rows)] = findings.mute[pairs.first]
        likeness = _compare(model, rows, learning)
        if likeness and not likeness.is_alike:
            learning = Learning(rows, query)
        injected = inject_mismatches(
            model,
            influence,
            learning.query,
            progress,
            within,
            options.detection,
            learning.rows,
            mute[: len(learning.rows)],
        )
        signals = signals_of_rows(model, rows, scores, mute[: len(rows)])
        verdicts = _verdicts(beside, data, pairs, learning)
        detection = detect(
            signals.stack(),
            injected.reference,
            injected.kinds,
            verdicts=verdicts[: len(rows)],
            reference_verdicts=verdicts[injected.rows],
            errors=signal_errors(scores),
            groups=beside.groups and [beside.groups[row] for row in rows.positions.tolist()],
            images=rows.keys.images.numpy(),
            mute=mute[: len(rows)].numpy(),
        )
        detection = _look_for_shift(detection, model, data)
    # From here on, every row counts: copies share what is known of their pair.
    scores, as_given = pairs.spread(scores), pairs.spread(as_given)
    signals = pairs.spread(signals)
    of_rows = verdicts[pairs.number.numpy()]
    detection = settle(pairs.spread(detection), findings, of_rows)
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
    return _Found(
        opened,
        beside,
        data,
        query,
        findings,
        influence,
        scores,
        as_given,
        signals,
        injected,
        verdicts,
        likeness,
        detection,
        evidence,
        traced,
    )


def _distinct(learning: Learning, data: Rows, pairs: Pairs) -> Learning:
    """What a detector learns from, with distinct pairs in place of the rows of the data."""
    more = len(learning.rows) - len(data)
    if not more:
        return learning._replace(rows=pairs.rows)
    keys = learning.rows.keys.images.clone()
    keys[: len(data)] = data.keys.images
    chosen = torch.cat([pairs.first, torch.arange(len(data), len(learning.rows))])
    return learning._replace(rows=learning.rows.with_images(keys).select(chosen))


def _compare(model: InfluenceModel, rows: Rows, learning: Learning) -> Likeness | None:
    """How like the data the verified half of the query is; None where there is no such half."""
    if learning.rows is rows:
        return None
    verified = learning.rows.select(torch.arange(len(rows), len(learning.rows)))
    return compare(model.embed_as_given(verified), model.embed_as_given(rows))


def _verdicts(beside: _Beside, data: Rows, pairs: Pairs, learning: Learning) -> Verdicts:
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


def _conclude(
    options: AuditOptions,
    found: _Found,
    fingerprints: dict[str, str],
    watch: _Stopwatch,
    dataset: Dataset,
    notes: Sequence[str] = (),
) -> Audit:
    """What was found, as columns of the data set and in figures."""
    config = found.opened.model.config
    scored = add_columns(
        drop_influence_columns(dataset),
        found.rows,
        found.scores,
        found.scores_as_given,
        found.signals,
        found.detection,
        config.relative,
        found.evidence,
        found.findings,
    )
    summary = _summarise(options, found, notes).replace(
        fingerprints=fingerprints
        | {"config": config.fingerprint(), "detection": options.detection.fingerprint()},
        seconds=watch.seconds(),
    )
    if found.traced is None:
        return Audit(scored, summary)
    traced = _describe_traced(found, found.traced, summary)
    findings = TraceFindings(
        **{name: getattr(traced.summary, name) for name in TraceFacts.model_fields},
        worst=list(traced.errors[:SHOWN_TRACED]),
    )
    return Audit(scored, summary.replace(trace=findings), traced)


def _describe_traced(found: _Found, traced: Found, summary: Summary) -> Traced:
    """The traced errors with a summary of their own: that of the audit, as far as it is theirs."""
    shared = TraceSummary.model_fields.keys() & Summary.model_fields.keys()
    facts = {name: getattr(summary, name) for name in shared}
    facts |= dict(describe_found(traced, found.influence.rows, found.query))
    facts |= {"seconds": summary.seconds["trace"], "warnings": []}
    errors = list(describe_errors_and_causes(traced, found.influence.rows, found.query))
    return Traced(errors, TraceSummary(**facts), found.opened.query_rows)


# ------------------------------------------------------------------------------ before the run


def _check_output(request: AuditRequest) -> None:
    """Refuse a folder that holds what must not be lost."""
    _require_free(request.output, resume=request.resume, overwrite=request.overwrite)
    named = (request.dataset, request.query, request.model)
    require_outside(request.output, [source for source in named if source])


def _require_free(output: Path, *, resume: bool = False, overwrite: bool) -> None:
    require_free(output, finished=SUMMARY, others=RESULTS, resume=resume, overwrite=overwrite)


# ------------------------------------------------------------------------------- what was found


def _summarise(options: AuditOptions, found: _Found, notes: Sequence[str]) -> Summary:
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


def _describe_noise(found: _Found) -> Noise:
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


def _describe_groups(options: AuditOptions, found: _Found) -> Groups | None:
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


def _warn_of_likeness(found: _Found) -> Iterator[str]:
    likeness = found.likeness
    if likeness and not likeness.is_alike:
        yield (
            "The pairs of the query are of another kind than the data (told apart with an AUROC of "
            f"{likeness.image:.2f} by their images, {likeness.text:.2f} by their captions). They "
            "do not say what right pairs look like here: the noise rate is judged without them."
        )


def _warnings(summary: Summary) -> Iterator[str]:
    if summary.groups and not summary.groups.table:
        yield (
            f"No group of {summary.groups.column!r} has {SMALLEST_GROUP} rows, so all rows "
            "are judged by one noise rate and threshold."
        )
    if summary.noise.injected_score_auroc < 0.5:
        yield (
            "ecif_score is inverted here: wrong pairs made on purpose look valuable, not harmful. "
            "The model is far from an optimum on these data (see gradient_norm): fit it longer "
            "(`fit_epochs`), and rank by ecif_noise_probability or ecif_loo_loss meanwhile."
        )
    yield from tell(summary.findings)
    yield from filter(None, (solve.warning for solve in summary.solvers))
    if summary.scored < 200:
        yield (
            f"With {summary.scored} rows, the noise rate and the threshold are rough guesses; "
            "review the order of the rows rather than the flags."
        )


# ---------------------------------------------------------------------------------- the clock


@dataclass
class _Stopwatch:
    """Seconds per stage."""

    start: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[stage] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        stages = self.stages | {"total": time.perf_counter() - self.start}
        return {stage: round(seconds, 2) for stage, seconds in stages.items()}
