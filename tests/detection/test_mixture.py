"""The mixture against densities that are known: its tilt, its rate, and how sure it is."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from hf_ecif.detection import mixture as module
from hf_ecif.detection.mixture import (
    Mixture,
    Sample,
    Samples,
    fit_mixture,
    rate_interval,
)

Floats = NDArray[np.float64]
NONE = Sample(np.empty((0, 2)), 0)


def normals(shift: float, count: int, generator: np.random.Generator) -> Floats:
    """Two signals; the first is moved by ``shift``, so that the log ratio is linear in it."""
    signals = generator.standard_normal((count, 2))
    signals[:, 0] += shift
    return signals


def draw(
    rate: float, shift: float, seed: int, *, unknown: int = 400, right: int = 60
) -> tuple[Samples, int]:
    """Samples of a mixture, and how many of the unknown rows are wrong."""
    generator = np.random.default_rng(seed)
    wrong = int(generator.binomial(unknown, rate))
    data = np.concatenate(
        [normals(0, unknown - wrong, generator), normals(shift, wrong, generator)]
    )
    samples = Samples(
        Sample(data, unknown),
        Sample(normals(0, right, generator), right),
        NONE,
        [Sample(normals(shift, 150, generator), 150)],
    )
    return samples, wrong


def test_gradient_is_that_of_the_value() -> None:
    samples, _ = draw(0.2, 2.0, 0)
    two_kinds = Samples(
        samples.unknown,
        samples.right,
        Sample(samples.unknown.signals[:7] + 1, 7),
        [*samples.injected, Sample(samples.injected[0].signals[:50] - 0.7, 50)],
    )
    likelihood = module._Likelihood(two_kinds)
    vector = likelihood._pack(likelihood.begin(0.3))
    vector += 0.1 * np.random.default_rng(0).standard_normal(len(vector))
    _, gradient = likelihood._value_and_gradient(vector)
    for number in range(len(vector)):
        step = np.zeros_like(vector)
        step[number] = 1e-5
        up, down = (likelihood._value_and_gradient(vector + s)[0] for s in (step, -step))
        assert gradient[number] == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-5)


def test_value_is_the_likelihood_of_the_sample_that_a_row_is_of() -> None:
    """Bayes: in the pooled rows, a row at x is of sample g with a probability that is known.

    The density ratio cancels in it, and the sum of its logarithms over the rows is the value, but
    for the penalties and for N_g log N_g of every sample.
    """
    samples, _ = draw(0.2, 2.0, 1)
    likelihood = module._Likelihood(samples)
    fit = fit_mixture(samples)
    ratio = [np.exp(fit.log_ratio(sample.signals)) for sample in samples.all()]
    counts = np.array([sample.rows for sample in samples.all()])
    density = [
        lambda r: fit.rate * r + 1 - fit.rate,  # over that of right rows
        np.ones_like,
        lambda r: r,
        lambda r: r,
    ]
    expected = 0.0
    for group, r in enumerate(ratio):
        pooled = sum(count * of(r) for count, of in zip(counts, density, strict=True))
        expected += np.log(density[group](r) / pooled).sum()
    value, _ = likelihood._value_and_gradient(likelihood._pack(fit))
    (guess,), (weights,) = likelihood.guess.weights[:, 1:], fit.weights[:, 1:]
    penalty = minimize_scalar(
        lambda scale: (
            ((weights - scale * guess) ** 2).sum() / (2 * module.DIFFERENCE_PENALTY)
            + scale**2 / (2 * module.SCALE_PENALTY)
        )
    ).fun
    prior = module.SEEN_RIGHT * np.log(1 - fit.rate)
    assert value == pytest.approx(expected - penalty + prior, rel=1e-6)


def test_no_signal_speaks_for_what_it_speaks_against() -> None:
    """Where a signal is lower in the injected rows by chance, it counts for nothing."""
    rng = np.random.default_rng(0)
    unknown, injected = rng.normal(size=(400, 2)), rng.normal([2.0, -0.7], size=(60, 2))
    none = Sample(np.empty((0, 2)), 0)
    fit = fit_mixture(Samples(Sample(unknown, 400), none, none, [Sample(injected, 60)]))
    assert fit.weights[0, 1] > 0
    assert fit.weights[0, 2] == 0


@pytest.mark.parametrize("shift", [2.0, 3.0])
def test_log_ratio_is_that_of_the_densities(shift: float) -> None:
    samples, _ = draw(0.3, shift, 2, unknown=4000, right=2000)
    fit = fit_mixture(samples)
    x = np.linspace(0, shift, 9)
    line = np.stack([x, np.zeros(9)], axis=1)
    expected = norm.logpdf(x, shift) - norm.logpdf(x)
    np.testing.assert_allclose(fit.log_ratio(line), expected, atol=0.7)
    assert fit.rate == pytest.approx(0.3, abs=0.02)


def estimates(rate: float, shift: float, runs: int) -> list[tuple[float, Mixture, Samples]]:
    found = []
    for seed in range(runs):
        samples, wrong = draw(rate, shift, seed, unknown=200)
        found.append((wrong / 200, fit_mixture(samples), samples))
    return found


@pytest.mark.parametrize(("rate", "shift"), [(0.2, 2.0), (0.5, 1.5)])
def test_interval_covers(rate: float, shift: float) -> None:
    """95 % of the intervals hold the rate that the rows were drawn at; a binomial test at 1 %."""
    runs = 40
    inside = 0
    for _, fit, samples in estimates(rate, shift, runs):
        low, high = rate_interval(samples, fit)
        assert low <= fit.rate <= high
        inside += low <= rate <= high
    assert inside >= 34


def test_interval_of_right_rows_begins_at_zero() -> None:
    starts = [rate_interval(s, fit)[0] for _, fit, s in estimates(0.0, 3.0, 12)]
    assert np.mean(np.array(starts) < 0.005) > 0.8


def test_more_verified_rows_make_a_narrower_interval() -> None:
    def width(right: int) -> float:
        widths = []
        for seed in range(4):
            samples, _ = draw(0.2, 1.5, seed, right=right)
            low, high = rate_interval(samples, fit_mixture(samples))
            widths.append(high - low)
        return float(np.mean(widths))

    assert width(400) < 0.75 * width(20)


def test_higher_level_makes_a_wider_interval() -> None:
    samples, _ = draw(0.2, 2.0, 0)
    fit = fit_mixture(samples)
    (low, high), (lower, higher) = (rate_interval(samples, fit, level) for level in (0.8, 0.99))
    assert lower < low < fit.rate < high < higher


def test_rows_of_several_runs_count_once() -> None:
    """The same rows, three times: the same answer, and no surer."""
    samples, _ = draw(0.2, 2.0, 0)
    thrice = Samples(
        Sample(np.tile(samples.unknown.signals, (3, 1)), samples.unknown.rows),
        Sample(np.tile(samples.right.signals, (3, 1)), samples.right.rows),
        NONE,
        samples.injected,
    )
    once, again = fit_mixture(samples), fit_mixture(thrice)
    assert again.rate == pytest.approx(once.rate, abs=0.01)
    first, second = rate_interval(samples, once), rate_interval(thrice, again)
    np.testing.assert_allclose(second, first, atol=0.02)


def test_rows_known_to_be_wrong_tell_of_which_kind_wrong_rows_are() -> None:
    generator = np.random.default_rng(0)
    samples, _ = draw(0.2, 2.0, 0)
    other, few = (normals(2.0, count, generator)[:, ::-1].copy() for count in (150, 40))
    kinds = [*samples.injected, Sample(other, 150)]
    known = Sample(few, 40)
    shares = [
        fit_mixture(Samples(samples.unknown, samples.right, wrong, kinds)).shares[1]
        for wrong in (NONE, known)
    ]
    assert shares[0] < 0.2
    assert shares[1] > shares[0] + 0.2


def test_large_samples_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 500)
    samples, wrong = draw(0.3, 3.0, 0, unknown=3000)
    thinned = samples.thinned()
    assert [len(sample.signals) for sample in thinned.all()] == [500, 60, 0, 150]
    assert [sample.rows for sample in thinned.all()] == [500, 60, 0, 150]
    assert fit_mixture(samples).rate == pytest.approx(wrong / 3000, abs=0.06)


def test_few_rows_are_ranked_by_the_guess() -> None:
    """Where a second signal is noise, twenty rows give it next to no weight."""
    samples, _ = draw(0.3, 2.0, 0, unknown=20, right=0)
    weights = fit_mixture(samples).weights
    line = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    first, none, second = fit_mixture(samples).log_ratio(line)
    assert abs(second - none) < 0.5 * (first - none)
    assert np.isfinite(weights).all()
