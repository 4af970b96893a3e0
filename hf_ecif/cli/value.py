"""``hf-ecif value``: which pairs help, which hurt, and what would new ones bring?"""

from __future__ import annotations

from hf_ecif.applications.requests import ValueRequest
from hf_ecif.cli.options import MODELS, command
from hf_ecif.cli.screen import Result
from hf_ecif.config import InfluenceConfig
from hf_ecif.utils.progress import ProgressFactory


@command(ValueRequest, InfluenceConfig, panel=MODELS, without=("relative",), response="unrolled")
def value(request: ValueRequest, config: InfluenceConfig, progress: ProgressFactory) -> Result:
    """Rank pairs by what they do to a query, and to slices of it.

    A negative score is harmful: without the pair the query's loss should fall. Of a candidate a
    negative value is good: with it, the loss should fall.

    OUTPUT gets `value.html` with the pairs to look at, `value.parquet` with the scores of all rows,
    `candidates.parquet`, and `summary.json`.
    """
    from hf_ecif.applications.value import run_value
    from hf_ecif.reports.console import value_lines

    summary = run_value(request, config, progress)
    return Result(summary.to_dict(), value_lines(summary, request.output))
