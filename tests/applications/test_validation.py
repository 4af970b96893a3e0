import numpy as np
import pytest
from datasets import load_dataset
from numpy.typing import NDArray

from hf_ecif.applications.validation import compare, validate
from hf_ecif.config import InfluenceConfig
from hf_ecif.influence.model import InfluenceModel
from tests.support import DEMO

Floats = NDArray[np.float64]
RNG = np.random.default_rng(0)
CHANGES = RNG.normal(size=60)


def once(actual: Floats) -> Floats:
    """As changes of single retrainings."""
    return actual[:, None]


def repeated(actual: Floats, noise: float, repeats: int) -> Floats:
    rng = np.random.default_rng(2)
    return actual[:, None] + noise * rng.normal(size=(len(actual), repeats))


def test_perfect_predictions() -> None:
    result = compare(CHANGES, once(2 * CHANGES + 1), 0.5, 1.0)
    assert [result.spearman, result.low, result.high] == pytest.approx([1, 1, 1])
    assert result.slope == pytest.approx(2)
    assert result.sign_agreement == 1
    assert result.ceiling is None
    assert "predict the order of retrainings on" in result.verdict


def test_the_interval_holds_the_truth_and_shrinks() -> None:
    few, many = (
        compare(x, once(x + RNG.normal(size=len(x))), 0.5, 1.0)
        for x in (RNG.normal(size=15), RNG.normal(size=1500))
    )
    assert few.low < 0.69 < few.high  # 6/pi asin(r/2) of the true correlation 0.71
    assert many.low < 0.69 < many.high
    assert many.high - many.low < 0.3 * (few.high - few.low)


@pytest.mark.parametrize(
    ("noise", "words"),
    [(0.1, "predict the order"), (0.8, "much of the order"), (30.0, "do not predict")],
)
def test_the_verdict_follows_the_interval(noise: float, words: str) -> None:
    actual = CHANGES + noise * np.random.default_rng(1).normal(size=60)
    assert words in compare(CHANGES, once(actual), 0.5, 1.0).verdict


def test_signs_are_judged_only_where_both_occur() -> None:
    """A constant guess would be right wherever all removals hurt."""
    both = compare(CHANGES, once(CHANGES), 0.5, 1.0)
    assert both.signs_right == 1
    assert "tell help from harm in 100 % of them" in both.verdict
    hurt = compare(CHANGES, once(CHANGES - CHANGES.min() + 1), 0.5, 1.0)
    assert hurt.signs_right is None
    assert hurt.spearman == pytest.approx(1)
    assert "all removals hurt, so whether they tell help from harm is not known" in hurt.verdict
    opposite = compare(CHANGES, once(CHANGES - np.median(CHANGES)), 0.5, 1.0)
    wrong = CHANGES * (CHANGES - np.median(CHANGES)) < 0
    assert wrong.any()
    assert opposite.signs_right == pytest.approx(1 - wrong.mean())


def test_few_subsets_leave_it_open() -> None:
    actual = CHANGES + np.random.default_rng(1).normal(size=60)
    assert "too few subsets" in compare(CHANGES[:6], once(actual[:6]), 0.5, 1.0).verdict
    assert "nothing to rank" in compare(CHANGES[:6], once(np.ones(6)), 0.5, 1.0).verdict


@pytest.mark.parametrize("repeats", [2, 8])
def test_a_perfect_prediction_reaches_the_ceiling(repeats: int) -> None:
    """And no more: what retrainings do at random, no scores predict."""
    changes = np.random.default_rng(3).normal(size=3000)
    result = compare(changes, repeated(changes, 1.0, repeats), 0.5, 1.0)
    assert result.ceiling is not None
    assert result.ceiling == pytest.approx((repeats / (repeats + 1)) ** 0.5, abs=0.03)
    assert result.spearman == pytest.approx(result.ceiling, abs=0.03)
    assert np.mean(result.actual) == pytest.approx(np.mean(changes), abs=0.05)


def test_the_verdict_is_about_what_can_be_reached() -> None:
    """Single noisy retrainings look bad; that they agree as little is known of repeated ones."""
    changes = np.random.default_rng(3).normal(size=300)
    noisy = repeated(changes, 1.0, 2)
    assert "much of the order" in compare(changes, once(noisy.mean(axis=1)), 0.5, 1.0).verdict
    assert "predict the order of retrainings on" in compare(changes, noisy, 0.5, 1.0).verdict


def test_retrainings_that_do_not_agree_say_nothing() -> None:
    opposite = np.stack([CHANGES, -CHANGES], axis=1)
    result = compare(CHANGES, opposite + 1e-3 * RNG.normal(size=(60, 2)), 0.5, 1.0)
    assert result.ceiling == 0
    assert "more `repeats`" in result.verdict


def test_scores_predict_retrainings_of_the_demo() -> None:
    """Halves of 300 rows, retrained for real."""
    data = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    config = InfluenceConfig(batch_size=64, probes=1, fit_epochs=5)
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    train, query = model.read(data.select(range(150))), model.read(data.select(range(150, 180)))
    influence = model.fit(train, query)
    ticks: list[int] = []
    result = validate(
        influence, query, subsets=16, repeats=1, progress=lambda name, steps: ticks.append
    )
    assert len(ticks) == 17
    assert len(result.predicted) == len(result.actual) == 16
    assert result.spearman > 0.3
    assert result.seconds > 0
