"""Captions of one image judged together, against sums over all that may have happened."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

from hf_ecif.detection import siblings
from hf_ecif.detection.siblings import pool_captions


def draw(
    images: int, each: int, whole: float, single: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log ratios of pairs, their images, and which are wrong; a signal is normal, 2 apart."""
    rng = np.random.default_rng(seed)
    is_whole = rng.random(images) < whole
    wrong = is_whole[:, None] | (rng.random((images, each)) < single)
    signal = rng.normal(2 * wrong)
    return (2 * signal - 2).ravel(), np.repeat(np.arange(images), each), wrong.ravel()


def by_enumeration(ratios: np.ndarray, whole: float, single: float) -> np.ndarray:
    """Probability of every caption of one image, summed over all states of its captions."""
    total, wrong = 0.0, np.zeros(len(ratios))
    for states in product((False, True), repeat=len(ratios)):
        bad = np.array(states)
        prior = (1 - whole) * np.prod(np.where(bad, single, 1 - single)) + whole * bad.all()
        weight = prior * np.prod(np.where(bad, ratios, 1))
        total += weight
        wrong += weight * bad
    return wrong / total


@pytest.mark.parametrize("each", [2, 3, 5])
def test_probabilities_are_sums_over_all_states(each: int, monkeypatch: Any) -> None:
    """Where captions are independent witnesses."""
    monkeypatch.setattr(siblings, "DEPENDENCE", 0.0)
    log_ratio, images, _ = draw(40, each, 0.2, 0.1)
    whole, single = siblings._how_often(log_ratio, images)
    pooled = pool_captions(log_ratio, images)
    found = expit(pooled + logit(whole + (1 - whole) * single))
    for image in range(40):
        expected = by_enumeration(np.exp(log_ratio[images == image]), whole, single)
        np.testing.assert_allclose(found[images == image], expected, rtol=1e-9)


@pytest.mark.parametrize(("whole", "single"), [(0.2, 0.0), (0.0, 0.2), (0.1, 0.1), (0.0, 0.0)])
def test_finds_how_often_either_happens(whole: float, single: float) -> None:
    log_ratio, images, _ = draw(4000, 3, whole, single)
    found = siblings._how_often(log_ratio, images)
    np.testing.assert_allclose(found, (whole, single), atol=0.02)


def test_copies_of_a_witness_say_no_more_than_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(siblings, "DEPENDENCE", 1.0)
    odds = [
        siblings._log_odds_of_image(np.full(m, 1.5), np.zeros(m, int), 0.2, 0.1, power=1.0)
        for m in (1, 4)
    ]
    np.testing.assert_allclose(*odds)
    log_ratio, images, _ = draw(200, 4, 0.2, 0.1)
    strong = pool_captions(log_ratio, images)
    monkeypatch.setattr(siblings, "DEPENDENCE", 0.0)
    assert np.std(strong) < np.std(pool_captions(log_ratio, images))


def test_siblings_agree_on_an_image_that_is_wrong_as_a_whole() -> None:
    """The weakest of three captions is carried by the others, and only then."""
    log_ratio, images, wrong = draw(500, 3, 0.15, 0.0)
    pooled = pool_captions(log_ratio, images)
    weak = wrong & (log_ratio < 0)
    assert weak.sum() > 20
    assert (pooled[weak] > 0).mean() > 0.5
    assert pooled[weak].mean() > log_ratio[weak].mean() + 1
    singly, _, bad = draw(500, 3, 0.0, 0.15)
    apart = pool_captions(singly, images)
    assert np.corrcoef(apart, singly)[0, 1] > 0.99
    assert (apart[~bad] < 0).mean() >= (singly[~bad] < 0).mean() - 0.01


def test_images_with_one_caption_stay_as_they_are() -> None:
    log_ratio, images, _ = draw(60, 3, 0.2, 0.1)
    alone = np.arange(60) + 100
    both = pool_captions(
        np.concatenate([log_ratio[:60], log_ratio]), np.concatenate([alone, images])
    )
    np.testing.assert_array_equal(both[:60], log_ratio[:60])
    np.testing.assert_allclose(both[60:], pool_captions(log_ratio, images))


def test_order_makes_no_difference() -> None:
    log_ratio, images, _ = draw(60, 3, 0.2, 0.1)
    order = np.random.default_rng(1).permutation(len(images))
    found = pool_captions(log_ratio[order], 7 * images[order])
    np.testing.assert_allclose(found, pool_captions(log_ratio, images)[order], rtol=1e-9)


def test_certain_pairs_stay_finite() -> None:
    images = np.repeat(np.arange(30), 2)
    pooled = pool_captions(np.repeat([900.0, -900.0, 0.0], 20), images)
    assert np.isfinite(pooled).all()
    assert pooled[0] > 100 > -100 > pooled[25]
