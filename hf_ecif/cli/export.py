"""``hf-ecif export``: rows of an audit, in the formats of other tools."""

from __future__ import annotations

from dataclasses import asdict

from hf_ecif.applications.requests import ExportRequest
from hf_ecif.cli.options import CLEANING, command
from hf_ecif.cli.screen import Result
from hf_ecif.utils.progress import ProgressFactory


@command(ExportRequest, panel=CLEANING)
def export(request: ExportRequest, progress: ProgressFactory) -> Result:
    """Write rows of an audit for other tools: filters, trainers, annotators, viewers.

    Nothing is audited again. `hf-ecif calibrate` reads the verdicts of Label Studio back.
    """
    from hf_ecif.applications.export import run_export
    from hf_ecif.reports.console import export_lines

    exported = run_export(request, progress)
    return Result(asdict(exported), export_lines(exported, request.output))
