"""Remove rows from a model: from sources to files."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_ecif import processes
from hf_ecif.applications.outputs import require_new
from hf_ecif.config import InfluenceConfig
from hf_ecif.data import read_flags
from hf_ecif.features import Rows
from hf_ecif.files import write_json
from hf_ecif.progress import ProgressFactory, silent
from hf_ecif.sources import Opened, Sources, open_sources


@dataclass(frozen=True, kw_only=True)
class RemoveRequest(Sources):
    """What to remove; the fields are the options of ``hf-ecif remove``."""

    where: str
    output: Path
    steps: int = 2
    retrain: bool = False


def run_remove(
    request: RemoveRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> dict[str, Any]:
    """Save a model without the influence of some rows, and ``removal.json``.

    Returns:
        The content of ``removal.json``: the query before and after, the predicted change, how the
        removal went and, if asked for, what a retraining gives.

    Raises:
        UserError: something in the request cannot be.
    """
    processes.decide(lambda: require_new(request.output))
    opened = open_sources(request, config)
    model = opened.model
    wanted = read_flags(opened.dataset, request.where, "--where", "is to be removed")
    rows, query = opened.read(progress)
    members = torch.from_numpy(wanted)[rows.positions]
    fitted = model.fit(rows, query, progress)
    predicted = model.score_group(rows, members).task.item()
    start = time.perf_counter()
    theta, report = model.remove(rows, members, steps=request.steps, progress=progress)
    summary = {
        "model": request.model,
        "dataset": request.dataset,
        "split": request.split,
        "where": request.where,
        "rows": len(rows),
        "removal": asdict(report),
        "seconds": time.perf_counter() - start,
        "query": {
            "before": fitted.query_loss,
            "predicted": fitted.query_loss + predicted,
            "after": model.query_value(query, theta).item(),
        },
        "config": config.to_dict(),
    }
    if request.retrain:
        summary["retrained"] = _retrain(opened, rows.select((~members).nonzero()[:, 0]), query)
    if processes.is_main():
        model.save_edited(theta, request.output)
        write_json(summary, request.output / "removal.json")
    return summary


def _retrain(opened: Opened, remaining: Rows, query: Rows) -> dict[str, float]:
    start = time.perf_counter()
    theta = opened.model.refit(remaining)
    seconds = time.perf_counter() - start
    return {"query": opened.model.query_value(query, theta).item(), "seconds": seconds}
