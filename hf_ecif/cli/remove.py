"""``hf-ecif remove``: rows from a model."""

from __future__ import annotations

from hf_ecif.applications.requests import RemoveRequest
from hf_ecif.cli.options import MODELS, command
from hf_ecif.cli.screen import Result
from hf_ecif.config import InfluenceConfig
from hf_ecif.utils.progress import ProgressFactory


@command(RemoveRequest, InfluenceConfig, panel=MODELS, without=("relative",))
def remove(request: RemoveRequest, config: InfluenceConfig, progress: ProgressFactory) -> Result:
    """Remove rows from the model in closed form, as if it had been trained without them.

    The attributed parameters are first brought near their optimum on all rows; `--fit-epochs 0`
    takes the model as it is, if these rows trained it. OUTPUT gets a model that `from_pretrained`
    loads, `removal.json` and a page, `removal.html`.
    """
    from hf_ecif.applications.remove import run_remove
    from hf_ecif.reports.console import removal_lines

    summary = run_remove(request, config, progress)
    return Result(summary.to_dict(), removal_lines(summary, request.output))
