"""``hf-ecif calibrate``: a few verdicts of a person, and an audit that keeps to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_ecif.cli.options import Json, app, print_json, quieten_libraries
from hf_ecif.errors import UserError

if TYPE_CHECKING:
    from hf_ecif.data.summary import CalibrationFacts, ShareFacts, Summary


@app.command()
def calibrate(
    audit: Annotated[Path, typer.Argument(help="Folder of an audit.")],
    sample: Annotated[
        int | None,
        typer.Option(
            help="Draw so many rows to judge, half of them flagged, and write a sheet of them."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.", min=0)] = 0,
    verdicts: Annotated[
        Path | None,
        typer.Option(
            help="The sheet, filled in (right, wrong or cannot tell): csv or parquet, or a JSON or "
            "CSV export of Label Studio."
        ),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            help="Flag as many rows as possible such that this share of them is wrong. Without it, "
            "flags are those of the best F1."
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="With which --precision is promised.")] = 0.9,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the calibrated audit.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Calibrate the audit in place; or draw another sheet.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge thirty pairs, and know how good the flags are.

    First `hf-ecif calibrate OUT --sample 30`: judge the rows of the sheet that it writes. Then
    `hf-ecif calibrate OUT --verdicts OUT/calibration/sheet.csv --output NEW`: noise rate, precision
    and recall with 90 % intervals, calibrated probabilities, and NEW, an audit with better flags.
    """
    from hf_ecif.applications.calibrate import CalibrateRequest, run_calibration, write_sheet

    if (sample is None) == (verdicts is None):
        raise UserError("Give either --sample, to draw rows to judge, or --verdicts, to read them.")
    quieten_libraries()
    console = Console(quiet=as_json)
    if sample is not None:
        sheet = write_sheet(audit, sample, seed=seed, overwrite=overwrite)
        console.print(
            f"{len(sheet.rows)} rows to judge are in {escape(str(sheet.csv))}, and with their "
            f"images in {escape(str(sheet.parquet))}. Write right, wrong or cannot tell into the "
            "column verdict, and give the file back with --verdicts.",
            highlight=False,
        )
        print_json(as_json, {"rows": sheet.rows, "csv": sheet.csv, "parquet": sheet.parquet})
        return
    assert verdicts is not None
    summary = run_calibration(
        CalibrateRequest(
            audit=audit,
            verdicts=verdicts,
            output=output,
            overwrite=overwrite,
            precision=precision,
            confidence=confidence,
        )
    )
    found = summary.calibration
    assert found is not None
    console.print(_table(found))
    console.print(_outcome(summary, found, output or audit), highlight=False, markup=False)
    for warning in found.warnings:
        console.print(f"Note: {warning}", highlight=False, markup=False)
    print_json(as_json, found.to_dict())


def _table(found: CalibrationFacts) -> Table:
    table = Table("by the verdicts", "flags of the audit", "new flags")
    for name in ("precision", "recall"):
        pair = (_interval(getattr(quality, name)) for quality in (found.before, found.after))
        table.add_row(name, *pair)
    rate = _interval(found.noise_rate)
    table.add_row("noise rate", rate, rate)
    return table


def _interval(share: ShareFacts) -> str:
    if share.value != share.value:
        return "–"
    return f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"


def _outcome(summary: Summary, found: CalibrationFacts, folder: Path) -> str:
    text = (
        f"{summary.flagged:,} rows are flagged, {summary.kept:,} kept and {summary.removed:,} "
        f"removed: {folder}"
    )
    made = found.promise
    if made is not None and made.holds:
        text = (
            f"With {made.confidence:.0%} confidence, at least {made.precision:.0%} of the flagged "
            f"rows are wrong. {text}"
        )
    return text
