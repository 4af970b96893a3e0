"""Results on a console: sentences, tables, warnings, and where the files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hf_ecif.data.exports.rows import Exported
from hf_ecif.data.summary import (
    ComparisonFacts,
    RemovalSummary,
    ShareFacts,
    Summary,
    TraceSummary,
    ValidationSummary,
    ValueSummary,
)
from hf_ecif.reports.measures import LOSS, NAMES, tell_gains, tell_mean, tell_value
from hf_ecif.utils.formatting import (
    models_of_removal,
    nats,
    reach,
    share,
    shorten,
)

CAPTION = 80  # letters shown of a caption
NAMED = 8  # slices without a ranking that are named
OFTEN = 3  # rows behind many errors that are named


class Warned(NamedTuple):
    """A warning that a reader of the figures must know."""

    text: str


class Place(NamedTuple):
    """Path of a result; printed without line breaks, so that it can be copied."""

    name: str
    path: Path


Shown = str | Table | Warned | Place


def print_lines(
    console: Console, lines: Iterable[Shown], phrase: Callable[[str], str] = str
) -> None:
    """Print the lines that the functions below return.

    Args:
        console: where to print.
        lines: sentences, tables, warnings and paths; none contains markup.
        phrase: adapts the words of a sentence to its reader.
    """
    for line in lines:
        match line:
            case Warned(text):
                console.print(Text.assemble(("Warning:", "yellow"), " ", phrase(text)))
            case Place(name, path):
                console.print(
                    f"{name}: {path}", highlight=False, markup=False, emoji=False, soft_wrap=True
                )
            case str(text):
                console.print(phrase(text), highlight=False, markup=False, emoji=False)
            case _:
                console.print(line)


def audit_lines(summary: Summary, output: Path) -> Iterator[Shown]:
    """Lines on kept and removed rows, and on the known wrong rows that were found."""
    yield (
        f"{summary.rows:,} rows: {summary.flagged:,} flagged as misaligned (estimated noise "
        f"{summary.noise.told}), {summary.unreadable:,} unreadable, {summary.kept:,} kept."
    )
    if summary.learned_from:
        yield f"The audit learned from {summary.learned_from:,} of them, and judged all by that."
    if summary.noise.abstains:
        yield Warned(f"Nothing is flagged: {summary.noise.abstains}")
    if truth := summary.truth:
        precision = "" if truth.precision is None else f" (precision {share(truth.precision)})"
        yield (
            f"Of {truth.misaligned:,} rows known to be misaligned, {truth.found:,} are "
            f"flagged{precision}."
        )
    yield from map(Warned, summary.warnings)
    yield Place("Report", output / "report.html")


def export_lines(exported: Exported, output: Path) -> Iterator[Shown]:
    """Lines on the rows that were written, and on how to open them."""
    yield f"{exported.rows:,} rows in {', '.join(exported.files[:NAMED])}" + (
        "." if len(exported.files) <= NAMED else f" and {len(exported.files) - NAMED:,} more."
    )
    yield from exported.notes
    yield f"Open: {exported.opens}"
    yield Place("Folder", output)


def cleaning_lines(
    audit: Path,
    counts: Mapping[str, Mapping[str, int]],
    comparison: ComparisonFacts | None,
    output: Path | None,
    expected_right: float | None = None,
    findings: Mapping[str, int] | None = None,
) -> Iterator[Shown]:
    """Lines on a cleaning: rows by outcome, and the gains of models.

    Args:
        audit: folder of the audit.
        counts: number of rows by strategy, then by outcome.
        comparison: comparison of models fine-tuned before and after.
        output: folder of the written rows.
        expected_right: how many of the new captions are right, where that is known.
        findings: rows that the first strategy removed by their finding.
    """
    yield _counts(audit, counts)
    if findings:
        by_kind = ", ".join(f"{kind} {count:,}" for kind, count in findings.items())
        yield f"Removed rows with a finding: {by_kind}."
    relabelled = sum(one.get("relabelled", 0) for one in counts.values())
    if relabelled and expected_right is not None:
        yield f"Of {relabelled:,} new captions, about {expected_right:,.0f} should be right."
    if comparison:
        yield _fine_tunings(comparison)
        yield from tell_gains(comparison)
        yield from map(Warned, comparison.warnings)
    if output:
        yield Place("Rows", output)


def sheet_lines(count: int, csv: Path, parquet: Path) -> Iterator[Shown]:
    """Lines on rows that a person is to judge.

    Args:
        count: number of rows.
        csv: the file to fill in.
        parquet: the same with the images.
    """
    yield (
        f"{count:,} rows to judge. Write right, wrong or cannot tell into the column verdict of "
        "one of these files, and give it back with `verdicts`."
    )
    yield Place("Sheet", csv)
    yield Place("With images", parquet)


def calibration_lines(summary: Summary, output: Path) -> Iterator[Shown]:
    """Lines on how good flags are by verdicts, and on the rows kept and removed by them."""
    found = summary.calibration
    assert found is not None
    table = Table("by the verdicts", "flags of the audit", "new flags")
    for name in ("precision", "recall"):
        pair = (_interval(getattr(quality, name)) for quality in (found.before, found.after))
        table.add_row(name, *pair)
    table.add_row("noise rate", *[_interval(found.noise_rate)] * 2)
    yield table
    made = found.promise
    if made and made.holds:
        yield (
            f"With {share(made.confidence)} confidence, at least {share(made.precision)} of the "
            "flagged rows are wrong."
        )
    yield (
        f"{summary.flagged:,} rows are flagged, {summary.kept:,} kept and {summary.removed:,} "
        "removed."
    )
    yield from map(Warned, found.warnings)
    yield Place("Report", output / "report.html")


def _interval(one: ShareFacts) -> str:
    """A share with its interval; a dash where nothing is there to have one."""
    if isnan(one.value):
        return "–"
    return f"{share(one.value)} ({share(one.low)} to {share(one.high)})"


def trace_lines(summary: TraceSummary, output: Path) -> Iterator[Shown]:
    """Lines on a trace: number of errors, and the rows behind most of them."""
    errors = summary.errors
    if errors.wrong is not None:
        yield (
            f"{errors.wrong:,} of {errors.of:,} {errors.asked} of the query are mispredicted "
            f"({errors.kind})."
        )
    if errors.traced:
        yield f"{errors.traced:,} traced to {summary.top_k} training pairs each."
    for one in summary.often[:OFTEN]:
        text = shorten(one.text, CAPTION)
        yield f"Row {one.row:,} is behind {one.errors:,} of them: {text}"
    yield from map(Warned, summary.warnings)
    yield Place("Page", output / "trace.html")


def value_lines(summary: ValueSummary, output: Path) -> Iterator[Shown]:
    """Lines on a valuation: query and slices, removal curves, and useful candidates."""
    yield _slices(summary)
    skipped = [f"{name} ({reason})" for name, reason in summary.skipped.items()]
    if skipped:
        more = f", and {len(skipped) - NAMED:,} more" if len(skipped) > NAMED else ""
        yield f"No ranking for {', '.join(skipped[:NAMED])}{more}."
    if unnamed := summary.query.unnamed:
        yield f"{unnamed:,} rows of the query are in no slice."
    if summary.curves:
        yield summary.curves.verdict
    if found := summary.candidates:
        yield (
            f"{found.worth_having:,} of {found.valued:,} candidates are worth having: the query's "
            "loss is predicted to fall with them."
        )
    yield from map(Warned, summary.warnings)
    yield Place("Page", output / "value.html")


def removal_lines(summary: RemovalSummary, output: Path) -> Iterator[Shown]:
    """Lines on what a model lost and gained by a removal."""
    seconds = summary.seconds
    retrained = f" Retrained in {seconds['retrain']:.1f} s." if "retrain" in seconds else ""
    yield (
        f"{summary.removal.removed:,} of {summary.scored:,} readable rows removed in "
        f"{seconds['remove']:.1f} s.{retrained}"
    )
    names = models_of_removal(summary.config)
    for judge, states in summary.measures.items():
        yield _measures(judge, {names[state]: values for state, values in states.items()})
    predicted = summary.measures["query"]["before"]["loss"] + summary.predicted_change
    yield f"By the scores alone, the query's loss would be {nats(predicted)} nats."
    yield from map(Warned, summary.warnings)
    yield Place("Model", output)
    yield Place("Page", output / "removal.html")


def validation_lines(summary: ValidationSummary, output: Path) -> Iterator[Shown]:
    """Lines on how well predictions rank true retrainings."""
    yield (
        f"Rank correlation of predicted and true changes: {summary.spearman:.2f} (95 % interval "
        f"{summary.low:.2f} to {summary.high:.2f}{reach(summary.ceiling)}) over "
        f"{len(summary.actual)} subsets without {share(summary.removed_share)} of the rows each; "
        f"order right for {share(summary.sign_agreement)} of the pairs of subsets; slope "
        f"{summary.slope:.2f}."
    )
    yield summary.verdict
    yield from map(Warned, summary.warnings)
    yield Place("Page", output / "validation.html")


def fit_lines(
    rows: int, before: float, after: float, warnings: Iterable[str], output: Path
) -> Iterator[Shown]:
    """Lines on the query's loss before and after a fit, in nats."""
    yield f"Fitted on {rows:,} rows: the query's loss is {nats(after)} nats, {nats(before)} before."
    yield from map(Warned, warnings)
    yield Place("Influence", output)


def scoring_lines(summary: Mapping[str, Any], output: Path) -> Iterator[Shown]:
    """Lines on the number of rows with a score."""
    yield (
        f"{summary['rows']:,} rows scored, {summary['unscored']:,} of them without a score, in "
        f"{summary['shards']:,} shards."
    )
    yield Place("Scores", output / "scored")


# ------------------------------------------------------------------------------------- tables


def _counts(audit: Path, counts: Mapping[str, Mapping[str, int]]) -> Table:
    """Table of rows by outcome, with a column for each strategy."""
    table = Table("rows that are", *counts, title=escape(str(audit)))
    for name in dict.fromkeys(name for one in counts.values() for name in one):
        cells = [f"{one[name]:,}" if name in one else "–" for one in counts.values()]
        table.add_row(name.replace("_", " "), *cells)
    return table


def _fine_tunings(comparison: ComparisonFacts) -> Table:
    """Table of test results after fine-tuning on each version of the rows, in percent."""
    title = f"{comparison.test_rows:,} rows of {escape(comparison.test)}; percent ± standard error"
    table = Table("fine-tuned on", "rows", title=title)
    measures = [name for name in NAMES if name in comparison.outcomes[0].measures and name != LOSS]
    for name in measures:
        table.add_column(NAMES[name].replace(" ", "\n", 1), no_wrap=True)
    for outcome in comparison.outcomes:
        cells = [tell_mean(name, outcome.measures[name]) for name in measures]
        table.add_row(outcome.version, f"{outcome.rows:,.0f}" if outcome.rows else "–", *cells)
    return table


def _measures(judge: str, models: Mapping[str, Mapping[str, float]]) -> Table:
    measures = [name for name in NAMES if all(name in values for values in models.values())]
    table = Table(judge, *(NAMES[name] for name in measures))
    for name, values in models.items():
        table.add_row(name, *(tell_value(measure, values[measure]) for measure in measures))
    return table


def _slices(summary: ValueSummary) -> Table:
    table = Table("query", "rows", "loss before the fit", "after", "harmful pairs", "agreement")
    for one in summary.slices:
        table.add_row(
            escape(one.name),
            f"{one.rows:,}",
            nats(one.loss_before),
            nats(one.loss),
            share(one.harmful_share),
            f"{one.agreement:.2f}",
        )
    return table
