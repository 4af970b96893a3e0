"""How well an attribution predicts the effect of training on parts of the data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]

_DESCRIPTION = """
The linear datamodeling score (LDS): Spearman's rank correlation, over random subsets of the
training rows, between the output that an attribution predicts after training on a subset and the
output after a real training on it. With a bootstrap confidence interval, and with the highest score
that the noise of training allows.
"""

_INPUTS = """
Args:
    predictions: the predicted output for every subset, in any unit. If a row's score is the change
        of the output without it, this is minus the sum of the scores of the subset's rows.
    references: the true output for every subset; a number, or a list of as many numbers as there
        are repeated trainings, which are averaged.
    resamples: bootstrap samples of the subsets; 1000 by default, 0 for none.
    confidence: coverage of the interval; 0.95 by default.
    seed: seed of the bootstrap; 0 by default.

Returns:
    lds: rank correlation in [-1, 1]; higher is better, 0 is chance.
    ci_low, ci_high: percentile bootstrap confidence interval of lds.
    stderr: standard deviation of lds over the bootstrap samples.
    noise_ceiling: the expected LDS of a perfect prediction, in [0, 1], from the agreement of
        repeated trainings.
    subsets, repeats: numbers of both.
    undefined: for every result above that is None, the reason by its name.

Raises:
    ValueError: fewer than three subsets, a value that is missing or not finite, or subsets with
        different numbers of repeats.
"""

_CITATION = """
@inproceedings{park2023trak,
  title = {{TRAK}: Attributing Model Behavior at Scale},
  author = {Park, Sung Min and Georgiev, Kristian and Ilyas, Andrew and Leclerc, Guillaume and
            Madry, Aleksander},
  booktitle = {International Conference on Machine Learning},
  year = {2023}
}
"""

_CONSTANT = "all predictions, or all references, are equal"


class LinearDatamodelingScore(evaluate.Metric):
    """Rank correlation with its sampling error and its ceiling."""

    def _info(self) -> evaluate.MetricInfo:
        predictions = Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                Features(predictions=predictions, references=Value("float64")),
                Features(predictions=predictions, references=List(Value("float64"))),
            ],
        )

    def _compute(  # type: ignore[override]  # evaluate calls it with the names of the features
        self,
        predictions: Sequence[float | None],
        references: Sequence[Any],
        resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        predicted, actual = _check(predictions, references)
        if resamples < 0 or not 0 < confidence < 1:
            raise ValueError(
                f"resamples = {resamples} must not be negative, and confidence = {confidence} must "
                "be between 0 and 1."
            )
        mean = actual.mean(axis=1)
        score = _spearman(predicted, mean)
        undefined = {} if np.isfinite(score) else {"lds": _CONSTANT}
        return {
            "lds": float(score) if np.isfinite(score) else None,
            **_bootstrap(predicted, mean, resamples, confidence, seed, undefined),
            "noise_ceiling": _ceiling(actual, undefined),
            "subsets": len(actual),
            "repeats": actual.shape[1],
            "undefined": undefined,
        }


def _check(predictions: Sequence[float | None], references: Sequence[Any]) -> tuple[Floats, Floats]:
    """Predictions ``(M,)`` and references ``(M, R)``."""
    rows = [row if isinstance(row, Sequence) else [row] for row in references]
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} subsets: a rank correlation needs at least three.")
    for subset, row in enumerate(rows):
        if len(row) != len(rows[0]) or not row:
            raise ValueError(
                f"references[{subset}] has {len(row)} repeats, and references[0] has "
                f"{len(rows[0])}: every subset must have equally many, at least one."
            )
    predicted, actual = np.array(predictions, np.float64), np.array(rows, np.float64)
    for name, values in (("predictions", predicted[:, None]), ("references", actual)):
        for subset in np.flatnonzero(~np.isfinite(values).all(axis=1))[:1]:
            raise ValueError(
                f"{name}[{subset}] is missing or not finite: leave the subset out, here and in the "
                "other column."
            )
    return predicted, actual


def _bootstrap(
    predicted: Floats,
    actual: Floats,
    resamples: int,
    confidence: float,
    seed: int,
    undefined: dict[str, str],
) -> dict[str, float | None]:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(actual), size=(resamples, len(actual)))
    scores = _spearman(predicted[chosen], actual[chosen])
    scores = scores[np.isfinite(scores)]  # a resample may be constant by chance
    names = ("stderr", "ci_low", "ci_high")
    if not len(scores):
        undefined |= dict.fromkeys(names, _CONSTANT if resamples else "resamples = 0")
        return dict.fromkeys(names)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(scores, [tail, 100 - tail])
    return dict(zip(names, (float(scores.std()), float(low), float(high)), strict=True))


def _ceiling(actual: Floats, undefined: dict[str, str]) -> float | None:
    """Highest score that a perfect prediction can reach, by the Spearman-Brown formula.

    If single trainings correlate with ``r`` on average, the mean of ``R`` of them has the
    reliability ``R r / (1 + (R - 1) r)``; its square root is the correlation of the mean with
    values that are free of noise.
    """
    repeats = actual.shape[1]
    if repeats < 2:
        undefined["noise_ceiling"] = "their noise is only known from repeated trainings"
        return None
    pairs = combinations(actual.T, 2)
    agreement = float(np.mean([_spearman(one, other) for one, other in pairs]))
    if not np.isfinite(agreement):
        undefined["noise_ceiling"] = "all references of one of the repeats are equal"
        return None
    agreement = max(agreement, 0.0)
    return float(np.sqrt(repeats * agreement / (1 + (repeats - 1) * agreement)))


def _spearman(left: Floats, right: Floats) -> Floats:
    """Rank correlation along the last dimension, ties sharing their rank; nan where constant."""
    ranks = [rankdata(values, axis=-1) for values in (left, right)]
    first, second = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    size = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    with np.errstate(invalid="ignore"):
        return np.asarray((first * second).sum(axis=-1) / size)
