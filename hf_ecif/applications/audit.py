"""An audit: read, fit, score, plant, detect, clean and report, in that order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.sources import Opened, Sources, describe_solves, open_sources
from hf_ecif.applications.trace import (
    Found,
    describe_errors_and_causes,
    describe_found,
    find_and_trace,
    write_traces,
)
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.audit_folder import RESULTS, SUMMARY, AuditFolder
from hf_ecif.data.cleaning import CleanResult, clean
from hf_ecif.data.columns import read_groups
from hf_ecif.data.schema import read_flags
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
    TraceFindings,
    TraceSummary,
    Truth,
)
from hf_ecif.detection.annotate import add_columns
from hf_ecif.detection.detect import SMALLEST_GROUP, Detection, auroc, detect
from hf_ecif.detection.injection import plant_pairs
from hf_ecif.detection.signals import Witnesses, witness_errors, witnesses_of
from hf_ecif.detection.suggestions import MARGIN, Evidence, find_evidence, read_vocabulary
from hf_ecif.errors import UserError
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.saving import find_commit
from hf_ecif.influence.scoring import Scores
from hf_ecif.reports.audit import write_report
from hf_ecif.reports.trace import write_trace_page
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.files import CHECKPOINTS
from hf_ecif.utils.progress import ProgressFactory, silent

FEWEST = 20  # rows to audit
TRACED = "retrieval-text"  # the errors that the report shows
SHOWN_TRACED = 8


@dataclass(frozen=True, kw_only=True)
class AuditRequest(Sources):
    """What to audit and where to put the result; the fields are the options of ``hf-ecif
    audit``."""

    output: Path
    truth_column: str | None = None
    group_column: str | None = None
    vocabulary: Path | None = None
    suggest: bool = True
    suggest_margin: float = MARGIN
    trace: int = 0
    overwrite: bool = False
    resume: bool = False


def run_audit(
    request: AuditRequest, config: InfluenceConfig, progress: ProgressFactory | None = None
) -> Summary:
    """Audit a data set and write scored, kept and removed rows, a summary and a report.

    Args:
        request: what and where.
        config: how.
        progress: makes progress bars.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: something in the request cannot be; nothing has been written then.
    """
    distributed.decide(lambda: _check_output(request))
    watch = _Stopwatch()
    with watch("load"):
        opened = open_sources(request, config)
        given = _read_given(request, opened.dataset)
        fingerprints = opened.fingerprints()
    manifest = config.deciding() | fingerprints | {"columns": request.columns}
    known = Checkpoints.open(request.output / CHECKPOINTS, manifest, resume=request.resume)
    try:
        found = _analyse(request, opened, given, known, watch, progress or silent)
    except UserError:  # to go on would lead to the same error
        known.clear()
        raise

    def write() -> Summary:
        with watch("write"):
            summary, scored = _write_rows(request, found)
        summary = summary.replace(
            fingerprints=fingerprints | {"config": config.fingerprint()}, seconds=watch.seconds()
        )
        if found.traced is not None:
            summary = summary.replace(trace=_write_traced(request, found, summary))
        folder = AuditFolder(request.output)
        write_report(scored, summary, folder.report)
        folder.finish(summary)
        known.clear()
        return summary

    return distributed.decide(write)


@dataclass(frozen=True)
class _Given:
    """What the user knows beside the pairs.

    Attributes:
        truth: ``(N,)``, which rows are wrong. The method never sees it.
        groups: the group of every row.
        vocabulary: captions to suggest.
    """

    truth: NDArray[np.bool_] | None
    groups: list[str | None] | None
    vocabulary: list[str] | None


@dataclass(frozen=True)
class _Found:
    """Everything that an audit finds out, before it is written."""

    opened: Opened
    given: _Given
    rows: Rows
    query: Rows
    fitted: Fitted
    scores: Scores
    scores_as_given: Scores
    witnesses: Witnesses
    reference: NDArray[np.float64]
    planted: list[NDArray[np.float64]]
    detection: Detection
    evidence: Evidence | None
    traced: Found | None


def _read_given(request: AuditRequest, dataset: Dataset) -> _Given:
    """Read early, so that a typo shows early."""
    truth, group, file = request.truth_column, request.group_column, request.vocabulary
    wrong = "is known to be wrong"
    return _Given(
        read_flags(dataset, truth, "--truth-column", wrong) if truth else None,
        read_groups(dataset, group) if group else None,
        read_vocabulary(file) if file else None,
    )


def _analyse(
    request: AuditRequest,
    opened: Opened,
    given: _Given,
    known: Checkpoints,
    watch: _Stopwatch,
    progress: ProgressFactory,
) -> _Found:
    """All of the computing; every process takes part."""
    model = opened.model
    with watch("embed"):
        rows, query = opened.read(progress, known)
    if len(rows) < FEWEST:
        raise UserError(
            f"{len(rows)} rows can be read, and an audit learns from the rows themselves what a "
            f"wrong one looks like: it takes at least {FEWEST}. Give more rows."
        )
    with watch("fit"):
        fitted = model.fit(rows, query, progress, known)
    with watch("score"):
        scores, as_given = model.score(rows, progress, known), model.score_as_given(rows)
    with watch("detect"):
        planting = known.within("planting")
        reference, planted = plant_pairs(model, rows, query, progress, planting)
        witnesses = witnesses_of(model, rows, scores)
        detection = detect(
            witnesses.stack(),
            reference,
            planted,
            errors=witness_errors(scores),
            groups=given.groups and [given.groups[row] for row in rows.positions.tolist()],
        )
    evidence = None
    if request.suggest:
        with watch("compare"):
            evidence = find_evidence(
                model,
                rows,
                detection,
                vocabulary=given.vocabulary,
                margin=request.suggest_margin,
                progress=progress,
            )
    traced = None
    if request.trace:
        with watch("trace"):
            traced = find_and_trace(
                model, rows, query, kind=TRACED, most=request.trace, progress=progress
            )
    return _Found(
        opened,
        given,
        rows,
        query,
        fitted,
        scores,
        as_given,
        witnesses,
        reference,
        planted,
        detection,
        evidence,
        traced,
    )


def _write_rows(request: AuditRequest, found: _Found) -> tuple[Summary, Dataset]:
    """Write scored, kept and removed rows; what is to be said of them, and the scored rows."""
    config = found.opened.model.config
    scored = add_columns(
        found.opened.plain,
        found.rows,
        found.scores,
        found.scores_as_given,
        found.witnesses,
        found.detection,
        config.relative,
        found.evidence,
    )
    result = clean(scored)
    folder = AuditFolder(request.output)
    folder.clear()  # only now that the new results are complete in memory
    folder.write_rows(result, scored)
    return _summarise(request, found, result), scored


def _write_traced(request: AuditRequest, found: _Found, summary: Summary) -> TraceFindings:
    """Write the pairs behind errors of the query, with a page; what the report says of them."""
    assert found.traced is not None
    traced, rows, query = found.traced, found.rows, found.query
    facts = dict(describe_found(traced, rows, query))
    errors = list(describe_errors_and_causes(traced, rows, query))
    write_traces(errors, request.output)
    of_audit = {
        name: getattr(summary, name)
        for name in TraceSummary.model_fields.keys() - facts.keys() - {"candidates"}
    }
    of_page = {"seconds": summary.seconds["trace"], "warnings": []}
    write_trace_page(
        errors,
        TraceSummary(**of_audit | facts | of_page),
        found.opened.dataset,
        found.opened.query_rows,
        AuditFolder(request.output).trace_page,
    )
    return TraceFindings(**facts, worst=errors[:SHOWN_TRACED])


# ------------------------------------------------------------------------------ before the run


def _check_output(request: AuditRequest) -> None:
    """Refuse a folder that holds what must not be lost."""
    output = request.output
    require_free(
        output,
        finished=SUMMARY,
        others=RESULTS,
        resume=request.resume,
        overwrite=request.overwrite,
    )
    if request.trace and request.query is None:
        raise UserError("--trace looks for errors in the query: give one (--query).")
    inside = [
        source
        for source in (request.dataset, request.query, request.model)
        if source and output.resolve() in (Path(source).resolve(), *Path(source).resolve().parents)
    ]
    if inside:
        raise UserError(
            f"--output {output} holds the input {inside[0]}, which the results would replace. Give "
            "another folder."
        )


# ------------------------------------------------------------------------------- what was found


def _summarise(request: AuditRequest, found: _Found, result: CleanResult) -> Summary:
    """What was found, without times and fingerprints."""
    opened, rows, detection, fitted = found.opened, found.rows, found.detection, found.fitted
    evidence, truth = found.evidence, found.given.truth
    summary = Summary(
        **opened.provenance(
            rows,
            found.query,
            loss_before_fit=fitted.query_loss_before,
            loss=fitted.query_loss,
            alignment=fitted.alignment,
        ),
        unreadable_reasons=dict(Counter(rows.reasons.values())),
        flagged=int(detection.flag.sum()),
        kept=len(result.kept),
        removed=len(result.removed),
        noise=_describe_noise(detection, found.reference, found.planted),
        groups=_describe_groups(request, detection),
        suggestions=_describe_suggestions(request, evidence),
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
        else _judge(truth[rows.positions.numpy()], str(request.truth_column), detection),
    )
    return summary.replace(warnings=[*_warnings(summary), *opened.warnings(rows, found.query)])


def _describe_loading(opened: Opened) -> Loaded:
    model = opened.model
    return Loaded(
        revision=find_commit(opened.sources.model),
        dtype=str(model.encoder.input_dtype).removeprefix("torch."),
        image_processor=type(model.processor.image_processor).__name__,
    )


def _describe_noise(
    detection: Detection, reference: np.ndarray, injected: Sequence[np.ndarray]
) -> Noise:
    return Noise(
        rate=detection.noise_rate,
        threshold=detection.threshold,
        borderline=int(detection.borderline.sum()),
        injected_auroc=detection.planted_auroc,
        injected_score_auroc=auroc(-np.concatenate(injected)[:, 1], -reference[:, 1]),
    )


def _describe_groups(request: AuditRequest, detection: Detection) -> Groups | None:
    if request.group_column is None:
        return None
    return Groups(
        column=request.group_column,
        smallest=SMALLEST_GROUP,
        other_rows=len(detection.flag) - sum(group.rows for group in detection.groups),
        table=[GroupFacts(**asdict(group)) for group in detection.groups],
    )


def _describe_suggestions(request: AuditRequest, evidence: Evidence | None) -> Suggestions | None:
    if evidence is None:
        return None
    return Suggestions(
        count=int(evidence.suggested.sum()),
        least_margin=evidence.least_margin,
        vocabulary=str(request.vocabulary) if request.vocabulary else None,
    )


def _describe_duplicates(evidence: Evidence) -> Duplicates:
    counts = evidence.describe_duplicates()
    return Duplicates(**{kind: DuplicateCounts(**counts[kind]) for kind in counts})


def _judge(wrong: np.ndarray, column: str, detection: Detection) -> Truth:
    """How much was found of the readable rows that are known to be wrong, ``(N,)`` booleans."""
    found = int((wrong & detection.flag).sum())
    figures: dict[str, float] = {}
    if 0 < wrong.sum() < len(wrong):
        probability = detection.probability
        top = np.argsort(-probability, kind="stable")[:20]
        figures = {
            "auroc": float(roc_auc_score(wrong, probability)),
            "average_precision": float(average_precision_score(wrong, probability)),
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
            "(--fit-epochs), and rank by ecif_noise_probability or ecif_loo_loss meanwhile."
        )
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
