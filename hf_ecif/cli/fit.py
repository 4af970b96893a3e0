"""``hf-ecif fit``: once, for any number of rows."""

from __future__ import annotations

from hf_ecif.applications.requests import FitRequest
from hf_ecif.cli.options import MANY, command
from hf_ecif.cli.screen import Result
from hf_ecif.config import InfluenceConfig
from hf_ecif.utils.progress import ProgressFactory


@command(FitRequest, InfluenceConfig, panel=MANY)
def fit(request: FitRequest, config: InfluenceConfig, progress: ProgressFactory) -> Result:
    """Fit once; `hf-ecif score` then scores any number of rows, here or elsewhere.

    OUTPUT gets the model, the processor and the fit: `from_pretrained` reads it, and `hf-ecif push`
    publishes it.
    """
    from hf_ecif.applications.fit import run_fit
    from hf_ecif.reports.console import fit_lines

    fitted = run_fit(request, config, progress).fitted
    warnings = [
        f"The solve for the {purpose}: {report.advice}."
        for purpose, report in fitted.solvers.items()
        if not report.converged
    ]
    lines = fit_lines(
        fitted.train_count,
        fitted.query_loss_before,
        fitted.query_loss,
        warnings,
        request.output,
    )
    return Result(fitted.to_state().values, lines)
