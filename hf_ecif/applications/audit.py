"""The door to an audit, and the run of ``hf-ecif audit``: sources in, an `Audit` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from hf_ecif.applications.analysis import Analysis, analyse, read_beside
from hf_ecif.applications.audit_summary import summarise
from hf_ecif.applications.given import MOST_STREAMED, Rowset, open_given
from hf_ecif.applications.outputs import require_free, require_outside
from hf_ecif.applications.requests import AuditOptions, AuditRequest
from hf_ecif.applications.result import Audit, Traced
from hf_ecif.applications.sources import open_sources
from hf_ecif.applications.trace import (
    Found,
    describe_errors_and_causes,
    describe_found,
)
from hf_ecif.config import SUGGEST_PROBABILITY, DetectionConfig, InfluenceConfig
from hf_ecif.data.audit_folder import RESULTS, SUMMARY, AuditFolder
from hf_ecif.data.schema import drop_influence_columns
from hf_ecif.data.summary import (
    Summary,
    TraceFacts,
    TraceFindings,
    TraceSummary,
)
from hf_ecif.detection.annotate import add_columns
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.files import CHECKPOINTS
from hf_ecif.utils.progress import ProgressFactory, silent, tqdm_bars
from hf_ecif.utils.stopwatch import Stopwatch

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
    verdicts: str | Path | None = None,
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
        verdicts: a sheet of `hf-ecif calibrate`, filled in: a person's verdicts on these rows. The
            detection builds on them, too.
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
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> quick = hf_ecif.InfluenceConfig(fit_epochs=1, probes=2, partitions=2)
        >>> audit = hf_ecif.audit(demo.model, pairs, demo.query, config=quick)
        >>> audit.dataset.num_rows
        60
        >>> audit.dataset.filter(lambda row: row["ecif_flag"]).column_names[:2]
        ['image', 'text']
    """
    options = AuditOptions(
        truth_column=truth_column,
        verified_column=verified_column,
        verdicts=Path(verdicts).expanduser() if verdicts is not None else None,
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
    watch = Stopwatch()
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
        beside = read_beside(options, given.opened)
        fingerprints = given.opened.fingerprints()
    found = analyse(options, given.opened, beside, Checkpoints(), watch, progress)
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
    watch = Stopwatch()
    with watch("load"):
        opened = open_sources(request, config)
        beside = read_beside(request, opened)
        fingerprints = opened.fingerprints()
    settings = config.deciding() | request.detection.deciding()
    manifest = settings | fingerprints | {"columns": request.columns}
    known = Checkpoints.open(request.output / CHECKPOINTS, manifest, resume=request.resume)
    try:
        found = analyse(request, opened, beside, known, watch, progress)
    except UserError:  # to go on would lead to the same error
        known.clear()
        raise

    def write() -> Summary:
        result = _conclude(request, found, fingerprints, watch, opened.dataset)
        result.write(AuditFolder(request.output))
        known.clear()
        return result.summary

    return distributed.decide(write)


def _conclude(
    options: AuditOptions,
    found: Analysis,
    fingerprints: dict[str, str],
    watch: Stopwatch,
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
    summary = summarise(options, found, notes).replace(
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


def _describe_traced(found: Analysis, traced: Found, summary: Summary) -> Traced:
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
