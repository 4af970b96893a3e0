"""Which rows are misaligned: probability, threshold and noise rate, from columns and no labels.

No threshold holds for every model and data set, and no row says whether it is wrong. But wrong pairs
can be *made*: `planted` rows are rows of the same data whose captions were exchanged on purpose, put
through the same fit and the same scoring. They are what misaligned rows look like to this model. The
data themselves are a mixture of such rows and good ones, in unknown proportion. Learning from known
positives and a mixture is positive-unlabelled learning:

1. a logistic regression tells planted rows from the data; its odds give the density ratio
   ``r(x) = f_wrong(x) / f_data(x)`` (Elkan and Noto, 2008);
2. the noise rate is the largest share of ``f_wrong`` that fits under ``f_data``, by best-bin
   estimation (Garg et al., 2021);
3. a row's probability of being wrong is ``rate * r(x)``, and the threshold is the one that
   maximises the expected F1 under these probabilities. Where the rate is within its own error of
   none, that would flag rows for the sake of flagging; there the threshold is one half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """Result of `detect`.

    Attributes:
        probability: ``(N,)``, of being misaligned, in [0, 1].
        flag: ``(N,)``, whether the probability is above the threshold.
        threshold: the cut that maximises the expected F1, or 0.5 where the noise rate is too small
            to be told from none.
        noise_rate: estimated share of misaligned rows.
        planted_auroc: how well the signals tell planted rows from the data, without labels: 0.5 is
            not at all. Misaligned rows among the data hold it below 1.
    """

    probability: Floats
    flag: NDArray[np.bool_]
    threshold: float
    noise_rate: float
    planted_auroc: float


def detect(signals: Floats, reference: Floats, planted: Floats) -> Detection:
    """Probability, threshold and noise rate from signals of the data and of planted rows.

    Args:
        signals: ``(N, S)``, of the data, to be judged.
        reference: ``(R, S)``, of the rows that were left as they are in the runs with planted rows.
        planted: ``(M, S)``, of the rows whose captions were exchanged on purpose in these runs.

    Raises:
        ValueError: no planted rows, or signals that are not finite.
    """
    if not len(planted):
        raise ValueError("Without planted rows there is nothing to learn from.")
    ratio = _density_ratio(reference, planted)
    data_ratio, planted_ratio = ratio(signals), ratio(planted)
    rate, error = _mixture_share(data_ratio, planted_ratio)
    probability = np.clip(rate * data_ratio, 0.0, 1.0)
    threshold = _best_expected_f1(probability) if rate > error else 0.5
    return Detection(
        probability=probability,
        flag=probability > threshold,
        threshold=threshold,
        noise_rate=rate,
        planted_auroc=_auroc(planted_ratio, ratio(reference)),
    )


def _density_ratio(reference: Floats, planted: Floats) -> Callable[[Floats], Floats]:
    """``x -> f_wrong(x) / f_data(x)``, from the odds of a logistic regression.

    Influence has heavy tails; the inverse hyperbolic sine draws them in.
    """
    model = make_pipeline(StandardScaler(), FunctionTransformer(np.arcsinh), LogisticRegression())
    model.fit(
        np.concatenate([reference, planted]),
        np.concatenate([np.zeros(len(reference)), np.ones(len(planted))]),
    )
    prior = len(reference) / len(planted)

    def ratio(x: Floats) -> Floats:
        odds: Floats = prior * np.exp(np.clip(model.decision_function(x), -50, 50))
        return odds

    return ratio


def _mixture_share(data: Floats, planted: Floats, confidence: float = 0.1) -> tuple[float, float]:
    """Largest share of the planted distribution that fits under the data's, and its error.

    For a cut ``c``, ``P(data > c) >= share * P(planted > c)``. The quotient bounds the share from
    above, tightest where only wrong rows are above the cut; the cut is chosen where the quotient with
    its sampling error is smallest.
    """
    cuts = np.sort(planted)[:-10]
    above_data = 1 - np.searchsorted(np.sort(data), cuts, side="right") / len(data)
    above_planted = 1 - np.searchsorted(np.sort(planted), cuts, side="right") / len(planted)
    error = np.sqrt(np.log(4 / confidence) / 2) * (len(data) ** -0.5 + len(planted) ** -0.5)
    best = np.argmin((above_data + error) / above_planted)
    return float(min(above_data[best] / above_planted[best], 1.0)), float(error)


def _best_expected_f1(probability: Floats) -> float:
    """Cut that maximises the expected F1 when the probabilities are true.

    With ``T`` the expected number of wrong rows and ``t_k`` that among the ``k`` most probable, the F1
    of flagging these ``k`` is about ``2 t_k / (k + T)``.
    """
    descending = np.sort(probability)[::-1]
    found = np.cumsum(descending)
    f1 = 2 * found / (np.arange(1, len(descending) + 1) + found[-1])
    # At the optimum the cut is F1 / 2 (Lipton et al., 2014); ties and rounding aside, so is this.
    return float(min(f1.max() / 2, 0.5))


def _auroc(wrong: Floats, other: Floats) -> float:
    order = np.sort(other)
    below = np.searchsorted(order, wrong, side="left") + np.searchsorted(order, wrong, side="right")
    return float(below.mean() / (2 * len(other)))
