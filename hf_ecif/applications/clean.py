"""From an audit's rows to cleaned ones, and to whether the cleaning helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import CleanRequest
from hf_ecif.applications.sources import PairLike, read_named
from hf_ecif.config import InfluenceConfig, Strategy
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.cleaning import BEFORE, WEIGHT, CleanResult, clean
from hf_ecif.data.columns import read_groups
from hf_ecif.data.embeddings import place_references
from hf_ecif.data.findings import read_kinds
from hf_ecif.data.images import image_hashes
from hf_ecif.data.loading import load_rows
from hf_ecif.data.schema import check_columns, read_flags
from hf_ecif.data.summary import (
    CleaningFacts,
    Columns,
    ComparisonFacts,
    Measured,
    OutcomeFacts,
    Summary,
)
from hf_ecif.errors import UserError
from hf_ecif.influence.classification import TEMPLATES, read_classes
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.retraining import (
    Outcome,
    Version,
    compare,
    random_subset,
)
from hf_ecif.influence.rows import Rows
from hf_ecif.reports.audit import write_report
from hf_ecif.reports.outcomes import write_cleaning_page
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import derive


@dataclass(frozen=True)
class Cleaning:
    """What `run_clean` made.

    Attributes:
        results: By strategy, the one that is written first.
        comparison: Of models fine-tuned on the rows before and after; None without a test.
    """

    results: dict[Strategy, CleanResult]
    comparison: Comparison | None

    @property
    def result(self) -> CleanResult:
        """Result of the strategy that is written."""
        return next(iter(self.results.values()))


def run_clean(request: CleanRequest, progress: ProgressFactory = silent) -> Cleaning:
    """Clean an audit's rows, and write what `CleanRequest.output` says.

    Raises:
        UserError: The audit or a column is missing, the output has something in it, or the test
            cannot be read.
    """
    output = request.output
    if output:
        require_free(output)
    audit, scored, summary = _open_audit(request.audit)
    text_column = request.text_column or (summary.columns.text if summary else "text")
    name_column = summary.reading.text if summary else None
    if request.test and summary and summary.reading.format == "embeddings":
        scored = place_references(scored, summary.dataset)
    results = _clean_by_all(scored, request, text_column, name_column)
    comparison = None
    if request.test:
        comparison = compare_cleanings(request, scored, results, summary, text_column, progress)
    cleaning = Cleaning(results, comparison)
    if output:
        columns = Columns(image=summary.columns.image, text=text_column) if summary else None
        told = _write(cleaning, request, columns, AuditFolder(output))
        if summary:
            _write_evidence(audit, scored, summary, told, AuditFolder(output))
    return cleaning


def _open_audit(folder: Path) -> tuple[AuditFolder, Dataset, Summary | None]:
    """An audit, its scored rows, and its summary; None where there is none."""
    if not folder.is_dir():
        raise UserError(f"There is no audit in {folder}. Name the `output` of 'hf-ecif audit'.")
    if AuditFolder(folder).is_interrupted:
        AuditFolder(folder).read_summary()  # says so
    audit = AuditFolder.around(folder)
    rows = load_rows(str(audit.scored if audit.path == folder else folder), "train")
    return audit, rows, audit.read_summary() if audit.has_summary else None


def _clean_by_all(
    scored: Dataset, request: CleanRequest, text_column: str, name_column: str | None
) -> dict[Strategy, CleanResult]:
    findings = None if request.findings is None else read_kinds(request.findings)
    strategies = dict.fromkeys((request.strategy, *request.beside))
    # A share without the one strategy that takes it is passed on, to be refused.
    takers = [strategy for strategy in strategies if strategy == "worst"] or strategies
    return {
        strategy: clean(
            scored,
            strategy,
            share=request.share if strategy in takers else None,
            findings=findings,
            text_column=text_column,
            name_column=name_column,
        )
        for strategy in strategies
    }


def _write(
    cleaning: Cleaning, request: CleanRequest, columns: Columns | None, output: AuditFolder
) -> CleaningFacts:
    """The rows, and what is told of them in ``cleaning.json``."""
    output.write_rows(cleaning.result)
    facts = CleaningFacts(
        audit=str(request.audit),
        strategy=request.strategy,
        share=request.share,
        counts=cleaning.result.counts(),
        findings=cleaning.result.removed_findings(),
        expected_right=cleaning.result.expected_right,
        comparison=cleaning.comparison.describe() if cleaning.comparison else None,
    )
    if facts.comparison and columns:  # a comparison needs the summary that names them
        removed = check_columns(cleaning.result.removed, columns.image, columns.text)
        write_cleaning_page(facts, facts.comparison, removed, columns, output.cleaning_page)
    output.write_cleaning(facts)
    return facts


def _write_evidence(
    audit: AuditFolder,
    scored: Dataset,
    summary: Summary,
    cleaning: CleaningFacts,
    output: AuditFolder,
) -> None:
    """Summary and report of the audit with the new counts, so that the rows can be published."""
    counts = {name: cleaning.counts[name] for name in ("kept", "removed")}
    summary = summary.replace(cleaning=cleaning, **counts)
    if audit.report.is_file():
        rows = check_columns(scored, summary.columns.image, summary.columns.text)
        write_report(rows, summary, output.report)
    output.finish(summary)


@dataclass(frozen=True)
class Comparison:
    """Models fine-tuned on the rows of an audit before and after a cleaning.

    Attributes:
        outcomes: the model as given, all rows, every strategy and beside it a random removal of
            as many rows, and where the audit knows which rows are wrong, the others alone.
        test: where the test rows are from.
        test_rows: their number.
        warnings: what the reader of the figures must know.
    """

    outcomes: list[Outcome]
    test: str
    test_rows: int
    warnings: list[str]

    def describe(self) -> ComparisonFacts:
        """The comparison as facts of a summary."""
        return ComparisonFacts(
            test=self.test,
            test_rows=self.test_rows,
            outcomes=[_describe_outcome(outcome) for outcome in self.outcomes],
            warnings=self.warnings,
        )


def _describe_outcome(outcome: Outcome) -> OutcomeFacts:
    measures = {
        name: Measured(mean=outcome.mean(name), stderr=outcome.stderr(name), values=values)
        for name, values in outcome.values.items()
    }
    return OutcomeFacts(version=outcome.version, rows=outcome.rows, measures=measures)


def compare_cleanings(
    request: CleanRequest,
    scored: Dataset,
    results: Mapping[Strategy, CleanResult],
    summary: Summary | None,
    text_column: str,
    progress: ProgressFactory = silent,
) -> Comparison:
    """Fine-tune on an audit's rows before and after, and measure on the request's test.

    Args:
        request: names the test, and how often to repeat.
        scored: all rows of the audit.
        results: by strategy.
        summary: of the audit; names the model, the config and the columns.
        text_column: of the captions.
        progress: makes progress bars.

    Raises:
        UserError: there is no summary, or the test cannot be read.
    """
    assert request.test is not None
    if summary is None:
        raise UserError(
            f"{request.audit} has no summary.json that names the audited model, which `test` "
            "needs. Give the folder of the audit, as hf-ecif audit wrote it."
        )
    columns = summary.columns.image, text_column
    embedded = summary.reading.format == "embeddings"
    key = summary.reading.config if embedded else None
    test_given = read_named("test", request.test, request.test_split, usual="test", config=key)
    test_set = _like(summary, text_column).make(test_given).rows
    config = InfluenceConfig.from_dict(summary.config, "summary.json")
    model = InfluenceModel.from_pretrained(
        request.model or summary.model, config, processor=summary.processor
    )

    def read(name: str, dataset: Dataset) -> Rows:
        return model.read(dataset, *columns, progress(f"Read {name}", len(dataset)))

    scored = check_columns(scored, *columns)
    rows, test = read("all rows", scored), read("test", test_set)
    kept = {
        strategy: _weighted(read(strategy, result.kept), result.kept)
        for strategy, result in results.items()
    }
    versions = dict(_versions(rows, kept, request.repeats, config.seed))
    if summary.truth:
        wrong = read_flags(scored, summary.truth.column, "truth_column", "is wrong")[rows.positions]
        right = rows.select(torch.from_numpy(~wrong).nonzero()[:, 0])
        versions["all that are right"] = [Version(right)] * request.repeats
    source = test_given.told
    classes = None
    if request.class_column:
        named = read_groups(test_set, request.class_column, "class_column")
        classes = read_classes(model, test, named, request.class_template or TEMPLATES)
    return Comparison(
        outcomes=compare(
            model, versions, test, classes=classes, seed=config.seed, progress=progress
        ),
        test=source,
        test_rows=len(test),
        warnings=list(_warnings(source, scored, test_set, columns[0], summary)),
    )


def _like(summary: Summary, text_column: str) -> PairLike:
    """How the audit made its pairs."""
    columns = Columns(image=summary.columns.image, text=text_column)
    source = columns.replace(text=summary.reading.text or text_column)
    return PairLike(columns, source, summary.reading.template)


def _weighted(rows: Rows, kept: Dataset) -> Version:
    if WEIGHT not in kept.column_names:
        return Version(rows)
    return Version(rows, torch.tensor(kept[WEIGHT][:])[rows.positions])


def _versions(
    rows: Rows, kept: Mapping[Strategy, Version], repeats: int, seed: int
) -> Iterator[tuple[str, list[Version]]]:
    """All rows, those that each strategy keeps, and as many at random: fewer rows alone differ."""
    yield BEFORE, [Version(rows)] * repeats
    for strategy, version in kept.items():
        yield strategy, [version] * repeats
        count = len(version.rows)
        if count < len(rows):
            drawn = [random_subset(rows, count, derive(seed, "subsets", n)) for n in range(repeats)]
            yield f"random, as many as {strategy}", [Version(subset) for subset in drawn]


def _warnings(
    source: str, scored: Dataset, test: Dataset, image_column: str, summary: Summary
) -> Iterator[str]:
    if source == summary.query.source:
        yield (
            "The test is the query that the pairs were judged by, so what is kept suits it. Give "
            "other rows."
        )
    shared = image_hashes(scored, image_column) & image_hashes(test, image_column)
    if shared:
        yield (
            f"{len(shared)} images of the test are in the audited data, too, so the figures are "
            "too good. Give a test of other images."
        )
