"""What a few verdicts of a person say of an audit: how good its flags are, and where to cut.

A detector's probabilities are its own belief. Thirty rows, drawn at random and judged, test it:

1. `draw_sample` draws half of them from the flagged rows and half from the others, so that what is
   flagged and what was missed are both seen however rare one of them is. Every row has a known
   chance to be drawn.
2. `estimate` weighs each verdict by the rows that it stands for (Horvitz and Thompson, 1952): noise
   rate, precision and recall, whatever the detector believes. Their intervals are quantiles of the
   rows' posterior under Jeffreys' prior, which covers well from small samples (Brown, Cai and
   DasGupta, 2001).
3. `recalibrate` moves the probabilities to where the verdicts have them, along one curve that never
   changes the order of the rows (Platt, 1999).
4. `promise` finds the lowest probability to flag from such that a wanted share of the flagged rows
   is wrong with a wanted confidence. It tests cut after cut, the strictest first, and stops where
   one fails, so that many tests need no correction (Angelopoulos et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from scipy.stats import beta

from hf_ecif.utils.formatting import Bools, Floats

Numbers = NDArray[np.int64]

LEVEL = 0.9  # of the intervals
DRAWS = 2000  # from a posterior; more of them move an interval by less than a point
# Standard deviations of the priors of the curve of `recalibrate`: by how many units of log-odds a
# detector's rate may be off, and by which factor (e to this power) its confidence.
SHIFT, STRETCH = 2.0, 0.5
LARGEST_LOG_ODDS = 10.0  # beyond it, a probability says nothing more
FORGIVEN = 2  # right pairs among the flagged that the strictest test of `promise` survives
CUTS = 20  # tested by `promise` in each stratum
TINY = 1e-9  # in place of the zero of a beta distribution that is a point


@dataclass(frozen=True)
class Stratum:
    """Rows that were equally likely to be drawn.

    Attributes:
        flagged: whether the audit flags them; all or none of them.
        rows: ``(N,)``, numbers of all of them, ascending.
        drawn: ``(n,)``, numbers of those to be judged, ascending.
    """

    flagged: bool
    rows: Numbers
    drawn: Numbers

    @property
    def inclusion(self) -> float:
        """Probability of a row to be drawn."""
        return len(self.drawn) / len(self.rows)


@dataclass(frozen=True)
class Estimate:
    """A share of rows with its interval at `LEVEL`; nan where nothing is there to have one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """How good flags are, from verdicts.

    Attributes:
        noise_rate: share of all rows that are wrong.
        precision: share of the flagged rows that are wrong.
        recall: share of the wrong rows that are flagged.
        judged: verdicts that count: of rows drawn, right or wrong.
    """

    noise_rate: Estimate
    precision: Estimate
    recall: Estimate
    judged: int


@dataclass(frozen=True)
class Curve:
    """``log-odds -> shift + stretch * log-odds``, from a detector's probability to a better one."""

    shift: float
    stretch: float

    def __call__(self, probability: Floats) -> Floats:
        """Calibrated probability, of any shape; nan stays nan."""
        return expit(self.shift + self.stretch * _log_odds(probability))


@dataclass(frozen=True)
class Promise:
    """A cut with a guarantee.

    Attributes:
        least: flag the rows whose probability is at least this; infinite where no cut holds.
        precision: share of wrong rows that was asked for.
        confidence: probability with which at least this share is reached.
        supported: the share that is reached with this confidence by the flags of the audit.
    """

    least: float
    precision: float
    confidence: float
    supported: float

    @property
    def holds(self) -> bool:
        """Whether there is such a cut."""
        return math.isfinite(self.least)


def draw_sample(flagged: Numbers, others: Numbers, size: int, seed: int) -> list[Stratum]:
    """Strata of the flagged rows and of the others, about half of the sample from each.

    A larger sample of the same seed holds the smaller one: verdicts stay of use.

    Args:
        flagged: row numbers.
        others: numbers of the rows that are not flagged.
        size: rows to draw; all rows where there are no more.
        seed: of the choice.
    """
    half = min(len(flagged), max(size // 2, size - len(others)))
    rest = min(size - half, len(others))
    return [
        Stratum(is_flagged, np.sort(rows), np.sort(_shuffled(rows, seed)[:count]))
        for is_flagged, rows, count in ((True, flagged, half), (False, others, rest))
        if len(rows)
    ]


def estimate(
    strata: list[Stratum], verdicts: Mapping[int, bool], flag: Bools, seed: int = 0
) -> Quality:
    """Noise rate, precision and recall of flags.

    The flags may be others than those that the sample was drawn by, but must not depend on the
    verdicts row by row: to correct the flags of the judged rows comes afterwards.

    Args:
        strata: of `draw_sample`.
        verdicts: by row number, whether the pair is wrong. Rows that were not drawn do not count,
            those drawn without a verdict count as left out at random.
        flag: ``(N,)``, by row number.
        seed: of the draws from the posterior.
    """
    random = np.random.default_rng(seed)
    everything = np.ones_like(flag)
    whole = [cell for stratum in strata for cell in _cells(stratum, verdicts, everything)]
    cells = [cell for stratum in strata for cell in _cells(stratum, verdicts, flag)]
    found, missed = (
        [cell for cell in cells if cell.flagged == flagged] for flagged in (True, False)
    )
    rows = sum(cell.rows for cell in whole)
    return Quality(
        noise_rate=_ratio(whole, [], rows, random),
        precision=_ratio(found, [], sum(cell.rows for cell in found), random),
        recall=_ratio(found, missed, None, random),
        judged=sum(cell.judged for cell in whole),
    )


def recalibrate(probability: Floats, wrong: Bools) -> Curve:
    """The curve that makes the verdicts likeliest, under a prior that trusts the detector.

    With no verdict it changes nothing. It always rises, so that the order of the rows stays. How
    the rows were drawn makes no difference: the draw looked at nothing but their probability.

    Args:
        probability: ``(n,)``, of the judged rows, by the detector.
        wrong: ``(n,)``, verdicts.
    """
    x, sign = _log_odds(probability), np.where(wrong, 1.0, -1.0)

    def loss(curve: Floats) -> float:
        shift, log_stretch = curve
        fit = log_expit(sign * (shift + math.exp(log_stretch) * x)).sum()
        return float((shift / SHIFT) ** 2 / 2 + (log_stretch / STRETCH) ** 2 / 2 - fit)

    shift, log_stretch = minimize(loss, np.zeros(2), method="BFGS").x
    return Curve(float(shift), math.exp(log_stretch))


def best_threshold(probability: Floats, least: float) -> float:
    """Probability to flag from for the highest expected F1, at least ``least``.

    Args:
        probability: ``(N,)``, calibrated.
        least: that is never undercut.
    """
    descending = np.sort(probability)[::-1]
    found = np.cumsum(descending)
    f1 = 2 * found / (np.arange(1, len(descending) + 1) + found[-1])
    # At the optimum the cut is half of the F1 (Lipton et al., 2014).
    return max(float(f1.max() / 2), least)


def promise(
    strata: list[Stratum],
    verdicts: Mapping[int, bool],
    probability: Floats,
    *,
    precision: float,
    confidence: float,
) -> Promise:
    """The lowest cut above which a share of at least ``precision`` is wrong, with ``confidence``.

    Nothing is believed of the detector but the order of the rows.

    Args:
        strata: of `draw_sample`.
        verdicts: by row number, whether the pair is wrong.
        probability: ``(N,)``, by row number; only the order counts.
        precision: in (0, 1).
        confidence: in (0, 1).
    """
    least = math.inf
    for cut in _cuts(strata, verdicts, probability, precision, confidence):
        if _lower_bound(strata, verdicts, probability >= cut, confidence) < precision:
            break
        least = cut
    flag = np.zeros(len(probability), dtype=bool)
    flag[[row for stratum in strata if stratum.flagged for row in stratum.rows.tolist()]] = True
    supported = _lower_bound(strata, verdicts, flag, confidence)
    return Promise(least, precision, confidence, supported)


def verdicts_needed(precision: float, confidence: float, right: int = 0) -> int:
    """How many flagged rows must be judged for a promise, if so many of them are right.

    >>> verdicts_needed(0.8, 0.9), verdicts_needed(0.9, 0.9)
    (11, 22)
    """
    count = right + 1
    while beta.ppf(1 - confidence, count - right, right + 1) < precision:
        count += 1
    return count


@dataclass(frozen=True)
class _Cell:
    """The flagged rows of a stratum, or the others, with the verdicts on them.

    Attributes:
        flagged: whether it is the flagged ones.
        rows: how many it has.
        judged: how many of them have a verdict.
        wrong: how many of these are wrong.
        whole: whether these are all rows of the stratum.
        expected_share: of wrong rows where none is judged: that of the stratum.
    """

    flagged: bool
    rows: int
    judged: int
    wrong: int
    whole: bool
    expected_share: float

    @property
    def expected(self) -> float:
        """Wrong rows, without bias where any is judged."""
        return self.rows * (self.wrong / self.judged if self.judged else self.expected_share)

    def posterior(self, random: np.random.Generator) -> Floats:
        """Draws ``(DRAWS,)`` of the number of wrong rows.

        Jeffreys' prior, if it is the whole of its stratum. The prior of every part of one would
        outvote rare errors, and so a part has none: its distribution is an even mixture of those
        whose quantiles are Clopper and Pearson's bounds (Fay, Proschan and Brittain, 2015).
        """
        right = self.judged - self.wrong
        more = np.full(DRAWS, 0.5) if self.whole else random.integers(0, 2, DRAWS)
        unknown = random.beta(self.wrong + more + TINY, right + 1 - more + TINY)
        return (self.wrong + random.binomial(self.rows - self.judged, unknown)).astype(float)


def _cells(stratum: Stratum, verdicts: Mapping[int, bool], flag: Bools) -> Iterator[_Cell]:
    judged = np.array([row for row in stratum.drawn.tolist() if row in verdicts], dtype=int)
    wrong = np.array([verdicts[row] for row in judged.tolist()], dtype=bool)
    for flagged in (True, False):
        here = int((flag[stratum.rows] == flagged).sum())
        among = flag[judged] == flagged
        if here:
            yield _Cell(
                flagged=flagged,
                rows=here,
                judged=int(among.sum()),
                wrong=int(wrong[among].sum()),
                whole=here == len(stratum.rows),
                expected_share=(wrong.sum() + 0.5) / (len(wrong) + 1),
            )


def _shuffled(rows: Numbers, seed: int) -> Numbers:
    return np.random.default_rng(seed).permutation(np.sort(rows))


def _ratio(
    part: list[_Cell], rest: list[_Cell], rows: int | None, random: np.random.Generator
) -> Estimate:
    """Wrong rows of some cells over a number of rows; if None, over the wrong rows of all cells."""
    if not part:
        return Estimate(math.nan, math.nan, math.nan)
    expected = sum(cell.expected for cell in part)
    drawn = sum(cell.posterior(random) for cell in part)
    total, all_drawn = (
        (rows, rows)
        if rows is not None
        else (
            expected + sum(cell.expected for cell in rest),
            drawn + sum(cell.posterior(random) for cell in rest),
        )
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        value, shares = float(np.divide(expected, total)), np.divide(drawn, all_drawn)
    return Estimate(value, *_interval(shares))


def _interval(share: Floats) -> tuple[float, float]:
    known = share[np.isfinite(share)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _log_odds(probability: Floats) -> Floats:
    return np.clip(logit(probability), -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)


def _cuts(
    strata: list[Stratum],
    verdicts: Mapping[int, bool],
    probability: Floats,
    precision: float,
    confidence: float,
) -> Iterator[float]:
    """Probabilities to test, the highest first; they depend on which rows are judged alone.

    The first has as many verdicts above it as a test takes that survives `FORGIVEN` right pairs;
    fewer, where the flagged rows have not that many.
    """
    judged = np.array(
        [probability[row] for s in strata for row in s.drawn.tolist() if row in verdicts]
    )
    available = sum(row in verdicts for s in strata if s.flagged for row in s.drawn.tolist())
    needed = [verdicts_needed(precision, confidence, right) for right in range(FORGIVEN + 1)]
    fewest = max((count for count in needed if count <= available), default=needed[0])
    cuts = {
        float(np.quantile(probability[stratum.rows], 1 - part / CUTS, method="lower"))
        for stratum in strata
        for part in range(1, CUTS + 1)
    }
    return (cut for cut in sorted(cuts, reverse=True) if (judged >= cut).sum() >= fewest)


def _lower_bound(
    strata: list[Stratum], verdicts: Mapping[int, bool], flag: Bools, confidence: float
) -> float:
    """Precision of flags that is reached with this confidence.

    Clopper and Pearson's bound in one cell; those of several are put together as by Fay, Proschan
    and Brittain (2015).
    """
    random = np.random.default_rng(0)
    wrong, rows = np.zeros(DRAWS), 0
    for stratum in strata:
        for cell in _cells(stratum, verdicts, flag):
            if cell.flagged:
                least = random.beta(cell.wrong + TINY, cell.judged - cell.wrong + 1, DRAWS)
                wrong += cell.wrong + (cell.rows - cell.judged) * least
                rows += cell.rows
    return float(np.quantile(wrong / rows, 1 - confidence)) if rows else 0.0
