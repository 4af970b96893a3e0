"""Tasks on top of the engine, from sources to files: validate a prediction, remove rows."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ecif import processes
from hf_ecif.config import InfluenceConfig
from hf_ecif.data import read_flags
from hf_ecif.errors import UserError
from hf_ecif.features import Rows
from hf_ecif.files import write_json
from hf_ecif.progress import ProgressFactory, silent
from hf_ecif.sources import Opened, Sources, open_sources
from hf_ecif.validation import Validation, validate
from hf_ecif.viz import validation_scatter


@dataclass(frozen=True, kw_only=True)
class ValidateRequest(Sources):
    """What to validate; the fields are the options of ``hf-ecif validate``."""

    output: Path
    subsets: int = 32
    removed_share: float = 0.5
    repeats: int = 2


@dataclass(frozen=True, kw_only=True)
class RemoveRequest(Sources):
    """What to remove; the fields are the options of ``hf-ecif remove``."""

    where: str
    output: Path
    steps: int = 2
    retrain: bool = False


def run_validate(
    request: ValidateRequest, config: InfluenceConfig, progress: ProgressFactory = silent
) -> Validation:
    """Compare predicted with true retrainings; writes ``validation.json`` and ``.png``.

    Raises:
        UserError: something in the request cannot be.
    """
    if request.subsets < 4:
        raise UserError(f"--subsets {request.subsets}: a rank correlation needs at least 4.")
    if not 0 < request.removed_share < 1:
        raise UserError(f"--removed-share {request.removed_share}: must be between 0 and 1.")
    if config.fit_epochs == 0:
        raise UserError("--fit-epochs 0 retrains nothing, so there is nothing to compare with.")
    processes.decide(lambda: _require_new(request.output))
    opened = open_sources(request, config)
    rows, query = opened.read(progress)
    opened.model.fit(rows, query, progress)
    result = validate(
        opened.model,
        rows,
        query,
        subsets=request.subsets,
        removed_share=request.removed_share,
        repeats=request.repeats,
        progress=progress,
    )
    if processes.is_main():
        request.output.mkdir(parents=True, exist_ok=True)
        _plot(result, request.output / "validation.png")
        summary = asdict(result) | {"verdict": result.verdict, "config": config.to_dict()}
        write_json(summary, request.output / "validation.json")
    return result


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
    processes.decide(lambda: _require_new(request.output))
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


def _plot(result: Validation, path: Path) -> None:
    figure = validation_scatter(
        np.array(result.predicted),
        np.array(result.actual),
        f"rank correlation {result.spearman:.2f} ({result.low:.2f} to {result.high:.2f})",
    )
    figure.savefig(path, dpi=150, facecolor="white")


def _retrain(opened: Opened, remaining: Rows, query: Rows) -> dict[str, float]:
    start = time.perf_counter()
    theta = opened.model.refit(remaining)
    seconds = time.perf_counter() - start
    return {"query": opened.model.query_value(query, theta).item(), "seconds": seconds}


def _require_new(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty. Give a new folder.")
