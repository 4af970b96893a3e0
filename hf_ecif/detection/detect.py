"""Which rows are misaligned: probability, threshold and noise rate, or that it cannot be told.

No threshold holds for every model and data set, and few rows say whether they are wrong. But wrong
pairs can be *made*: injected mismatches are rows of the same data whose captions were exchanged on
purpose, put through the same fit and the same scoring. They are what misaligned rows look like to
this model. There are kinds of them, harder and easier to find, as the captions were taken from
like rows or from any. The data are a mixture of all these and of right ones, in unknown
proportions; see `hf_ecif.detection.mixture`. Its likeliest rate and density ratio make the
probability of every row, and the threshold is where the expected F1 is highest.

What right rows look like is told best by rows that are *verified*: the half of a clean query,
or rows that a person has judged. Without any, it is taken from the data by the form of the
densities alone. The rate is then an upper bound: right pairs that the model does not understand
look like wrong ones.

Where injected mismatches are hardly told from right rows, the model cannot tell at all. Nothing is
flagged then, no probability is given, and `Detection.abstains` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from hf_ecif.detection.mixture import (
    SMALLEST_RATE,
    Floats,
    Mixture,
    Sample,
    Samples,
    fit_mixture,
    largest_rate,
    rate_interval,
)
from hf_ecif.detection.siblings import Pooling

Verdicts = NDArray[np.integer]

# What is known of a row.
RIGHT, UNKNOWN, WRONG = 1, 0, -1
# Where hardly anything is wrong, the best F1 would flag the least unlikely rows. Nothing is flagged
# that is more than twice as likely to be right as wrong.
LEAST_THRESHOLD = 1 / 3
# Injected mismatches are told from right rows at least so well, or nothing is flagged.
LEAST_POWER = 0.75
# And at least so well from the data as they are, unless some of these are known to be right.
LEAST_POWER_IN_DATA = 0.65
# Of verified right rows that describe right rows by themselves.
FEWEST_RIGHT = 10
REMEDIES = (
    "Fine-tune it on pairs of this kind first, or take a model that knows them; or give pairs that "
    "are known to be right, as a query or by a column of verdicts; or judge some rows by hand."
)
# Where no row is known to be right, the rate rests on the form of the densities, and on a bound,
# which counts as much as so many injected rows. Without it, the rate of 120 to 600 rows comes out
# too low by a tenth of itself and more.
ROWS_OF_BOUND = 50
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
        probability: ``(N,)``, of being misaligned, in [0, 1]; of a verified row 0 or 1. NaN where
            it abstains.
        suspicion: ``(N,)``, log density ratio of wrong and right rows, in nats. It ranks the rows,
            even where it abstains.
        flag: ``(N,)``, whether the probability is above the threshold. Where it abstains, of rows
            that are known to be wrong alone.
        borderline: ``(N,)``, whether the standard errors of the signals reach across the threshold,
            from either side. Borderline rows keep their flags.
        threshold: the cut that maximises the expected F1, at least `LEAST_THRESHOLD`.
        noise_rate: estimated share of misaligned rows among those that are not verified. Where it
            abstains, the upper end of the interval.
        rate_interval: rates that the data do not contradict, at 95 % confidence.
        rate_is_bound: whether no row is known to be right, or it abstains: right pairs that the
            model does not understand may then count as wrong, and only the upper end of the
            interval is to be relied on.
        injected_auroc: how well the signals tell injected mismatches from rows, each as likely to
            be right as it is found to be; from verified ones alone, where there are enough. 0.5 is
            not at all.
        abstains: why nothing is flagged; None where the model can tell.
        groups: those with a rate and a threshold of their own, the largest first.
        detector: what judges other rows in the same way.
    """

    probability: Floats
    suspicion: Floats
    flag: NDArray[np.bool_]
    borderline: NDArray[np.bool_]
    threshold: float
    noise_rate: float
    rate_interval: tuple[float, float]
    rate_is_bound: bool
    injected_auroc: float
    abstains: str | None = None
    groups: tuple[GroupNoise, ...] = ()
    detector: Detector | None = None


@dataclass(frozen=True)
class Detector:
    """What `detect` has learned, which judges any other rows alike.

    Attributes:
        mixture: gives the log density ratio of wrong and right rows.
        pooling: how captions of one image are judged together; None where none were there to learn
            it from.
        threshold: of rows that are in none of the `groups`.
        groups: noise rate and threshold of every group with its own.
        rate_interval: as in `Detection`; likewise the others.
    """

    mixture: Mixture
    pooling: Pooling | None
    threshold: float
    groups: dict[str, tuple[float, float]]
    rate_interval: tuple[float, float]
    rate_is_bound: bool
    injected_auroc: float
    abstains: str | None

    def suspicion(self, log_ratio: Floats, images: NDArray[np.int64] | None) -> Floats:
        """Log ratios ``(N,)`` that count what the other captions of an image say.

        Args:
            log_ratio: ``(N,)``, of the pairs by themselves.
            images: ``(N,)``, equal for pairs of one image; all are different if absent.
        """
        if images is None or self.pooling is None:
            return log_ratio
        return self.pooling.pool(log_ratio, images)

    def judge(
        self,
        suspicion: Floats,
        error: Floats,
        verdicts: Verdicts,
        groups: Sequence[str | None],
    ) -> Detection:
        """Probabilities and flags of rows.

        Args:
            suspicion: ``(N,)``, their log ratios.
            error: ``(N,)``, standard errors of these.
            verdicts: ``(N,)``, as for `detect`.
            groups: as for `detect`; empty where there are none.
        """
        if self.abstains is not None:
            return _abstain(self, suspicion, verdicts)
        rates, thresholds = self._of_groups(groups, len(suspicion))
        probability = _with_verdicts(_probability(suspicion, rates), verdicts)
        flag = probability > thresholds
        distance = np.abs(suspicion + logit(rates) - logit(thresholds))
        borderline = (distance < BORDERLINE_ERRORS * error) & (verdicts == UNKNOWN)
        return Detection(
            probability=probability,
            suspicion=suspicion,
            flag=flag,
            borderline=borderline,
            threshold=self.threshold,
            noise_rate=self.mixture.rate,
            rate_interval=self.rate_interval,
            rate_is_bound=self.rate_is_bound,
            injected_auroc=self.injected_auroc,
            groups=tuple(
                GroupNoise(
                    group=group,
                    rows=len(rows),
                    noise_rate=self.groups[group][0],
                    threshold=self.groups[group][1],
                    flagged=int(flag[rows].sum()),
                    borderline=int(borderline[rows].sum()),
                )
                for group, rows in _members(groups).items()
                if group in self.groups
            ),
            detector=self,
        )

    def error(self, signals: Floats, errors: Floats) -> Floats:
        """Standard errors ``(N,)`` of the log ratios, from those of the signals, ``(N, S)``."""
        return _propagated(self.mixture.log_ratio, signals, errors)

    def _of_groups(self, groups: Sequence[str | None], count: int) -> tuple[Floats, Floats]:
        """Noise rate and threshold of every row, ``(N,)`` each."""
        common = (self.mixture.rate, self.threshold)
        own = [common if group is None else self.groups.get(group, common) for group in groups]
        rates, thresholds = np.broadcast_to(np.array(own or [common]), (count, 2)).T
        return rates, thresholds


def detect(
    signals: Floats,
    reference: Floats,
    injected: Sequence[Floats],
    *,
    verdicts: Verdicts | None = None,
    reference_verdicts: Verdicts | None = None,
    errors: Floats | None = None,
    groups: Sequence[str | None] | None = None,
    images: NDArray[np.int64] | None = None,
    mute: NDArray[np.bool_] | None = None,
    trust: Sequence[float] | None = None,
    exchanged: Floats | None = None,
) -> Detection:
    """Probability, threshold and noise rate from signals of the data and of injected mismatches.

    Args:
        signals: ``(N, S)``, of the data, to be judged; higher for wrong pairs.
        reference: ``(R, S)``, of the rows that were left as they are in the runs with injected
            mismatches.
        injected: ``(M, S)`` for each kind of rows whose captions were exchanged on purpose in these
            runs. Where a kind has fewer than two rows, all are taken to be of one.
        verdicts: ``(N,)``, `RIGHT`, `WRONG` or `UNKNOWN` for every row; all unknown if absent.
            Verified rows need not be a random sample, but right ones should be like the right rows
            of the data; see `hf_ecif.detection.verified`.
        reference_verdicts: ``(R,)``, likewise; some may be of verified rows beyond the data.
        errors: ``(N, S)``, standard errors of ``signals``; infinite where unknown. Without them, no
            row is borderline.
        groups: a name for every row, or None. A group of `SMALLEST_GROUP` rows or more gets a noise
            rate and a threshold of its own; the density ratio is that of all.
        images: ``(N,)``, equal for pairs of one image, which are judged together; see
            `pool_captions`. All are different if absent.
        mute: ``(N,)``, true for rows that are judged, but from which nothing is learned.
        trust: ``(S,)``, how much the signals are relied on before anything is seen; all alike if
            absent.
        exchanged: ``(E, S)``, all rows whose captions were exchanged, by which it is judged what
            the model can tell; those of ``injected`` if absent.

    Raises:
        ValueError: fewer than two injected rows, no row without a verdict, or signals that are not
            finite.
    """
    verdicts = np.zeros(len(signals), int) if verdicts is None else verdicts
    known = np.zeros(len(reference), int) if reference_verdicts is None else reference_verdicts
    heard = np.ones(len(signals), dtype=bool) if mute is None else ~mute
    samples = _samples(reference, known, injected, verdicts[heard], trust)
    mixture = fit_mixture(samples)
    suspicion = mixture.log_ratio(signals)
    pooling = None if images is None else Pooling.learn(suspicion[heard], images[heard])
    if images is not None and pooling is not None:
        suspicion[heard] = pooling.pool(suspicion[heard], images[heard])
    mixed_up = mixture.log_ratio(np.concatenate(injected) if exchanged is None else exchanged)
    power = _power(mixture, samples, mixed_up)
    interval = rate_interval(samples, mixture)
    unverified = samples.right.rows == 0
    if unverified:
        mixture, interval = _drawn_to_bound(mixture, samples, interval)
    judged = (verdicts == UNKNOWN) & heard
    detector = Detector(
        mixture=mixture,
        pooling=pooling,
        threshold=_threshold(_probability(suspicion, mixture.rate)[judged]),
        groups=_rates_of_groups(suspicion, judged, mixture.rate, groups or []),
        rate_interval=interval,
        rate_is_bound=unverified,
        injected_auroc=power,
        abstains=_why_abstain(mixture, samples, power, mixed_up),
    )
    error = np.zeros(len(signals)) if errors is None else detector.error(signals, errors)
    return detector.judge(suspicion, error, verdicts, groups or [])


def _samples(
    reference: Floats,
    known: Verdicts,
    injected: Sequence[Floats],
    verdicts: Verdicts,
    trust: Sequence[float] | None,
) -> Samples:
    """What the mixture is learned from; rows of several runs count once."""
    together = np.concatenate(injected)
    if len(together) < 2:
        raise ValueError("It takes at least two injected rows to learn what wrong looks like.")
    if not (verdicts == UNKNOWN).any():
        raise ValueError("Every row is verified: there is none left to judge.")
    kinds = injected if min(map(len, injected)) > 1 else [together]
    # Rows of every verdict are there as often as they were left alone, all with the same chance.
    each = (verdicts == UNKNOWN).sum() / max((known == UNKNOWN).sum(), 1)
    unknown, right, wrong = (
        Sample(reference[known == verdict], float(each * (known == verdict).sum()))
        for verdict in (UNKNOWN, RIGHT, WRONG)
    )
    return Samples(unknown, right, wrong, [Sample(kind, len(kind)) for kind in kinds], trust)


def _drawn_to_bound(
    mixture: Mixture, samples: Samples, interval: tuple[float, float]
) -> tuple[Mixture, tuple[float, float]]:
    """What the form of the densities says of the rate, and what holds whatever their form is."""
    bound = largest_rate(samples, mixture)
    rows = sum(kind.rows for kind in samples.injected)
    drawn = (rows * mixture.rate + ROWS_OF_BOUND * bound) / (rows + ROWS_OF_BOUND)
    return replace(mixture, rate=drawn), (interval[0], max(interval[1], bound))


def _power(mixture: Mixture, samples: Samples, mixed_up: Floats) -> float:
    """AUROC of injected mismatches against right rows."""
    right = samples.right.signals
    enough = round(samples.right.rows) >= FEWEST_RIGHT
    other = mixture.log_ratio(right if enough else samples.unknown.signals)
    weights = np.ones(len(other)) if enough else 1 - _probability(other, mixture.rate)
    return auroc(mixed_up, other, weights)


def _why_abstain(mixture: Mixture, samples: Samples, power: float, mixed_up: Floats) -> str | None:
    """Why the model cannot tell; None where it can."""
    unknown = mixture.log_ratio(samples.unknown.signals)
    in_data = auroc(mixed_up, unknown)
    verified = round(samples.right.rows) >= FEWEST_RIGHT
    if mixture.rate > 0.5 if verified else in_data < LEAST_POWER_IN_DATA:
        return (
            "The pairs look like pairs that were mixed up on purpose: these rank above them in "
            f"{100 * in_data:.0f} % of cases; chance has 50 %. The model cannot tell right from "
            "wrong pairs here, or most captions are wrong, out of step with the images for "
            f"instance. {REMEDIES}"
        )
    if power < LEAST_POWER:
        return (
            "This model cannot tell right from wrong pairs here: it ranks a pair that was mixed up "
            f"on purpose above a right one in {100 * power:.0f} % of cases; chance has 50 %. "
            f"{REMEDIES}"
        )
    return None


def _abstain(detector: Detector, suspicion: Floats, verdicts: Verdicts) -> Detection:
    """Nothing but the order, and what is known."""
    bound = detector.rate_interval[1]
    return Detection(
        probability=_with_verdicts(np.full(len(suspicion), np.nan), verdicts),
        suspicion=suspicion,
        flag=verdicts == WRONG,
        borderline=np.zeros(len(suspicion), dtype=bool),
        threshold=1.0,
        noise_rate=bound,
        rate_interval=(0.0, bound),
        rate_is_bound=True,
        injected_auroc=detector.injected_auroc,
        abstains=detector.abstains,
        detector=detector,
    )


def _rates_of_groups(
    suspicion: Floats, judged: NDArray[np.bool_], rate: float, groups: Sequence[str | None]
) -> dict[str, tuple[float, float]]:
    """Noise rate and threshold of every group that is large enough, the largest group first."""
    found = {}
    for group, rows in _members(groups).items():
        if len(rows) >= SMALLEST_GROUP and judged[rows].any():
            own = suspicion[rows[judged[rows]]]
            here = _likeliest(own, prior=rate)
            found[group] = (here, _threshold(_probability(own, here)))
    return found


def _likeliest(log_ratio: Floats, prior: float) -> float:
    """Likeliest noise rate of rows, by expectation maximisation (Saerens et al., 2002).

    Args:
        log_ratio: ``(n,)``.
        prior: what it is drawn to, with the weight of `SMALLEST_GROUP` rows.
    """
    rate = prior
    for _ in range(1000):
        expected = _probability(log_ratio, rate).sum()
        previous, rate = (
            rate,
            (expected + SMALLEST_GROUP * prior) / (len(log_ratio) + SMALLEST_GROUP),
        )
        if abs(rate - previous) < 1e-6:
            break
    return float(rate)


def _with_verdicts(probability: Floats, verdicts: Verdicts) -> Floats:
    return np.select([verdicts == RIGHT, verdicts == WRONG], [0.0, 1.0], probability)


def _probability(log_ratio: Floats, rate: float | Floats) -> Floats:
    """Probability of being wrong, at a noise rate."""
    return np.asarray(expit(log_ratio + logit(np.clip(rate, SMALLEST_RATE, 1 - SMALLEST_RATE))))


def _threshold(probability: Floats) -> float:
    return max(_best_expected_f1(probability), LEAST_THRESHOLD)


def _members(groups: Sequence[str | None]) -> dict[str, NDArray[np.intp]]:
    """Rows of every group, the largest group first."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(row)
    ordered = sorted(members.items(), key=lambda item: -len(item[1]))
    return {group: np.array(rows) for group, rows in ordered}


def _propagated(log_ratio: Callable[[Floats], Floats], signals: Floats, errors: Floats) -> Floats:
    """Standard error ``(N,)`` of the log-odds; the errors of the signals count as independent."""
    known = np.where(np.isfinite(errors), errors, 0.0)
    variance = np.where(np.isfinite(errors).all(axis=1), 0.0, np.inf)
    for column in range(signals.shape[1]):
        step = np.zeros_like(signals)
        step[:, column] = known[:, column]
        variance += ((log_ratio(signals + step) - log_ratio(signals - step)) / 2) ** 2
    return np.sqrt(variance)


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


def auroc(wrong: Floats, other: Floats, weights: Floats | None = None) -> float:
    """Probability that a wrong row has the higher signal; ties count half.

    Args:
        wrong: ``(n,)``.
        other: ``(m,)``.
        weights: of the other rows; equal if absent.

    >>> auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    0.875
    """
    order = np.argsort(other)
    weights = np.ones(len(other)) if weights is None else weights
    below = np.concatenate([[0], np.cumsum(weights[order])])
    left, right = (np.searchsorted(other[order], wrong, side=side) for side in ("left", "right"))
    return float((below[left] + below[right]).mean() / (2 * below[-1]))
