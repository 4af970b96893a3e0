"""An audit: read, fit, score, plant, detect, clean and report, in that order."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_ecif.applications.sources import Opened, Sources, open_sources
from hf_ecif.applications.trace import (
    Found,
    describe_errors_and_causes,
    describe_found,
    find_and_trace,
    write_traces,
)
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.cleaning import CleanResult, clean
from hf_ecif.data.columns import read_groups
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.schema import read_flags
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
from hf_ecif.utils.files import CHECKPOINTS, require_writable, write_json
from hf_ecif.utils.progress import ProgressFactory, silent

FEWEST = 20  # rows to audit
TRACED = "retrieval-text"  # the errors that the report shows
SHOWN_TRACED = 8
RESULTS = (
    "scored",
    "kept",
    "removed",
    "summary.json",
    "report.html",
    "trace.parquet",
    "trace.html",
)


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
) -> dict[str, Any]:
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

    def write() -> dict[str, Any]:
        with watch("write"):
            summary, scored = _write_rows(request, found)
        summary["fingerprints"] = fingerprints | {"config": config.fingerprint()}
        summary["seconds"] = watch.seconds()
        if found.traced is not None:
            summary["trace"] = _write_traced(request, found, summary)
        write_report(scored, summary, request.output / "report.html")
        # Written last: a folder with a summary is a finished run.
        write_json(summary, request.output / "summary.json")
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


def _write_rows(request: AuditRequest, found: _Found) -> tuple[dict[str, Any], Dataset]:
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
    request.output.mkdir(parents=True, exist_ok=True)
    _clear_output(request.output)
    for name, part in (("scored", scored), ("kept", result.kept), ("removed", result.removed)):
        write_shards(part, request.output / name)
    return _summarise(request, found, result), scored


def _write_traced(request: AuditRequest, found: _Found, summary: dict[str, Any]) -> dict[str, Any]:
    """Write the pairs behind errors of the query, with a page; what the report says of them."""
    assert found.traced is not None
    traced, rows, query = found.traced, found.rows, found.query
    described = describe_found(traced, rows, query)
    of_page = {"rows": len(rows), "seconds": summary["seconds"].get("trace"), "warnings": []}
    write_traces(traced, rows, query, request.output)
    errors = list(describe_errors_and_causes(traced, rows, query))
    write_trace_page(
        errors,
        summary | described | of_page,
        found.opened.dataset,
        found.opened.query_rows,
        request.output / "trace.html",
    )
    return described | {"worst": errors[:SHOWN_TRACED]}


# ------------------------------------------------------------------------------ before the run


def _check_output(request: AuditRequest) -> None:
    """Refuse a folder that holds what must not be lost."""
    output = request.output
    require_writable(output)
    present = sorted(path.name for path in output.iterdir()) if output.exists() else []
    ours = (*RESULTS, CHECKPOINTS)
    foreign = [n for n in present if n not in ours and not n.endswith(".partial")]
    if foreign:
        raise UserError(
            f"--output {output} holds other files ({', '.join(foreign[:3])}). Give a new folder."
        )
    if request.trace and request.query is None:
        raise UserError("--trace looks for errors in the query: give one (--query).")
    if request.resume and "summary.json" in present and CHECKPOINTS not in present:
        raise UserError(f"The run in --output {output} is finished. Give --overwrite to repeat it.")
    if CHECKPOINTS in present and not (request.resume or request.overwrite):
        raise UserError(
            f"--output {output} holds an interrupted run: --resume goes on with it, --overwrite "
            "starts anew."
        )
    if present and not (request.resume or request.overwrite):
        raise UserError(
            f"--output {output} holds another run ({', '.join(present)}). Give a new folder, or "
            "--overwrite to replace it."
        )
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


def _clear_output(output: Path) -> None:
    """Remove an earlier run, only now that the new one is complete in memory."""
    for path in [*(output / name for name in RESULTS), *output.glob(".*.partial")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------- what was found


def _summarise(request: AuditRequest, found: _Found, result: CleanResult) -> dict[str, Any]:
    """The content of ``summary.json``, without times and fingerprints."""
    opened, rows, detection, fitted = found.opened, found.rows, found.detection, found.fitted
    config, evidence = opened.model.config, found.evidence
    provenance = opened.provenance(rows, found.query)
    summary = {
        **provenance,
        "unreadable_reasons": dict(Counter(rows.reasons.values())),
        "flagged": int(detection.flag.sum()),
        "kept": len(result.kept),
        "removed": len(result.removed),
        "noise": _describe_noise(detection, found.reference, found.planted),
        "groups": _describe_groups(request, detection),
        "suggestions": _describe_suggestions(request, evidence),
        "duplicates": evidence.describe_duplicates() if evidence else None,
        "query": provenance["query"] | _describe_query(found),
        "fit": asdict(fitted.fit)
        | {"parameters": config.parameters, "count": opened.model.encoder.count},
        "solvers": [
            {"purpose": purpose, **asdict(report)} for purpose, report in fitted.solvers.items()
        ],
        "loaded": _describe_loading(opened),
    }
    if found.given.truth is not None:
        positions = rows.positions.numpy()
        summary["truth"] = _judge(found.given.truth, request.truth_column, positions, detection)
    summary["warnings"] = [*_warnings(summary, fitted), *opened.warnings(rows, found.query)]
    return summary


def _describe_loading(opened: Opened) -> dict[str, str | None]:
    """What else scores depend on: the commit of a model of the Hub, dtype, image processor."""
    model = opened.model
    return {
        "revision": find_commit(opened.sources.model),
        "dtype": str(model.encoder.input_dtype).removeprefix("torch."),
        "image_processor": type(model.processor.image_processor).__name__,
    }


def _describe_noise(
    detection: Detection, reference: np.ndarray, planted: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Noise rate and threshold, and how well wrong pairs made on purpose are told from the rest."""
    return {
        "rate": detection.noise_rate,
        "threshold": detection.threshold,
        "borderline": int(detection.borderline.sum()),
        "planted_auroc": detection.planted_auroc,
        "planted_score_auroc": auroc(-np.concatenate(planted)[:, 1], -reference[:, 1]),
    }


def _describe_groups(request: AuditRequest, detection: Detection) -> dict[str, Any] | None:
    """Those with a noise rate of their own; all other rows have that of all data."""
    if request.group_column is None:
        return None
    return {
        "column": request.group_column,
        "smallest": SMALLEST_GROUP,
        "other_rows": len(detection.flag) - sum(group.rows for group in detection.groups),
        "table": [asdict(group) for group in detection.groups],
    }


def _describe_suggestions(
    request: AuditRequest, evidence: Evidence | None
) -> dict[str, Any] | None:
    if evidence is None:
        return None
    return {
        "count": int(evidence.suggested.sum()),
        "least_margin": evidence.least_margin,
        "vocabulary": request.vocabulary and str(request.vocabulary),
    }


def _describe_query(found: _Found) -> dict[str, Any]:
    fitted = found.fitted
    return {
        "loss_before_fit": fitted.query_loss_before,
        "loss": fitted.query_loss,
        "alignment": fitted.alignment,
    }


def _judge(
    truth: np.ndarray, column: str | None, positions: np.ndarray, detection: Detection
) -> dict[str, Any]:
    """How much of what is known to be wrong was found; evaluation alone."""
    wrong = truth[positions]
    found = int((wrong & detection.flag).sum())
    judged: dict[str, Any] = {
        "column": column,
        "misaligned": int(wrong.sum()),
        "found": found,
        "precision": found / int(detection.flag.sum()) if detection.flag.any() else None,
        "recall": found / int(wrong.sum()) if wrong.any() else None,
    }
    if 0 < wrong.sum() < len(wrong):
        probability = detection.probability
        top = np.argsort(-probability, kind="stable")[:20]
        judged |= {
            "auroc": float(roc_auc_score(wrong, probability)),
            "average_precision": float(average_precision_score(wrong, probability)),
            "precision_at_20": float(wrong[top].mean()),
        }
    return judged


def _warnings(summary: dict[str, Any], fitted: Fitted) -> Iterator[str]:
    if summary["groups"] and not summary["groups"]["table"]:
        yield (
            f"No group of {summary['groups']['column']!r} has {SMALLEST_GROUP} rows, so all rows "
            "are judged by one noise rate and threshold."
        )
    if summary["noise"]["planted_score_auroc"] < 0.5:
        yield (
            "ecif_score is inverted here: wrong pairs made on purpose look valuable, not harmful. "
            "The model is far from an optimum on these data (see gradient_norm): fit it longer "
            "(--fit-epochs), and rank by ecif_noise_probability or ecif_loo_loss meanwhile."
        )
    for purpose, report in fitted.solvers.items():
        if not report.converged:
            yield (
                f"The solve for the {purpose} reached a relative residual of "
                f"{report.relative_residual:.1e}, not {report.tolerance:.0e}: {report.advice}."
            )
    if summary["scored"] < 200:
        yield (
            f"With {summary['scored']} rows, the noise rate and the threshold are rough guesses; "
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
