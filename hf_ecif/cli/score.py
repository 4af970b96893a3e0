"""``hf-ecif score``: rows with a fit."""

from __future__ import annotations

from hf_ecif.applications.requests import ScoreRequest
from hf_ecif.cli.options import MANY, command
from hf_ecif.cli.screen import Result
from hf_ecif.utils.progress import ProgressFactory


@command(ScoreRequest, panel=MANY)
def score(request: ScoreRequest, progress: ProgressFactory) -> Result:
    """Score any number of rows with a fit, in flat memory.

    OUTPUT gets `scored/` (parquet, opened by `load_dataset`) and `scoring.json`. Rows are scored in
    blocks, each among itself; shuffle rows that are sorted. Start it with `torchrun` to share the
    blocks among processes.
    """
    from hf_ecif.applications.score import run_score
    from hf_ecif.reports.console import scoring_lines

    summary = run_score(request, progress)
    return Result(summary, scoring_lines(summary, request.output))
