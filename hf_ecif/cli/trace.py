"""``hf-ecif trace``: which training pairs are behind a misprediction?"""

from __future__ import annotations

from hf_ecif.applications.requests import TraceRequest
from hf_ecif.cli.options import MODELS, command
from hf_ecif.cli.screen import Result
from hf_ecif.config import InfluenceConfig
from hf_ecif.utils.progress import ProgressFactory


@command(TraceRequest, InfluenceConfig, panel=MODELS, without=("relative",))
def trace(request: TraceRequest, config: InfluenceConfig, progress: ProgressFactory) -> Result:
    """Trace mispredictions of the query to the training pairs that are responsible.

    A pair is responsible through one of its roles: as a positive, or as a hard negative. What it
    contributed is how far, without it in this role, the log-odds against the right answer are
    predicted to fall, over the square root of the size of the change that its removal causes. Those
    that contributed most come first.

    OUTPUT gets `trace.html` (each error beside what was predicted instead, and the pairs behind it,
    with the role of each), `trace.parquet` (a row for every error and pair) and `summary.json`.
    """
    from hf_ecif.applications.trace import run_trace
    from hf_ecif.reports.console import trace_lines

    summary = run_trace(request, config, progress)
    return Result(summary.to_dict(), trace_lines(summary, request.output))
