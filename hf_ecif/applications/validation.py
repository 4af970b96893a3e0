"""Validation of scores: predicted changes of the query beside those of true retrainings.

The model is retrained on random subsets of the training rows, with the settings of its fit. The
correlation of true and predicted query losses is the *linear datamodeling score* (Park et al.,
2023) if the subsets are halves, and its counterpart for smaller removals if they are larger.

Retrainings on the same rows differ by the order of their batches. This noise cannot be predicted
and lowers every correlation: the *ceiling* is the expected correlation of a perfect prediction,
from the agreement of repeated retrainings.
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
from hf_ecif.influence.loaded import AnyRows
from hf_ecif.utils.formatting import share
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import derive, stream

Floats = NDArray[np.float64]
# An interval that contains both does not show whether the scores are worth anything.
UNDECIDED = (0.3, 0.8)
WORTH = {  # by how much of the ceiling the lower end of the interval reaches at least
    0.8: "predict the order of retrainings",
    0.5: "predict much of the order of retrainings",
    0.0: "point the right way",
}


@dataclass(frozen=True)
class Validation:
    """Predicted and true changes of the query over ``M`` retrainings, in the query's units.

    Attributes:
        removed_share: share of the rows that are removed for every retraining.
        predicted: sum of the scores of the removed rows, ``(M,)``.
        actual: query after retraining without them minus that after retraining on all, ``(M,)``,
            averaged over the repeats.
        spearman: rank correlation of both; nan if either is constant.
        low: 2.5th percentile of `spearman` over resampled subsets.
        high: 97.5th percentile of `spearman` over resampled subsets.
        ceiling: `spearman` expected of a perfect prediction; None without repeats.
        slope: slope of actual on predicted changes; one if their size is right.
        sign_agreement: share of the pairs of subsets whose order is predicted correctly.
        signs_right: share of the subsets whose effect, help or harm, is predicted correctly; None
            where all true changes have one sign, so that any constant guess is right.
        seconds: time of one retraining.
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
    signs_right: float | None
    seconds: float

    @property
    def verdict(self) -> str:
        """Meaning of the correlation in words, given its ceiling."""
        if not math.isfinite(self.spearman):
            return "Neither side varies, so there is nothing to rank: try a larger `removed_share`."
        if self.ceiling == 0:
            return (
                "Retrainings on the same rows differ as much as those on different ones, which "
                "nothing can predict: try more `repeats` or a larger `removed_share`."
            )
        ceiling = self.ceiling or 1
        reached = self.low / ceiling
        if reached < UNDECIDED[0] and self.high / ceiling > UNDECIDED[1]:
            return "These are too few subsets to tell: try more `subsets`."
        for least, what in WORTH.items():
            if reached > least:
                return f"The scores {what} on these data{self._on_signs}."
        return (
            "The scores do not predict retrainings on these data: use them to find candidates, "
            "not to predict. A larger query may help, a gentler fit (`fit_learning_rate`), or the "
            "unrolled response, if this was the stationary one."
        )

    @property
    def _on_signs(self) -> str:
        """What is known about help and harm, after a verdict on the order."""
        if self.signs_right is not None:
            return f", and tell help from harm in {share(self.signs_right)} of them"
        side = "hurt" if self.actual[0] > 0 else "helped"
        return f"; all removals {side}, so whether they tell help from harm is not known"


def validate(
    influence: Influence,
    query: AnyRows,
    *,
    subsets: int = 64,
    removed_share: float = 0.5,
    repeats: int = 2,
    progress: ProgressFactory = silent,
) -> Validation:
    """Comparison of scores with retrainings of the attributed parameters on random subsets.

    Args:
        influence: influence of the training rows on ``query``.
        query: the query.
        subsets: number of subsets.
        removed_share: share of the rows removed from each; 0.5 for the linear datamodeling score.
        repeats: retrainings of each subset that are averaged, each with its own order of batches.
        progress: makes a progress bar.

    Raises:
        UserError: a subset would have fewer than two rows.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> influence = model.fit(pairs, demo.query)
        >>> found = hf_ecif.validate(influence, demo.query, subsets=4, repeats=1)
        >>> -1 <= found.spearman <= 1
        True
    """
    seed, count = influence.config.seed, len(influence.rows)
    asked = influence.model.rows(query)
    generator = stream(seed, "subsets")
    scores = influence.scores().task
    if not 0 < math.ceil(removed_share * count) <= count - 2:
        raise UserError(
            f"Without {share(removed_share)} of the {count} rows, fewer than two are left to train "
            "on: give a smaller `removed_share`, or more rows."
        )
    gone = torch.stack(
        [torch.randperm(count, generator=generator) < removed_share * count for _ in range(subsets)]
    )
    advance = progress("Retrain", (subsets + 1) * repeats)

    def retrain(members: Tensor) -> Floats:
        losses = []
        for number in range(repeats):
            theta = influence.refit(members, seed=derive(seed, "retraining", number))
            losses.append(influence.model.query_value(asked, theta).mean().item())
            advance(1)
        return np.array(losses)

    whole = retrain(torch.zeros(count, dtype=torch.bool)).mean()
    start = time.perf_counter()
    actual = np.stack([retrain(members) for members in gone])
    seconds = (time.perf_counter() - start) / actual.size
    return compare(_sums(scores, gone), actual - whole, removed_share, seconds)


def compare(predicted: Floats, actual: Floats, removed_share: float, seconds: float) -> Validation:
    """Statistics of predicted changes ``(M,)`` and repeated true ones ``(M, R)``."""
    metric = metrics.load("linear_datamodeling_score")
    found = metric.compute(predictions=predicted, references=actual.tolist())
    low, score, high = (
        np.nan if found[name] is None else found[name] for name in ("ci_low", "lds", "ci_high")
    )
    mean = actual.mean(axis=1)
    centred = predicted - predicted.mean()
    first, second = np.triu_indices(len(mean), 1)
    order = (predicted[first] - predicted[second]) * (mean[first] - mean[second])
    has_both = bool((mean > 0).any() and (mean < 0).any())
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
        signs_right=float((predicted * mean > 0).mean()) if has_both else None,
        seconds=seconds,
    )


def _sums(scores: Tensor, gone: Tensor) -> Floats:
    return (gone.double() @ scores.double()).numpy()
