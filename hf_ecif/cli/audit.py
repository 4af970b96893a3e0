"""``hf-ecif audit``: find what looks wrong."""

from __future__ import annotations

from hf_ecif.applications.requests import AuditRequest
from hf_ecif.cli.options import CLEANING, command
from hf_ecif.cli.screen import Result
from hf_ecif.config import InfluenceConfig
from hf_ecif.utils.progress import ProgressFactory


@command(AuditRequest, InfluenceConfig, panel=CLEANING)
def audit(request: AuditRequest, config: InfluenceConfig, progress: ProgressFactory) -> Result:
    """Score every pair, flag those that look misaligned, and write data and report to OUTPUT.

    OUTPUT gets `scored/`, `kept/` and `removed/` (parquet, opened by `load_dataset`),
    `summary.json` and `report.html`.

    A **negative** `ecif_score` is harmful: without the pair, the query's loss is predicted to fall.
    A **positive** one is valuable.
    """
    # Imported late, here and in every command: torch takes seconds, and --help should not.
    from hf_ecif.applications.audit import run_audit
    from hf_ecif.reports.console import audit_lines

    summary = run_audit(request, config, progress)
    return Result(summary.to_dict(), audit_lines(summary, request.output))
