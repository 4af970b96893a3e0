"""``hf-ecif calibrate``: a few verdicts of a person, and an audit that keeps to them."""

from __future__ import annotations

from hf_ecif.applications.requests import CalibrateRequest
from hf_ecif.cli.options import CLEANING, command
from hf_ecif.cli.screen import Result
from hf_ecif.errors import UserError
from hf_ecif.utils.progress import ProgressFactory


@command(CalibrateRequest, panel=CLEANING)
def calibrate(request: CalibrateRequest, progress: ProgressFactory) -> Result:
    """Judge thirty pairs, and know how good the flags are.

    First `hf-ecif calibrate OUT --sample 30`: judge the rows of the sheet that it writes. Then
    `hf-ecif calibrate OUT --verdicts OUT/calibration/sheet.csv --output NEW`: noise rate, precision
    and recall with 90 % intervals, calibrated probabilities, and NEW, an audit with better flags.
    To let the detector learn from the verdicts, too, audit again with `--verdicts` and the sheet.
    """
    if (request.sample is None) == (request.verdicts is None):
        raise UserError("Give either `sample`, to draw rows to judge, or `verdicts`, to read them.")
    from hf_ecif.applications.calibrate import run_calibration, write_sheet
    from hf_ecif.reports.console import calibration_lines, sheet_lines

    if request.sample is not None:
        sheet = write_sheet(
            request.audit, request.sample, seed=request.seed, overwrite=request.overwrite
        )
        values = {"rows": sheet.rows, "csv": str(sheet.csv), "parquet": str(sheet.parquet)}
        return Result(values, sheet_lines(len(sheet.rows), sheet.csv, sheet.parquet))
    summary = run_calibration(request)
    assert summary.calibration is not None
    return Result(
        summary.calibration.to_dict(),
        calibration_lines(summary, request.output or request.audit),
    )
