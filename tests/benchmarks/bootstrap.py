"""Is one ranking of the same rows better than another? Paired bootstrap over the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def paired_difference(
    wrong: Sequence[Bools], first: Sequence[Floats], second: Sequence[Floats], resamples: int = 1000
) -> dict[str, dict[str, float]]:
    """Mean over seeds of what the first ranking has over the second, with its 95 % interval.

    A resample draws rows once and takes the same ones for both rankings and every seed, which
    differ in what is wrong with which row and not in the rows.

    Args:
        wrong: by seed, ``(N,)``.
        first: by seed, ``(N,)``, higher where more suspicious.
        second: the same of another method.
        resamples: of the rows.

    Returns:
        ``difference``, ``low`` and ``high`` of ``AUPRC`` and ``AUROC``.
    """
    count = len(wrong[0])
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    weights = np.concatenate([np.ones((1, count)), drawn])  # the rows as they are, first
    by_seed = [
        areas(truth, one, weights) - areas(truth, other, weights)
        for truth, one, other in zip(wrong, first, second, strict=True)
    ]
    differences = np.mean(by_seed, axis=0)
    return {name: _interval(differences[i]) for i, name in enumerate(("AUPRC", "AUROC"))}


def verdict(difference: dict[str, float]) -> str:
    """Whether the interval lies on one side of zero."""
    if difference["low"] > 0:
        return "above"
    return "below" if difference["high"] < 0 else "level"


def areas(wrong: Bools, suspicion: Floats, weights: Floats) -> Floats:
    """Areas under the precision-recall and the ROC curve, ``(2, R)``, of weighted rows.

    Args:
        wrong: ``(N,)``.
        suspicion: ``(N,)``; equal values are one step of the curves.
        weights: ``(R, N)``.
    """
    order = np.argsort(-suspicion, kind="stable")
    steps = np.flatnonzero(np.concatenate([[True], np.diff(suspicion[order]) != 0]))
    hits = np.add.reduceat(weights[:, order] * wrong[order], steps, axis=1)
    misses = np.add.reduceat(weights[:, order] * ~wrong[order], steps, axis=1)
    found, flagged = hits.cumsum(axis=1), (hits + misses).cumsum(axis=1)
    total, others = found[:, -1], flagged[:, -1] - found[:, -1]
    with np.errstate(invalid="ignore"):  # steps before the first row drawn
        precision = np.where(flagged > 0, found / flagged, 0.0)
    auprc = (hits * precision).sum(axis=1) / total
    auroc = (misses * (found - hits / 2)).sum(axis=1) / (total * others)
    return np.stack([auprc, auroc])


def _interval(values: Floats) -> dict[str, float]:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"difference": float(values[0]), "low": float(low), "high": float(high)}
