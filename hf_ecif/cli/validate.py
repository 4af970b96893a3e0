"""``hf-ecif validate``: predictions against retrainings."""

from __future__ import annotations

from hf_ecif.applications.requests import ValidateRequest
from hf_ecif.cli.options import MODELS, command
from hf_ecif.cli.screen import Result
from hf_ecif.config import InfluenceConfig
from hf_ecif.utils.progress import ProgressFactory


@command(ValidateRequest, InfluenceConfig, panel=MODELS, without=("relative",), response="unrolled")
def validate(
    request: ValidateRequest, config: InfluenceConfig, progress: ProgressFactory
) -> Result:
    """Do the scores hold on your data? Compare them with true retrainings.

    The attributed parameters are retrained without random parts of the data. The rank correlation
    of the query's true and predicted loss (with half of the rows gone: the linear datamodeling
    score) says how far to trust the scores. Repeated retrainings tell what could be reached at all.

    OUTPUT gets `validation.json`, a plot and a page, `validation.html`.
    """
    from hf_ecif.applications.validate import run_validate
    from hf_ecif.reports.console import validation_lines

    summary = run_validate(request, config, progress)
    return Result(summary.to_dict(), validation_lines(summary, request.output))
