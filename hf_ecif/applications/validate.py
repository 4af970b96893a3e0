"""Do predictions hold on these data? From sources to files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import ValidateRequest
from hf_ecif.applications.sources import open_sources
from hf_ecif.applications.validation import Validation, validate
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.summary import ValidationSummary
from hf_ecif.errors import UserError
from hf_ecif.reports.figures import validation_scatter
from hf_ecif.reports.outcomes import write_validation_page
from hf_ecif.utils import distributed
from hf_ecif.utils.progress import ProgressFactory, silent


def run_validate(
    request: ValidateRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> ValidationSummary:
    """Compare predicted with true retrainings; writes ``validation.json``, ``.html`` and ``.png``.

    Returns:
        What ``validation.json`` holds.

    Raises:
        UserError: something in the request cannot be.
    """
    if not 0 < request.removed_share < 1:
        raise UserError(f"`removed_share={request.removed_share}`: must be between 0 and 1.")
    if config.fit_epochs == 0:
        raise UserError("`fit_epochs=0` retrains nothing, so there is nothing to compare with.")
    distributed.decide(lambda: require_free(request.output))
    opened = open_sources(request, config)
    rows, query = opened.read(progress)
    influence = opened.model.fit(rows, query, progress)
    result = validate(
        influence,
        query,
        subsets=request.subsets,
        removed_share=request.removed_share,
        repeats=request.repeats,
        progress=progress,
    )

    def write() -> ValidationSummary:
        summary = ValidationSummary(
            **opened.provenance(rows, query),
            **asdict(result),
            verdict=result.verdict,
            repeats=request.repeats,
            warnings=list(opened.warnings(rows, query)),
        )
        request.output.mkdir(parents=True, exist_ok=True)
        _plot(result, request.output / "validation.png")
        summary.save(request.output / "validation.json")
        write_validation_page(summary, request.output / "validation.html")
        return summary

    return distributed.decide(write)


def _plot(result: Validation, path: Path) -> None:
    figure = validation_scatter(
        np.array(result.predicted),
        np.array(result.actual),
        f"rank correlation {result.spearman:.2f} ({result.low:.2f} to {result.high:.2f})",
    )
    figure.savefig(path, dpi=150, facecolor="white")
