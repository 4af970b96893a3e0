"""``hf-ecif audit``: find what looks wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_ecif.cli.options import (
    Json,
    Overwrite,
    Quiet,
    Resume,
    bars,
    command,
    print_json,
    print_warnings,
    resumable,
)
from hf_ecif.config import InfluenceConfig

if TYPE_CHECKING:
    from hf_ecif.data.summary import Summary


@command()
def audit(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    truth_column: Annotated[
        str | None,
        typer.Option(
            help="Boolean column that says which rows are known to be wrong. Read only after the "
            "detection, to say in the report how much it found."
        ),
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column of names, a language for instance. Groups of 50 rows or more get a noise "
            "rate and a threshold of their own."
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="Text file of captions to suggest, one a line. The captions of rows that are not "
            "flagged, if not given."
        ),
    ] = None,
    suggest: Annotated[
        bool,
        typer.Option(
            help="Compare all rows with each other: captions that fit flagged images better, and "
            "duplicates. Takes the square of the rows in time, not in memory."
        ),
    ] = True,
    suggest_margin: Annotated[
        float,
        typer.Option(
            help="A caption is suggested if its logit is so far above the next best one, in nats.",
            min=0,
        ),
    ] = 1.5,
    trace: Annotated[
        int,
        typer.Option(
            help="Trace so many retrieval errors of the query, the worst first, to the pairs "
            "behind them: a section of the report, and a page of its own.",
            min=0,
        ),
    ] = 0,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: InfluenceConfig,
) -> None:
    """Score every pair, flag those that look misaligned, and write data and report to OUTPUT.

    OUTPUT gets `scored/`, `kept/` and `removed/` (parquet, opened by `load_dataset`),
    `summary.json` and `report.html`.

    A **negative** `ecif_score` is harmful: without the pair, the query's loss is predicted to fall.
    A **positive** one is valuable.
    """
    # Imported late: torch and transformers take seconds, and --help should not.
    from hf_ecif.applications.audit import AuditRequest, run_audit

    request = AuditRequest(
        **sources,
        truth_column=truth_column,
        group_column=group_column,
        vocabulary=vocabulary,
        suggest=suggest,
        suggest_margin=suggest_margin,
        trace=trace,
        output=output,
        overwrite=overwrite,
        resume=resume,
    )
    with bars(quiet, as_json) as (console, progress), resumable():
        summary = run_audit(request, config, progress)
    _print_summary(console, summary, output)
    print_json(as_json, summary.to_dict())


def _print_summary(console: Console, summary: Summary, output: Path) -> None:
    console.print(
        f"{summary.rows:,} rows: {summary.flagged:,} flagged as misaligned "
        f"(estimated noise {summary.noise.rate:.1%}), {summary.unreadable:,} unreadable, "
        f"{summary.kept:,} kept."
    )
    if truth := summary.truth:
        precision = truth.precision
        console.print(
            f"Of {truth.misaligned:,} rows known to be misaligned, {truth.found:,} are "
            + ("flagged." if precision is None else f"flagged (precision {precision:.1%}).")
        )
    print_warnings(console, summary.warnings, "Warning")
    console.print(
        f"Report: {output / 'report.html'}", highlight=False, soft_wrap=True, markup=False
    )
