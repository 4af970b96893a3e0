"""Estimates, curves and promises on a thousand simulated audits, whose truth is known."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import expit, logit

from hf_ecif.detection.calibration import (
    Curve,
    Estimate,
    Quality,
    Stratum,
    best_threshold,
    draw_sample,
    estimate,
    promise,
    recalibrate,
    verdicts_needed,
)
from hf_ecif.utils.formatting import Bools, Floats

AUDITS, ROWS = 1000, 1200
LEAST_FLAGGED = 50  # of fewer, most are judged, and little is uncertain
NAMES = ("noise_rate", "precision", "recall")


@dataclass(frozen=True)
class Audit:
    """Rows with a truth, and what a detector says of them, which is biased."""

    wrong: Bools
    probability: Floats

    @property
    def flag(self) -> Bools:
        return self.probability > 0.4

    @property
    def truth(self) -> dict[str, float]:
        found = (self.wrong & self.flag).sum()
        with np.errstate(invalid="ignore"):
            return {
                "noise_rate": self.wrong.mean(),
                "precision": found / self.flag.sum(),
                "recall": found / self.wrong.sum(),
            }

    def judge(self, size: int, seed: int) -> tuple[list[Stratum], dict[int, bool]]:
        rows = np.arange(len(self.wrong))
        strata = draw_sample(rows[self.flag], rows[~self.flag], size, seed)
        drawn = np.concatenate([stratum.drawn for stratum in strata])
        return strata, dict(zip(drawn.tolist(), self.wrong[drawn].tolist(), strict=True))


def simulate(seed: int, rare: bool = False) -> Audit:
    """Between 5 and 40 % wrong, or 1 %; a detector from nearly blind to good, up to nine times too
    sure or unsure."""
    random = np.random.default_rng(seed)
    rate = 0.01 if rare else random.uniform(0.05, 0.4)
    power, shift, stretch = random.uniform(1, 4), random.normal(0, 1), random.normal(0, 0.3)
    wrong = random.random(ROWS) < rate
    signal = random.normal(np.where(wrong, power / 2, -power / 2))
    log_odds = power * signal + logit(rate)
    return Audit(wrong, expit(shift + math.exp(stretch) * log_odds))


def misses(
    audits: Iterator[tuple[Audit, Quality]], least_flagged: int = LEAST_FLAGGED
) -> dict[str, Floats]:
    """For every audit whether the truth is below or above its interval."""
    sides: dict[str, list[tuple[bool, bool]]] = {name: [] for name in NAMES}
    for audit, found in audits:
        for name, true in audit.truth.items():
            interval: Estimate = getattr(found, name)
            if np.isfinite(true) and audit.flag.sum() >= least_flagged:
                sides[name].append((true < interval.low - 1e-9, true > interval.high + 1e-9))
    return {name: np.array(values, dtype=float) for name, values in sides.items()}


class TestEstimate:
    @pytest.mark.parametrize("size", [30, 100])
    def test_intervals_cover_as_often_as_they_say(self, size):
        audits = (simulate(seed) for seed in range(AUDITS))
        judged = ((a, *a.judge(size, seed)) for seed, a in enumerate(audits))
        found = misses((a, estimate(strata, verdicts, a.flag)) for a, strata, verdicts in judged)
        for name, sides in found.items():
            assert len(sides) > 0.8 * AUDITS
            assert 0.88 < 1 - sides.sum(axis=1).mean() < 0.94, name

    def test_rare_errors_are_covered(self):
        audits = [simulate(seed, rare=True) for seed in range(300)]
        judged = ((a, *a.judge(30, seed)) for seed, a in enumerate(audits))
        pairs = ((a, estimate(strata, verdicts, a.flag)) for a, strata, verdicts in judged)
        for name, sides in misses(pairs, least_flagged=0).items():
            assert 1 - sides.sum(axis=1).mean() > 0.88, name

    def test_of_other_flags_than_those_it_was_drawn_by(self):
        found = []
        for seed in range(400):
            audit = simulate(seed)
            strata, verdicts = audit.judge(60, seed)
            other = Audit(audit.wrong, expit(logit(audit.probability) + 1))
            found.append((other, estimate(strata, verdicts, other.flag)))
        for name, sides in misses(iter(found)).items():
            assert 0.88 < 1 - sides.sum(axis=1).mean() < 0.98, name

    def test_the_noise_rate_is_unbiased_though_half_of_the_sample_is_flagged(self):
        audit = simulate(5)
        assert audit.flag.mean() < 0.4
        values = []
        for seed in range(500):
            strata, verdicts = audit.judge(30, seed)
            values.append(estimate(strata, verdicts, audit.flag).noise_rate.value)
        error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - audit.wrong.mean()) < 3 * error
        assert error < 0.005

    def test_when_all_are_judged_nothing_is_uncertain(self):
        audit = simulate(3)
        strata, verdicts = audit.judge(ROWS, 0)
        found = estimate(strata, verdicts, audit.flag)
        assert found.judged == ROWS
        for name, true in audit.truth.items():
            one: Estimate = getattr(found, name)
            assert one.value == one.low == one.high == pytest.approx(true)

    def test_verdicts_on_rows_that_were_not_drawn_do_not_count(self):
        audit = simulate(3)
        strata, verdicts = audit.judge(30, 0)
        others = {row: True for row in range(ROWS) if row not in verdicts}
        assert estimate(strata, verdicts | others, audit.flag) == estimate(
            strata, verdicts, audit.flag
        )

    def test_what_nobody_judged_may_be_anything(self):
        strata = draw_sample(np.arange(10), np.arange(10, 100), 20, 0)
        flag = np.arange(100) < 10
        found = estimate(strata, dict.fromkeys(range(10), True), flag)
        assert found.precision.low > 0.7
        assert found.noise_rate.low < 0.12
        assert found.noise_rate.high > 0.9


class TestSample:
    @pytest.mark.parametrize(
        ("flagged", "others", "counts"),
        [(100, 900, [15, 15]), (5, 995, [5, 25]), (0, 50, [30]), (90, 3, [27, 3]), (4, 5, [4, 5])],
    )
    def test_sizes(self, flagged, others, counts):
        rows = np.random.default_rng(0).permutation(flagged + others)
        strata = draw_sample(rows[:flagged], rows[flagged:], 30, 0)
        assert [len(stratum.drawn) for stratum in strata] == counts
        for stratum in strata:
            assert set(stratum.drawn) <= set(stratum.rows)
            assert len(set(stratum.drawn)) == len(stratum.drawn)

    def test_every_row_is_drawn_as_often_as_its_inclusion_says(self):
        drawn = np.zeros(40)
        for seed in range(2000):
            strata = draw_sample(np.arange(10), np.arange(10, 40), 12, seed)
            for stratum in strata:
                drawn[stratum.drawn] += 1
        expected = np.repeat([stratum.inclusion for stratum in strata], [10, 30])
        np.testing.assert_allclose(drawn / 2000, expected, atol=0.05)

    def test_a_larger_sample_holds_the_smaller_one(self):
        small, large = (
            draw_sample(np.arange(50), np.arange(50, 500), size, 7) for size in (30, 60)
        )
        for one, more in zip(small, large, strict=True):
            assert set(one.drawn) < set(more.drawn)

    def test_the_seed_decides(self):
        one, same, other = (
            draw_sample(np.arange(50), np.arange(50, 500), 30, seed)[1].drawn for seed in (1, 1, 2)
        )
        assert one.tolist() == same.tolist() != other.tolist()


class TestCurve:
    def test_without_verdicts_it_changes_nothing(self):
        curve = recalibrate(np.empty(0), np.empty(0, dtype=bool))
        np.testing.assert_allclose(curve(np.array([0.01, 0.5, 0.9])), [0.01, 0.5, 0.9])

    def test_the_order_stays(self):
        random = np.random.default_rng(0)
        probability = random.uniform(0.01, 0.99, 40)
        curve = recalibrate(probability, probability < 0.5)  # all the wrong way round
        assert (np.diff(curve(np.sort(probability))) > 0).all()

    def test_thirty_verdicts_make_probabilities_better(self):
        """Brier scores over audits whose detectors are off by e^+-1 in odds and more."""
        before, after = [], []
        for seed in range(300):
            audit = simulate(seed)
            _, verdicts = audit.judge(30, seed)
            rows, wrong = np.array([*verdicts]), np.array([*verdicts.values()])
            curve = recalibrate(audit.probability[rows], wrong)
            before.append(np.mean((audit.probability - audit.wrong) ** 2))
            after.append(np.mean((curve(audit.probability) - audit.wrong) ** 2))
        assert np.mean(after) < 0.95 * np.mean(before)

    def test_many_verdicts_find_the_true_curve(self):
        random = np.random.default_rng(0)
        given = random.uniform(0.02, 0.98, 20_000)
        true = Curve(shift=-1.0, stretch=0.6)
        found = recalibrate(given, random.random(20_000) < true(given))
        assert found.shift == pytest.approx(-1.0, abs=0.06)
        assert found.stretch == pytest.approx(0.6, abs=0.04)

    @pytest.mark.parametrize("probability", [0.0, 1.0])
    def test_certainty_is_no_infinity(self, probability):
        curve = recalibrate(np.array([probability] * 3), np.array([True, False, True]))
        assert 0 < curve(np.array([probability]))[0] < 1


class TestPromise:
    @pytest.mark.parametrize("precision", [0.6, 0.8])
    def test_is_kept_as_often_as_its_confidence_says(self, precision):
        made, broken = 0, 0
        for seed in range(AUDITS // 2):
            audit = simulate(seed)
            strata, verdicts = audit.judge(60, seed)
            found = promise(
                strata, verdicts, audit.probability, precision=precision, confidence=0.9
            )
            if found.holds:
                made += 1
                flag = audit.probability >= found.least
                broken += audit.wrong[flag].mean() < precision
        assert broken / (AUDITS // 2) < 0.1
        assert made > 0.15 * AUDITS // 2

    def test_flags_as_many_as_it_can(self):
        wrong = np.arange(1000) < 300
        audit = Audit(wrong, np.linspace(1, 0, 1000))
        strata, verdicts = audit.judge(200, 0)
        found = promise(strata, verdicts, audit.probability, precision=0.7, confidence=0.9)
        flagged = (audit.probability >= found.least).sum()
        assert 300 < flagged < 300 / 0.7

    def test_says_what_the_verdicts_support_instead(self):
        audit = Audit(np.arange(1000) < 300, np.linspace(1, 0, 1000))
        strata, verdicts = audit.judge(30, 0)
        asked = promise(strata, verdicts, audit.probability, precision=0.9, confidence=0.9)
        assert not asked.holds  # it takes 22 flagged rows, and 15 were judged
        assert audit.truth["precision"] == 0.5
        assert 0.2 < asked.supported < 0.5

    def test_how_many_it_takes(self):
        assert verdicts_needed(0.9, 0.9) == math.ceil(math.log(0.1) / math.log(0.9))


def test_the_best_threshold_has_the_best_expected_f1():
    probability = np.random.default_rng(0).beta(0.3, 1, 500)
    cut = best_threshold(probability, 0.0)

    def f1(flag: Bools) -> float:
        return 2 * probability[flag].sum() / (flag.sum() + probability.sum())

    best = max(f1(probability >= other) for other in probability)
    assert f1(probability >= cut) == pytest.approx(best, rel=1e-3)
    assert best_threshold(probability, 0.7) == 0.7
