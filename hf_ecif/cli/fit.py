"""``hf-ecif fit``: once, for any number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ecif.cli.options import (
    Json,
    Overwrite,
    Quiet,
    Resume,
    bars,
    command,
    print_json,
    resumable,
)
from hf_ecif.config import InfluenceConfig


@command()
def fit(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="Folder for the fitted influence.")],
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: InfluenceConfig,
) -> None:
    """Fit once; `hf-ecif score` then scores any number of rows, here or elsewhere.

    OUTPUT gets the model, the processor and the fit: `from_pretrained` reads it, and `hf-ecif push`
    publishes it.
    """
    from hf_ecif.applications.fit import FitRequest, run_fit

    request = FitRequest(**sources, output=output, overwrite=overwrite, resume=resume)
    with bars(quiet, as_json) as (console, progress), resumable():
        fitted = run_fit(request, config, progress).fitted
    console.print(
        f"Fitted on {fitted.train_count:,} rows: the query's loss is {fitted.query_loss:.4f}, "
        f"{fitted.query_loss_before:.4f} before."
    )
    for purpose, report in fitted.solvers.items():
        if not report.converged:
            console.print(f"[yellow]Warning:[/] the solve for the {purpose}: {report.advice}.")
    console.print(f"Influence: {output}", highlight=False, soft_wrap=True, markup=False)
    print_json(as_json, fitted.to_state().values)
