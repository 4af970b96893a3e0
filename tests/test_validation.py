import numpy as np
import pytest
from datasets import load_dataset

from hf_ecif.config import InfluenceConfig
from hf_ecif.influence import InfluenceModel
from hf_ecif.validation import compare, validate
from tests.test_cli import DEMO

RNG = np.random.default_rng(0)
CHANGES = RNG.normal(size=60)


def test_perfect_predictions() -> None:
    result = compare(CHANGES, 2 * CHANGES + 1, 0.5, 1.0)
    assert [result.spearman, result.low, result.high] == pytest.approx([1, 1, 1])
    assert result.slope == pytest.approx(2)
    assert result.sign_agreement == 1
    assert "foretell retrainings on" in result.verdict


def test_the_interval_holds_the_truth_and_shrinks() -> None:
    few, many = (
        compare(x, x + RNG.normal(size=len(x)), 0.5, 1.0)
        for x in (RNG.normal(size=15), RNG.normal(size=1500))
    )
    assert few.low < 0.69 < few.high  # 6/pi asin(r/2) of the true correlation 0.71
    assert many.low < 0.69 < many.high
    assert many.high - many.low < 0.3 * (few.high - few.low)


@pytest.mark.parametrize(
    ("noise", "words"), [(0.1, "foretell"), (0.8, "rank"), (30.0, "do not foretell")]
)
def test_the_verdict_follows_the_interval(noise: float, words: str) -> None:
    result = compare(CHANGES, CHANGES + noise * np.random.default_rng(1).normal(size=60), 0.5, 1.0)
    assert words in result.verdict


def test_scores_foretell_retrainings_of_the_demo() -> None:
    """Halves of 300 rows, retrained for real."""
    data = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    config = InfluenceConfig(batch_size=64, probes=1, fit_epochs=5)
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    train, query = model.read(data.select(range(150))), model.read(data.select(range(150, 180)))
    model.fit(train, query)
    ticks: list[int] = []
    result = validate(
        model, train, query, subsets=16, repeats=1, progress=lambda name, steps: ticks.append
    )
    assert len(ticks) == 17
    assert len(result.predicted) == len(result.actual) == 16
    assert result.spearman > 0.3
    assert result.seconds > 0
