"""Which rows are misaligned: probability, threshold and noise rate, from columns and no labels.

No threshold holds for every model and data set, and no row says whether it is wrong. But wrong
pairs can be *made*: `planted` rows are rows of the same data whose captions were exchanged on
purpose, put through the same fit and the same scoring. They are what misaligned rows look like to
this model. There are kinds of them, harder and easier to find, as the captions were taken from
like rows or from any. The data are a mixture of all these and of good ones, in unknown proportions:

1. a logistic regression tells every kind from the others; its odds give the density ratio
   ``f_kind(x) / f_clean(x)``. The others hold wrong rows, too, so it is fitted again and again
   with each of them weighted by its probability of being clean;
2. that takes a noise rate, for which the largest share of planted rows that fits under the data
   serves: best-bin estimation (Garg et al., 2021), an upper bound;
3. the final proportions are the likeliest under the ratios (Saerens et al., 2002). They make one
   ratio ``r(x) = f_wrong(x) / f_clean(x)`` of all kinds. A row is wrong with probability
   ``rate r / (rate r + 1 - rate)``, and the threshold is where the expected F1 is highest.

With one kind for all, the rate of noise that is harder to find than what was planted comes out too
low, and that of easier noise too high.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from hf_ecif.detection.siblings import pool_captions

Floats = NDArray[np.float64]

# Of weighting the rows that stayed by their probability of being clean. It settles within ten:
# thirty more change rates by a few thousandths.
ROUNDS = 10
# Of the squared weights of the witnesses, as scikit-learn has it. Of 200 rows, where little is
# known of each, an AUPRC of 0.902 in place of 0.893 at 1; of 1,492 no difference.
INVERSE_PENALTY = 0.3
SMALLEST_RATE = 1e-6
# Every kind counts as if so many wrong rows had been seen of it, so that none vanishes for good on
# the way. The likeliest answer is often one kind alone, and to draw it towards equal parts by more
# rows than this spoils the noise rate: with six, 10 % are overrated by 2.1 points in place of 1.1.
ROWS_OF_A_KIND = 0.5
# By how many standard errors, at the most that they can be, a share is taken to be larger than it
# looks when the best bin is chosen. More of them choose larger bins: with 2.7, 0.7 % of the rows
# are flagged where nothing is wrong, in place of 0.3 %; with fewer, noise that is hard to find is
# underrated.
BIN_ERRORS = 1.6
# Where hardly anything is wrong, the best F1 would flag the least unlikely rows. Nothing is flagged
# that is more than twice as likely to be right as wrong.
LEAST_THRESHOLD = 1 / 3
# A row is borderline if its log-odds are within so many standard errors of the threshold's. On the
# embedded data that is every fiftieth row, and a third to a half of these are wrong. Their flags
# stay: without them the F1 is 0.875 in place of 0.877.
BORDERLINE_ERRORS = 2.0
# A group has a noise rate of its own from so many rows on, and this is also the weight, in rows, of
# the rate of all data in it. Where the rates are 2, 15 and 45 %, it misses them by 5 points on
# average, where the common rate misses by 18.
SMALLEST_GROUP = 50


@dataclass(frozen=True)
class GroupNoise:
    """A group of rows with a noise rate of its own.

    Attributes:
        group: its name.
        rows: how many it has.
        noise_rate: estimated share of misaligned rows.
        threshold: the cut of its rows' probabilities.
        flagged: rows above it.
        borderline: rows whose standard error reaches across it.
    """

    group: str
    rows: int
    noise_rate: float
    threshold: float
    flagged: int
    borderline: int


@dataclass(frozen=True)
class Detection:
    """Result of `detect`.

    Attributes:
        probability: ``(N,)``, of being misaligned, in [0, 1].
        flag: ``(N,)``, whether the probability is above the threshold.
        borderline: ``(N,)``, whether the standard errors of the signals reach across the threshold,
            from either side. Borderline rows keep their flags.
        threshold: the cut that maximises the expected F1, at least `LEAST_THRESHOLD`.
        noise_rate: estimated share of misaligned rows.
        planted_auroc: how well the signals tell planted rows from the data, without labels: 0.5 is
            not at all. Misaligned rows among the data hold it below 1.
        groups: those with a rate and a threshold of their own, the largest first.
    """

    probability: Floats
    flag: NDArray[np.bool_]
    borderline: NDArray[np.bool_]
    threshold: float
    noise_rate: float
    planted_auroc: float
    groups: tuple[GroupNoise, ...] = ()


def detect(
    signals: Floats,
    reference: Floats,
    planted: Sequence[Floats],
    *,
    errors: Floats | None = None,
    groups: Sequence[str | None] | None = None,
    images: NDArray[np.int64] | None = None,
    mute: NDArray[np.bool_] | None = None,
) -> Detection:
    """Probability, threshold and noise rate from signals of the data and of planted rows.

    Args:
        signals: ``(N, S)``, of the data, to be judged.
        reference: ``(R, S)``, of the rows that were left as they are in the runs with planted rows.
        planted: ``(M, S)`` for each kind of rows whose captions were exchanged on purpose in these
            runs. Where a kind has fewer than two rows, all are taken to be of one.
        errors: ``(N, S)``, standard errors of ``signals``; infinite where unknown. Without them, no
            row is borderline.
        groups: a name for every row, or None. A group of `SMALLEST_GROUP` rows or more gets a noise
            rate and a threshold of its own; the density ratio is that of all.
        images: ``(N,)``, equal for pairs of one image, which are judged together; see
            `pool_captions`. All are different if absent.
        mute: ``(N,)``, true for rows that are judged, but from which nothing is learned.

    Raises:
        ValueError: fewer than two planted rows, or signals that are not finite.
    """
    together = np.concatenate(planted)
    if len(together) < 2:
        raise ValueError("It takes at least two planted rows to learn what wrong looks like.")
    kinds = planted if min(map(len, planted)) > 1 else [together]
    heard = np.ones(len(signals), dtype=bool) if mute is None else ~mute
    log_ratio, rate = _learn_ratio(signals[heard], reference, kinds)
    ratio = log_ratio(signals)
    if images is not None:
        ratio = pool_captions(ratio, images)
    threshold = _threshold(_probability(ratio[heard], rate))
    rates, thresholds = np.full(len(ratio), rate), np.full(len(ratio), threshold)
    members = _large_groups(groups or [])
    for rows in members.values():
        rates[rows], _ = _likeliest(ratio[rows, None], prior=rate, weight=SMALLEST_GROUP)
        thresholds[rows] = _threshold(_probability(ratio[rows], rates[rows]))
    probability = _probability(ratio, rates)
    flag = probability > thresholds
    error = np.zeros(len(ratio)) if errors is None else _propagated(log_ratio, signals, errors)
    borderline = np.abs(ratio + logit(rates) - logit(thresholds)) < BORDERLINE_ERRORS * error
    return Detection(
        probability=probability,
        flag=flag,
        borderline=borderline,
        threshold=threshold,
        noise_rate=rate,
        planted_auroc=auroc(log_ratio(together), log_ratio(reference)),
        groups=tuple(
            GroupNoise(
                group=group,
                rows=len(rows),
                noise_rate=float(rates[rows[0]]),
                threshold=float(thresholds[rows[0]]),
                flagged=int(flag[rows].sum()),
                borderline=int(borderline[rows].sum()),
            )
            for group, rows in members.items()
        ),
    )


@dataclass(frozen=True)
class _Ratio:
    """``x -> log f_wrong(x) / f_clean(x)``, with shares of the kinds of wrong rows.

    Attributes:
        classifier: tells good rows, the first class, from every kind.
        sizes: of the classes in the data that it was fitted to, ``(1 + K,)``.
        shares: of the kinds among the wrong rows, ``(K,)``.
    """

    classifier: Pipeline
    sizes: Floats
    shares: Floats

    def __call__(self, x: Floats) -> Floats:
        return logsumexp(self.by_kind(x) + np.log(self.shares), axis=1)

    def by_kind(self, x: Floats) -> Floats:
        """``log f_kind(x) / f_clean(x)``, ``(N, K)``."""
        odds = self.classifier.predict_log_proba(x) - np.log(self.sizes)
        return odds[:, 1:] - odds[:, :1]


def _learn_ratio(
    signals: Floats, reference: Floats, planted: Sequence[Floats]
) -> tuple[_Ratio, float]:
    """The ratio for the data, with the wrong rows of the reference weighted down; and its rate."""
    clean, shares = np.ones(len(reference)), np.full(len(planted), 1 / len(planted))
    for _ in range(ROUNDS):
        ratio = _tell_apart(reference, planted, clean, shares)
        bound = _largest_share(ratio(signals), [ratio(kind) for kind in planted], shares)
        _, shares = _likeliest(ratio.by_kind(signals), rate=bound)
        clean = 1 - _probability(replace(ratio, shares=shares)(reference), bound)
    ratio = _tell_apart(reference, planted, clean, shares)
    rate, shares = _likeliest(ratio.by_kind(signals))
    return replace(ratio, shares=shares), rate


def _large_groups(groups: Sequence[str | None]) -> dict[str, NDArray[np.intp]]:
    """Rows of every group that has enough of them, the largest group first."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(row)
    large = [(group, rows) for group, rows in members.items() if len(rows) >= SMALLEST_GROUP]
    return {group: np.array(rows) for group, rows in sorted(large, key=lambda item: -len(item[1]))}


def _propagated(log_ratio: Callable[[Floats], Floats], signals: Floats, errors: Floats) -> Floats:
    """Standard error ``(N,)`` of the log-odds; the errors of the signals count as independent."""
    known = np.where(np.isfinite(errors), errors, 0.0)
    variance = np.where(np.isfinite(errors).all(axis=1), 0.0, np.inf)
    for column in range(signals.shape[1]):
        step = np.zeros_like(signals)
        step[:, column] = known[:, column]
        variance += ((log_ratio(signals + step) - log_ratio(signals - step)) / 2) ** 2
    return np.sqrt(variance)


def _tell_apart(
    reference: Floats, planted: Sequence[Floats], clean: Floats, shares: Floats
) -> _Ratio:
    """A logistic regression's ratio.

    Influence has heavy tails; the inverse hyperbolic sine draws them in.
    """
    classifier = make_pipeline(
        StandardScaler(),
        FunctionTransformer(np.arcsinh),
        LogisticRegression(C=INVERSE_PENALTY),
    )
    counts = [len(reference), *map(len, planted)]
    classifier.fit(
        np.concatenate([reference, *planted]),
        np.repeat(np.arange(len(counts)), counts),
        logisticregression__sample_weight=np.concatenate([clean, np.ones(sum(counts[1:]))]),
    )
    return _Ratio(classifier, np.array([clean.sum(), *counts[1:]]), shares)


def _probability(log_ratio: Floats, rate: float | Floats) -> Floats:
    """Of being wrong, at a noise rate."""
    return expit(log_ratio + logit(rate))


def _largest_share(data: Floats, planted: Sequence[Floats], shares: Floats) -> float:
    """Largest share of the planted distribution that fits under the data's.

    For a cut ``c``, ``P(data > c) >= share * P(planted > c)``. The quotient bounds the share from
    above, tightest where only wrong rows are above the cut; the cut is chosen where the quotient
    with its sampling error is smallest.

    Args:
        data: ``(N,)``.
        planted: of every kind.
        shares: of the kinds.
    """
    values, counts = np.concatenate(planted), [len(kind) for kind in planted]
    weights = np.repeat(shares / counts, counts)
    order = np.argsort(values)
    # The last is above all planted rows.
    cuts, above_planted = values[order][:-1], 1 - np.cumsum(weights[order])[:-1]
    above_data = 1 - np.searchsorted(np.sort(data), cuts, side="right") / len(data)
    error = BIN_ERRORS / 2 * (len(data) ** -0.5 + np.linalg.norm(weights))
    best = np.argmin((above_data + error) / above_planted)
    share = above_data[best] / above_planted[best]
    return float(np.clip(share, SMALLEST_RATE, 1 - SMALLEST_RATE))


def _likeliest(
    log_ratios: Floats, rate: float | None = None, *, prior: float = 0.5, weight: float = 0.0
) -> tuple[float, Floats]:
    """Maximum-likelihood noise rate, and shares ``(K,)`` of the kinds, by expectation maximisation.

    Args:
        log_ratios: of the rows and kinds, ``(N, K)``.
        rate: where it is known.
        prior: where the rate starts otherwise, and what it is drawn to.
        weight: of the prior, in rows.
    """
    rows, kinds = log_ratios.shape
    wrong, shares = rate or prior, np.full(kinds, 1 / kinds)
    for _ in range(1000):
        log_odds = log_ratios + np.log(shares) + logit(wrong)
        expected = np.exp(log_odds - np.logaddexp(0, logsumexp(log_odds, axis=1, keepdims=True)))
        previous = np.append(shares, wrong)
        shares = expected.sum(axis=0) + ROWS_OF_A_KIND
        shares /= shares.sum()
        if rate is None:
            drawn = (expected.sum() + weight * prior) / (rows + weight)
            wrong = float(np.clip(drawn, SMALLEST_RATE, 1 - SMALLEST_RATE))
        if np.abs(np.append(shares, wrong) - previous).max() < 1e-6:
            break
    return wrong, shares


def _threshold(probability: Floats) -> float:
    return max(_best_expected_f1(probability), LEAST_THRESHOLD)


def _best_expected_f1(probability: Floats) -> float:
    """Cut that maximises the expected F1 when the probabilities are true.

    With ``T`` the expected number of wrong rows and ``t_k`` that among the ``k`` most probable, the
    F1 of flagging these ``k`` is about ``2 t_k / (k + T)``.
    """
    descending = np.sort(probability)[::-1]
    found = np.cumsum(descending)
    f1 = 2 * found / (np.arange(1, len(descending) + 1) + found[-1])
    # At the optimum the cut is half of the F1 (Lipton et al., 2014).
    return float(f1.max() / 2)


def auroc(wrong: Floats, other: Floats) -> float:
    """Probability that a wrong row has the higher signal; ties count half.

    >>> auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    0.875
    """
    order = np.sort(other)
    below = np.searchsorted(order, wrong, side="left") + np.searchsorted(order, wrong, side="right")
    return float(below.mean() / (2 * len(other)))
