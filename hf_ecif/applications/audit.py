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
from hf_ecif.applications.judged import JudgedRows, judge_rows, with_columns
from hf_ecif.applications.outputs import require_free, require_outside
from hf_ecif.applications.requests import LEARN_ROWS, AuditOptions, AuditRequest
from hf_ecif.applications.result import Audit, Traced
from hf_ecif.applications.sources import open_sources
from hf_ecif.applications.trace import (
    Found,
    describe_errors_and_causes,
    describe_found,
)
from hf_ecif.config import SUGGEST_PROBABILITY, DetectionConfig, InfluenceConfig, RowFormat
from hf_ecif.data.audit_folder import RESULTS, SUMMARY, AuditFolder
from hf_ecif.data.schema import drop_influence_columns
from hf_ecif.data.summary import (
    Summary,
    TraceFacts,
    TraceFindings,
    TraceSummary,
)
from hf_ecif.detection.annotate import add_columns
from hf_ecif.detection.auditor import Auditor
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.files import CHECKPOINTS, scratch_file
from hf_ecif.utils.progress import ProgressFactory, silent, tqdm_bars
from hf_ecif.utils.stopwatch import Stopwatch

SHOWN_TRACED = 8


def audit(
    model: InfluenceModel | PreTrainedModel | str | Path | None = None,
    dataset: Rowset | None = None,
    query: Rowset | None = None,
    *,
    split: str | None = None,
    query_split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    config_name: str | None = None,
    query_config: str | None = None,
    query_image_column: str | None = None,
    query_text_column: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    sample: int | None = None,
    format: RowFormat | None = None,
    embeddings: str | Path | None = None,
    embeddings_key: str | None = None,
    logit_scale: float | None = None,
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
    learn_rows: int = LEARN_ROWS,
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
            `IterableDataset`, a name on the Hub, a folder or a file.
        query: clean pairs like those that the model is for, in any of these forms. Chosen from
            the data if absent.
        split: of ``dataset``, where it has several, or a part, ``train[:10%]``; ``train``, or the
            only one, if absent.
        query_split: likewise of ``query``; ``validation``, or the only one, if absent.
        image_column: of images, their bytes or their paths; found by its type if absent.
        text_column: of the captions, of lists of captions or of classes; likewise.
        config_name: configuration of ``dataset``, where it has several.
        query_config: likewise of ``query``.
        query_image_column: that of the data if absent, or found by its type.
        query_text_column: likewise.
        template: sentence around each name of a class, such as ``"a photo of a {}"``.
        limit: how many of the first rows are read.
        sample: how many rows are drawn at random.
        format: what files are, where it is not found by what is there.
        embeddings: file or folder of embeddings of the pairs, in place of ``model`` and
            ``dataset``; ``query`` is one of that form, too.
        embeddings_key: which of them, where there are those of several models.
        logit_scale: inverse temperature of the model that made them; 100 if absent.
        processor: what AutoProcessor loads for ``model``, where that is loaded; or its folder or
            Hub id, where none lies beside the model.
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
        suggest: whether rows are compared with those that are learned from, for better captions
            and duplicates.
        suggest_probability: a caption is suggested if it is right with this probability; 0 asks
            for none, where too few rows tell it.
        suggest_margin: and if its logit stands that far above the next, in
            nats.
        trace: errors of the query to trace to the pairs behind them, the worst first.
        learn_rows: rows that the audit learns from, drawn at random; all others are judged by what
            was learned, in memory that does not grow with their number.
        detection: how it is learned what a wrong pair looks like.
        max_rows: to read of an `IterableDataset`.
        output: where `Audit.save` writes the result, if anywhere.
        overwrite: whether an earlier audit in ``output`` is replaced.
        progress: makes progress bars; these are hidden by ``datasets.disable_progress_bars()``.

    Returns:
        The rows with their influence columns, what was found, and the ways on from there. Of
        lists of captions, there is a row for each caption, and lists again in what is saved.

    Raises:
        UserError: something given cannot be used; it says what, and what to do.

    Examples:
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
        learn_rows=learn_rows,
        detection=detection or DetectionConfig(),
    )
    folder = Path(output).expanduser() if output is not None else None
    if folder is not None:
        distributed.decide(lambda: _require_free(folder, overwrite=overwrite))
        named = [
            given for given in (model, dataset, query, embeddings) if isinstance(given, str | Path)
        ]
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
            config_name=config_name,
            query_config=query_config,
            query_image_column=query_image_column,
            query_text_column=query_text_column,
            template=template,
            limit=limit,
            sample=sample,
            format=format,
            embeddings=embeddings,
            embeddings_key=embeddings_key,
            logit_scale=logit_scale,
            processor=processor,
            config=config,
            max_rows=max_rows,
        )
        beside = read_beside(options, given.opened)
        fingerprints = given.opened.fingerprints()
    found = analyse(options, given.opened, beside, Checkpoints(), watch, progress)
    judged = _judge(found, distributed.decide(scratch_file), watch, progress)
    result = _conclude(
        options, found, judged, fingerprints, watch, given.opened.original, given.notes
    )
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
    manifest = settings | fingerprints | opened.manifest() | {"learn_rows": request.learn_rows}
    place = request.output / CHECKPOINTS
    known = Checkpoints.open(place, manifest, resume=request.resume)
    try:
        found = analyse(request, opened, beside, known, watch, progress)
    except UserError:  # to go on would lead to the same error
        known.clear()
        raise
    judged = _judge(found, place, watch, progress)

    def write() -> Summary:
        result = _conclude(request, found, judged, fingerprints, watch, opened.original)
        result.write(AuditFolder(request.output))
        known.clear()
        return result.summary

    return distributed.decide(write)


def _judge(
    found: Analysis, place: Path, watch: Stopwatch, progress: ProgressFactory
) -> JudgedRows | None:
    """Verdicts on all rows, in a folder within ``place``; None where all were learned from."""
    if found.sample is None:
        return None
    with watch("judge"):
        # What decides a verdict is in the name, since not all of it is in the manifest of a run.
        name = distributed.decide(lambda: _auditor(found).fingerprint)
        return judge_rows(found, place / f"judged-{name}", progress)


def _auditor(found: Analysis) -> Auditor:
    columns = found.opened.like.columns
    learned = found.learned.without_numbers()
    return Auditor(learned, columns.image, columns.text, found.group_column)


def _conclude(
    options: AuditOptions,
    found: Analysis,
    judged: JudgedRows | None,
    fingerprints: dict[str, str],
    watch: Stopwatch,
    dataset: Dataset,
    notes: Sequence[str] = (),
) -> Audit:
    """What was found, as columns of the data set and in figures."""
    config, plain = found.opened.model.config, drop_influence_columns(dataset)
    if judged is not None:
        scored = with_columns(plain, judged.columns)
    else:
        scored = add_columns(
            plain,
            found.rows,
            found.scores,
            found.scores_as_given,
            found.signals,
            found.detection,
            config.relative,
            found.evidence,
            found.findings,
        )
    summary = summarise(options, found, notes, judged).replace(
        fingerprints=fingerprints
        | {"config": config.fingerprint(), "detection": options.detection.fingerprint()},
        seconds=watch.seconds(),
    )
    auditor = _auditor(found)
    if found.traced is None:
        return Audit(scored, summary, auditor=auditor)
    traced = _describe_traced(found, found.traced, summary)
    findings = TraceFindings(
        **{name: getattr(traced.summary, name) for name in TraceFacts.model_fields},
        worst=list(traced.errors[:SHOWN_TRACED]),
    )
    return Audit(scored, summary.replace(trace=findings), traced, auditor)


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
    named = (request.dataset, request.query, request.model, request.embeddings)
    require_outside(request.output, [source for source in named if source])


def _require_free(output: Path, *, resume: bool = False, overwrite: bool) -> None:
    require_free(output, finished=SUMMARY, others=RESULTS, resume=resume, overwrite=overwrite)
