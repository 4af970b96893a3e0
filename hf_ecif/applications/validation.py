"""Does it hold on these data? Predicted changes of the query beside those of true retrainings.

Random subsets of the training rows are retrained on, with the recipe that the model itself was
fitted with. The correlation of their true query losses with the predicted ones is the *linear
datamodeling score* (Park et al., 2023) where the subsets are halves, and says the same of smaller
removals where they are larger.

Two retrainings on the same rows differ, too, by the order of their batches. What is so random
cannot be predicted, and holds every correlation down: the *ceiling* is what a perfect prediction
would be expected to reach, from how far repeated retrainings agree.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif import metrics
from hf_ecif.errors import UserError
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.progress import ProgressFactory, silent

Floats = NDArray[np.float64]
# An interval that reaches from one to the other leaves open whether the scores are worth anything.
UNDECIDED = (0.3, 0.8)


@dataclass(frozen=True)
class Validation:
    """Predicted and true changes of the query over ``M`` retrainings, in the query's units.

    Attributes:
        removed_share: share of the rows that every subset goes without.
        predicted: sum of the scores of the rows that are gone, ``(M,)``.
        actual: query after retraining without them minus that after retraining on all, ``(M,)``,
            the mean over the repeats.
        spearman: rank correlation of the two; nan where either is constant.
        low: 2.5th percentile of it over resampled subsets.
        high: 97.5th percentile.
        ceiling: of `spearman`, that of a perfect prediction; None of single retrainings.
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
    ceiling: float | None
    slope: float
    sign_agreement: float
    seconds: float

    @property
    def verdict(self) -> str:
        """What the correlation means, in words, given what can be reached."""
        if not math.isfinite(self.spearman):
            return "Neither side varies, so there is nothing to rank: try a larger --removed-share."
        if self.ceiling == 0:
            return (
                "Retrainings on the same rows differ as much as those on different ones, which "
                "nothing can predict: try more --repeats or a larger --removed-share."
            )
        ceiling = self.ceiling or 1
        reached = self.low / ceiling
        if reached < UNDECIDED[0] and self.high / ceiling > UNDECIDED[1]:
            return "These are too few subsets to tell: try more --subsets."
        if reached >= 0.8:
            return "The scores predict retrainings on these data."
        if reached >= 0.5:
            return "The scores predict well which removals help or hurt on these data."
        if reached > 0:
            return "The scores point the right way on these data, but do not measure."
        return (
            "The scores do not predict retrainings on these data: use them to find candidates, "
            "not to predict. A larger query may help, a gentler fit (--fit-learning-rate), or the "
            "unrolled response, if this was the stationary one."
        )


def validate(
    influence: Influence,
    query: Rows,
    *,
    subsets: int = 64,
    removed_share: float = 0.5,
    repeats: int = 2,
    progress: ProgressFactory = silent,
) -> Validation:
    """Retrain the attributed parameters on random subsets and compare with the scores.

    Args:
        influence: of a fit for ``query``, with its training rows.
        query: the query.
        subsets: number of retrained subsets.
        removed_share: of the rows that each goes without: 0.5 for the linear datamodeling score.
        repeats: retrainings of each subset that are averaged, each with its own order of batches.
        progress: makes a progress bar.

    Raises:
        UserError: a subset would have fewer than two rows.
    """
    seed, count = influence.config.seed, len(influence.rows)
    generator = torch.Generator().manual_seed(seed + 3)
    scores = influence.scores().task
    if not 0 < math.ceil(removed_share * count) <= count - 2:
        raise UserError(
            f"Without {removed_share:.1%} of the {count} rows, fewer than two are left to train "
            "on: give a smaller --removed-share, or more rows."
        )
    gone = torch.stack(
        [torch.randperm(count, generator=generator) < removed_share * count for _ in range(subsets)]
    )
    advance = progress("Retrain", (subsets + 1) * repeats)

    def retrain(members: Tensor) -> Floats:
        losses = []
        for number in range(repeats):
            theta = influence.refit(members, seed=seed + 100 + number)
            losses.append(influence.model.query_value(query, theta).mean().item())
            advance(1)
        return np.array(losses)

    whole = retrain(torch.zeros(count, dtype=torch.bool)).mean()
    start = time.perf_counter()
    actual = np.stack([retrain(members) for members in gone])
    seconds = (time.perf_counter() - start) / actual.size
    return compare(_sums(scores, gone), actual - whole, removed_share, seconds)


def compare(predicted: Floats, actual: Floats, removed_share: float, seconds: float) -> Validation:
    """The statistics of predicted ``(M,)`` and repeated true changes ``(M, R)``."""
    metric = metrics.load("linear_datamodeling_score")
    found = metric.compute(predictions=predicted, references=actual.tolist())
    low, score, high = (
        np.nan if found[name] is None else found[name] for name in ("ci_low", "lds", "ci_high")
    )
    mean = actual.mean(axis=1)
    centred = predicted - predicted.mean()
    first, second = np.triu_indices(len(mean), 1)
    order = (predicted[first] - predicted[second]) * (mean[first] - mean[second])
    return Validation(
        removed_share=removed_share,
        predicted=predicted.tolist(),
        actual=mean.tolist(),
        spearman=score,
        low=low,
        high=high,
        ceiling=found["noise_ceiling"],
        slope=float(centred @ (mean - mean.mean()) / (centred @ centred)),
        sign_agreement=float((order > 0).mean()),
        seconds=seconds,
    )


def _sums(scores: Tensor, gone: Tensor) -> Floats:
    return (gone.double() @ scores.double()).numpy()
