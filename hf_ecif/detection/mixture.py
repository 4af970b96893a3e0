"""A mixture of right and wrong rows whose densities differ by an exponential tilt.

The signals ``x`` of right rows have a density ``f_right`` of which nothing is assumed. Wrong rows
are of one of ``K`` kinds, and the density of each is a tilt of it::

    f_k(x) = exp(a_k + w_k . x) f_right(x),    w_k >= 0.

No signal that speaks against a pair may speak for it. (Without these bounds, chance alignments of
few rows turned rankings over: on three captions an image of the demo, one draw, the AUPRC was 0.56,
and is 0.71.) What is known are samples: rows of unknown verdict, a share ``rate`` of them wrong;
rows known to be right; rows known to be wrong, of unknown kind; and wrong rows made on purpose, of
known kind. All parameters are found together by maximum likelihood: of the proportions ``A_gk`` of
the kinds in each sample, and with ``n_k = sum_g N_g A_gk``, ``t_k = a_k + w_k . x``,

    log L = sum_i [ log sum_k A_gk e^{t_k(x_i)} - log sum_k n_k e^{t_k(x_i)} ],   t_right = 0,

in which ``f_right`` is no longer there: it is the semiparametric likelihood of Qin (1999) and of
Zou, Fine and Yandell (2002), with every sample weighing what it is worth. Its profile over the rate
gives an interval that knows how few the verified rows are and how well the kinds are told apart.

The weights ``w_k`` are drawn to a first guess: a plain classifier's, shrunk so strongly that little
but the common direction of all signals is left. Its scale is all but free, and what differs from it
is penalised: few rows are ranked by the plain guess, many by what they say themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit, logit, logsumexp
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array
from torch import Tensor
from torch.nn.functional import logsigmoid

Floats = NDArray[np.float64]

# Inverse penalties, as scikit-learn has them, of the first guess and of what differs from it. On
# rows of the demo and of another vendor's pictures, seeds 0 and 1: without the guess, the AUPRC of
# 200 to 240 rows is 0.900 in place of 0.907, and the Brier score 0.073 in place of 0.056; from 600
# rows on, 0.03 to 3 for the second make no difference.
GUESS_PENALTY = 0.03
DIFFERENCE_PENALTY = 0.2
# And of the scale of the guess. It is of no account but where the kinds have nothing in common with
# right rows, so that no scale would be too large.
SCALE_PENALTY = 1000.0
# Every kind counts as if so many wrong rows had been seen of it, so that none vanishes for good.
ROWS_OF_A_KIND = 0.5
# As if so many right rows had been seen among the unknown ones, so that not all of them are wrong.
# More, or wrong ones, would decide between two peaks of the likelihood, of few wrong rows and many:
# with six right ones, 8 % of 200 rows were found wrong where 40 % are; with one wrong beside them,
# 20 % of 600 right rows in a domain that the model hardly knows.
SEEN_RIGHT = 1.0
# The likelihood may have two peaks, of few wrong rows and of many.
STARTS = (0.05, 0.4)
SMALLEST_RATE = 1e-6
# By how many standard errors, at the most that they can be, a share is taken to be larger than it
# looks when the best bin is chosen; more of them choose larger bins.
BIN_ERRORS = 1.6
LARGEST_LOG_ODDS = 9.0  # an interval that goes on beyond them reaches to 0 or 1
MOST_ROWS = 20_000  # of a sample, to learn from


class Sample(NamedTuple):
    """Signals of rows about which the same is known.

    Attributes:
        signals: ``(n, S)``; a row may be there several times, from several runs.
        rows: as how many rows they count.
    """

    signals: Floats
    rows: float


@dataclass(frozen=True)
class Samples:
    """What a mixture is learned from.

    Attributes:
        unknown: the data.
        right: rows known to be right, possibly none.
        wrong: rows known to be wrong, of no known kind, possibly none.
        injected: wrong rows made on purpose, of every kind.
        trust: ``(S,)``, how much the signals are relied on before anything is seen, 1 if absent.
    """

    unknown: Sample
    right: Sample
    wrong: Sample
    injected: Sequence[Sample]
    trust: Sequence[float] | None = None

    def all(self) -> list[Sample]:
        """The unknown, the right, the wrong and every kind that was injected, in this order."""
        return [self.unknown, self.right, self.wrong, *self.injected]

    def thinned(self) -> Samples:
        """At most `MOST_ROWS` of each sample, which then counts for no more."""
        unknown, right, wrong, *injected = map(_thin, self.all())
        return Samples(unknown, right, wrong, injected, self.trust)


class Scale(NamedTuple):
    """Makes signals comparable.

    Influence has heavy tails; the inverse hyperbolic sine draws them in.

    Attributes:
        centre: ``(S,)``, what is 0 after it.
        spread: ``(S,)``, what is about 1.
        trust: ``(S,)``, by which it is multiplied. Weights are penalised by their squares, so that
            few rows give a signal with half the trust a quarter of the say.
    """

    centre: Floats
    spread: Floats
    trust: Floats

    @classmethod
    def learn(cls, signals: Floats, trust: Sequence[float] | None) -> Scale:
        """The scale of some signals, ``(n, S)``."""
        found = StandardScaler().fit(signals)
        relied = np.ones(signals.shape[1]) if trust is None else np.array(trust, dtype=float)
        return cls(found.mean_, found.scale_, relied)

    def __call__(self, signals: Floats) -> Floats:
        """Scaled signals, ``(n, S)``.

        Raises:
            ValueError: some are not finite.
        """
        checked = check_array(signals, ensure_min_samples=0)
        return np.asarray(np.arcsinh((checked - self.centre) / self.spread) * self.trust)


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture.

    Attributes:
        scale: of the signals.
        weights: ``(K, 1 + S)``, constants and weights of the scaled signals.
        shares: ``(K,)``, of the kinds among the wrong rows.
        rate: share of the wrong among the unknown rows.
        log_likelihood: penalised, in nats, up to a constant.
    """

    scale: Scale
    weights: Floats
    shares: Floats
    rate: float
    log_likelihood: float

    def log_ratio(self, signals: Floats) -> Floats:
        """``log f_wrong(x) / f_right(x)``, ``(n,)``."""
        by_kind = self.scale(signals) @ self.weights[:, 1:].T + self.weights[:, 0]
        return np.asarray(logsumexp(by_kind + np.log(self.shares), axis=1))


def fit_mixture(samples: Samples) -> Mixture:
    """The likeliest mixture.

    Raises:
        ValueError: signals that are not finite.
    """
    likelihood = _Likelihood(samples.thinned())
    fits = [likelihood.maximise(likelihood.begin(rate)) for rate in STARTS]
    return max(fits, key=lambda fit: fit.log_likelihood)


def largest_rate(samples: Samples, mixture: Mixture) -> float:
    """Largest share of wrong rows that fits under the unknown ones; an upper bound of the rate.

    For a cut ``c`` of the log ratio, ``P(unknown > c) >= rate * P(injected > c)``, whatever right
    rows look like. The quotient bounds the rate, tightest where only wrong rows are above the cut,
    which is chosen where the quotient with its sampling error is smallest: best-bin estimation
    (Garg et al., 2021).
    """
    unknown = np.sort(mixture.log_ratio(samples.unknown.signals))
    injected = np.concatenate([mixture.log_ratio(kind.signals) for kind in samples.injected])
    counts = [len(kind.signals) for kind in samples.injected]
    weights = np.repeat(mixture.shares / counts, counts)
    order = np.argsort(injected)
    # The last cut is above all injected rows.
    cuts, injected_above = injected[order][:-1], 1 - np.cumsum(weights[order])[:-1]
    unknown_above = 1 - np.searchsorted(unknown, cuts, side="right") / len(unknown)
    error = BIN_ERRORS / 2 * (samples.unknown.rows**-0.5 + np.linalg.norm(weights))
    best = np.argmin((unknown_above + error) / injected_above)
    return float(np.clip(unknown_above[best] / injected_above[best], 0, 1))


def rate_interval(samples: Samples, best: Mixture, level: float = 0.95) -> tuple[float, float]:
    """Rates that the samples do not contradict: an interval by profile likelihood.

    Args:
        samples: those of the fit.
        best: the likeliest mixture of them.
        level: of confidence.
    """
    likelihood = _Likelihood(samples.thinned())
    allowed = float(norm.ppf((1 + level) / 2))
    middle = float(logit(np.clip(best.rate, SMALLEST_RATE, 1 - SMALLEST_RATE)))

    def end(side: int) -> float:
        """Log-odds where the signed root of the deviance, nearly linear in them, is too large."""
        last, known = best, {middle: -allowed}

        def excess(log_odds: float) -> float:
            nonlocal last
            if log_odds not in known:
                fixed = replace(last, rate=float(expit(log_odds)))
                last = likelihood.maximise(fixed, rate_is_free=False)
                deviance = 2 * (best.log_likelihood - last.log_likelihood)
                known[log_odds] = float(np.sqrt(max(deviance, 0.0)) - allowed)
            return known[log_odds]

        inner, outer = middle, middle + side * 0.25
        while excess(outer) < 0:
            inner, outer = outer, middle + 2 * (outer - middle)
            if side * outer > LARGEST_LOG_ODDS:
                return side * np.inf
        return float(brentq(excess, inner, outer, xtol=0.03))

    return float(expit(end(-1))), float(expit(end(1)))


class _Guess(NamedTuple):
    """What a plain classifier makes of the unknown rows and every kind of the injected ones.

    Attributes:
        scale: of the signals.
        weights: ``(K, 1 + S)``, of the log-odds of every kind against the unknown rows.
    """

    scale: Scale
    weights: Floats

    @classmethod
    def learn(cls, samples: Samples) -> _Guess:
        classes = [samples.unknown.signals, *(kind.signals for kind in samples.injected)]
        together = np.concatenate(classes)
        scale = Scale.learn(together, samples.trust)
        scaled = scale(together)
        numbers = np.repeat(np.arange(len(classes)), list(map(len, classes)))
        found = LogisticRegression(C=GUESS_PENALTY).fit(scaled, numbers)
        weights = np.column_stack([found.intercept_, found.coef_])
        # Of two classes, it is the log-odds already.
        return cls(scale, weights if len(classes) == 2 else weights[1:] - weights[:1])

    def penalties(self) -> Floats:
        """Quadratic forms ``(K, S, S)`` of the weights of the signals.

        Of ``|w - c g|^2 / 2 DIFFERENCE_PENALTY + c^2 / 2 SCALE_PENALTY``, ``g`` those of the guess,
        at the scale ``c`` where it is least.
        """
        slopes = self.weights[:, 1:]
        size = (slopes**2).sum(axis=1) + DIFFERENCE_PENALTY / SCALE_PENALTY
        along = np.einsum("ks,kt->kst", slopes, slopes) / size[:, None, None]
        return (np.eye(slopes.shape[1]) - along) / (2 * DIFFERENCE_PENALTY)


class _Likelihood:
    """The penalised log-likelihood of samples, as a function of all parameters in one vector.

    They are the weights, the log-odds of the rate, and the log shares of the kinds but for the
    first, whose is zero.
    """

    def __init__(self, samples: Samples) -> None:
        groups = samples.all()
        self.guess = _Guess.learn(samples)
        counts = [len(group.signals) for group in groups]
        values = np.concatenate([group.signals for group in groups])
        rows = np.array([group.rows for group in groups], dtype=float)
        self.values = torch.from_numpy(self.guess.scale(values))
        self.group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(counts))
        self.rows = torch.from_numpy(rows)
        each = self.rows / torch.tensor(counts).clamp_min(1)
        self.row_weights = each[self.group]
        self.penalties = torch.from_numpy(self.guess.penalties())
        self.shape = self.guess.weights.shape

    def begin(self, rate: float) -> Mixture:
        """A mixture to start from: as the first guess has it."""
        weights = self.guess.weights.copy()
        weights[:, 1:] = weights[:, 1:].clip(min=0)
        kinds = len(weights)
        return Mixture(self.guess.scale, weights, np.full(kinds, 1 / kinds), rate, -np.inf)

    def maximise(self, start: Mixture, rate_is_free: bool = True) -> Mixture:
        """The likeliest mixture near one."""
        vector, bounds = self._pack(start), self._bounds()
        free = np.ones(len(vector), dtype=bool)
        free[self.shape[0] * self.shape[1]] = rate_is_free

        def loss(some: Floats) -> tuple[float, Floats]:
            whole = vector.copy()
            whole[free] = some
            value, gradient = self._value_and_gradient(whole)
            return -value / self.rows[0].item(), -gradient[free] / self.rows[0].item()

        found = minimize(
            loss,
            vector[free],
            jac=True,
            method="L-BFGS-B",
            bounds=bounds[free],
            options={"maxiter": 500, "ftol": 1e-9},
        )
        vector[free] = found.x
        return self._unpack(vector, -found.fun * self.rows[0].item())

    def _bounds(self) -> Floats:
        """Least and largest value of every parameter: weights of signals are not negative."""
        kinds, size = self.shape
        least = np.full((kinds, size), -np.inf)
        least[:, 1:] = 0
        least = np.concatenate([least.ravel(), np.full(kinds, -np.inf)])
        return np.column_stack([least, np.full(len(least), np.inf)])

    def _value_and_gradient(self, vector: Floats) -> tuple[float, Floats]:
        parameters = torch.from_numpy(vector).requires_grad_()
        value = self._value(parameters)
        value.backward()
        assert parameters.grad is not None
        return value.item(), parameters.grad.numpy()

    def _value(self, parameters: Tensor) -> Tensor:
        weights, log_odds, shares = self._parts(parameters)
        log_ratios = self.values @ weights[:, 1:].T + weights[:, 0]
        ratios = torch.cat([torch.zeros_like(log_ratios[:, :1]), log_ratios], dim=1)
        proportions = _log_proportions(log_odds, shares.log())
        pooled = torch.logsumexp(proportions + self.rows.log()[:, None], dim=0)
        own = torch.logsumexp(ratios + proportions[self.group], dim=1)
        fit = (self.row_weights * (own - torch.logsumexp(ratios + pooled, dim=1))).sum()
        slopes = weights[:, 1:]
        penalty = torch.einsum("ks,kst,kt->", slopes, self.penalties, slopes)
        return fit - penalty + ROWS_OF_A_KIND * shares.log().sum() + _log_prior(log_odds)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kinds, size = self.shape
        weights, log_odds, others = parameters.split([kinds * size, 1, kinds - 1])
        return (
            weights.view(kinds, size),
            log_odds[0],
            torch.cat([others.new_zeros(1), others]).softmax(0),
        )

    def _pack(self, mixture: Mixture) -> Floats:
        odds = logit(np.clip(mixture.rate, SMALLEST_RATE, 1 - SMALLEST_RATE))
        others = np.log(mixture.shares[1:] / mixture.shares[0])
        return np.concatenate([mixture.weights.ravel(), [odds], others])

    def _unpack(self, vector: Floats, log_likelihood: float) -> Mixture:
        weights, log_odds, shares = self._parts(torch.from_numpy(vector))
        rate = torch.sigmoid(log_odds).item()
        scale = self.guess.scale
        return Mixture(scale, weights.numpy(), shares.numpy(), rate, log_likelihood)


def _log_prior(log_odds: Tensor) -> Tensor:
    """Log density of the rate before anything is seen, up to a constant."""
    return SEEN_RIGHT * logsigmoid(-log_odds)


def _log_proportions(log_odds: Tensor, log_shares: Tensor) -> Tensor:
    """Log shares ``(3 + K, 1 + K)`` of right rows and every kind in the samples, in their order."""
    kinds = len(log_shares)
    right = torch.full((1 + kinds,), -torch.inf, dtype=log_shares.dtype)
    right[0] = 0
    injected = torch.full((kinds, 1 + kinds), -torch.inf, dtype=log_shares.dtype)
    injected[:, 1:].fill_diagonal_(0)
    unknown = torch.cat([logsigmoid(-log_odds)[None], logsigmoid(log_odds) + log_shares])
    wrong = torch.cat([right.new_full((1,), -torch.inf), log_shares])
    return torch.cat([torch.stack([unknown, right, wrong]), injected])


def _thin(sample: Sample) -> Sample:
    if len(sample.signals) <= MOST_ROWS:
        return sample
    chosen = np.random.default_rng(0).choice(len(sample.signals), MOST_ROWS, replace=False)
    return Sample(sample.signals[np.sort(chosen)], min(sample.rows, MOST_ROWS))
