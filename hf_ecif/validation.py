"""Does it hold on these data? Predicted changes of the query beside those of true retrainings.

Random subsets of the training rows are retrained on, with the recipe that the model itself was
fitted with. The correlation of their true query losses with the predicted ones is the *linear
datamodeling score* (Park et al., 2023) where the subsets are halves, and says the same of smaller
removals where they are larger.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from hf_ecif.features import Rows
from hf_ecif.influence import InfluenceModel
from hf_ecif.progress import ProgressFactory, silent

Floats = NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True)
class Validation:
    """Predicted and true changes of the query over ``M`` retrainings, in the query's units.

    Attributes:
        removed_share: share of the rows that every subset goes without.
        predicted: sum of the scores of the rows that are gone, ``(M,)``.
        actual: query after retraining without them minus that after retraining on all, ``(M,)``.
        spearman: rank correlation of the two.
        low: 2.5th percentile of it over resampled subsets.
        high: 97.5th percentile.
        slope: of actual on predicted changes, one where their size is right.
        sign_agreement: share of the pairs of subsets whose order is predicted right.
        seconds: of one retraining.
    """

    removed_share: float
    predicted: list[float]
    actual: list[float]
    spearman: float
    low: float
    high: float
    slope: float
    sign_agreement: float
    seconds: float

    @property
    def verdict(self) -> str:
        """What the correlation means, in words."""
        if self.low >= 0.8:
            return "The scores foretell retrainings on these data."
        if self.low >= 0.5:
            return "The scores rank the effect of retrainings well on these data."
        if self.low > 0:
            return "The scores point the right way on these data, but do not measure."
        return (
            "The scores do not foretell retrainings on these data: use them to find candidates, "
            "not to predict. A larger query may help, a gentler fit (--fit-learning-rate), or the "
            "unrolled response, if this was the stationary one."
        )


def validate(
    model: InfluenceModel,
    train: Rows,
    query: Rows,
    *,
    subsets: int = 32,
    removed_share: float = 0.5,
    repeats: int = 2,
    progress: ProgressFactory = silent,
) -> Validation:
    """Retrain the attributed parameters on random subsets and compare with the scores.

    Args:
        model: fitted on ``train`` for ``query``.
        train: the training rows.
        query: the query.
        subsets: number of retrained subsets.
        removed_share: of the rows that each goes without: 0.5 for the linear datamodeling score.
        repeats: retrainings of each subset that are averaged, each with its own order of batches.
        progress: makes a progress bar.
    """
    generator = torch.Generator().manual_seed(model.config.seed + 3)
    scores = model.score(train).task
    count = len(train)
    gone = torch.stack(
        [torch.randperm(count, generator=generator) < removed_share * count for _ in range(subsets)]
    )
    advance = progress("Retrain", (subsets + 1) * repeats)

    def average(rows: Rows) -> float:
        losses = []
        for repeat in range(repeats):
            theta = model.refit(rows, seed=model.config.seed + 100 + repeat)
            losses.append(model.query_value(query, theta).mean().item())
            advance(1)
        return float(np.mean(losses))

    whole = average(train)
    start = time.perf_counter()
    actual = np.array([average(train.select((~members).nonzero()[:, 0])) for members in gone])
    seconds = (time.perf_counter() - start) / (subsets * repeats)
    return compare(_sums(scores, gone), actual - whole, removed_share, seconds)


def compare(predicted: Floats, actual: Floats, removed_share: float, seconds: float) -> Validation:
    """The statistics of predicted and true changes ``(M,)``."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(actual), size=(RESAMPLES, len(actual)))
    resampled = [_spearman(predicted[pick], actual[pick]) for pick in picks]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    centred = predicted - predicted.mean()
    first, second = np.triu_indices(len(actual), 1)
    order = (predicted[first] - predicted[second]) * (actual[first] - actual[second])
    return Validation(
        removed_share=removed_share,
        predicted=predicted.tolist(),
        actual=actual.tolist(),
        spearman=_spearman(predicted, actual),
        low=float(low),
        high=float(high),
        slope=float(centred @ (actual - actual.mean()) / (centred @ centred)),
        sign_agreement=float((order > 0).mean()),
        seconds=seconds,
    )


def _sums(scores: Tensor, gone: Tensor) -> Floats:
    return (gone.double() @ scores.double()).numpy()


def _spearman(left: Floats, right: Floats) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(spearmanr(left, right).statistic)
