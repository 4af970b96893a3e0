"""From sources to a saved fit."""

from __future__ import annotations

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import FitRequest
from hf_ecif.applications.sources import open_sources
from hf_ecif.config import InfluenceConfig
from hf_ecif.influence.influence import Influence
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.files import CHECKPOINTS, FIT, sweep
from hf_ecif.utils.progress import ProgressFactory, silent


def run_fit(
    request: FitRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> Influence:
    """Fit, and save what scoring needs into a folder.

    Raises:
        UserError: something in the request cannot be.
    """
    distributed.decide(
        lambda: require_free(
            request.output,
            finished=FIT,
            resume=request.resume,
            overwrite=request.overwrite,
        )
    )
    opened = open_sources(request, config)
    manifest = config.deciding() | opened.fingerprints() | opened.manifest()
    known = Checkpoints.open(request.output / CHECKPOINTS, manifest, resume=request.resume)
    rows, query = opened.read(progress, known)
    influence = opened.model.fit(rows, query, progress, known)
    if distributed.is_main():
        influence.save_pretrained(request.output)
        sweep(request.output)
        known.clear()
    return influence
