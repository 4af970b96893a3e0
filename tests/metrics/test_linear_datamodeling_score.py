import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from hf_ecif import metrics

VALUES = st.lists(st.integers(0, 5), min_size=3, max_size=12)


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return metrics.load("linear_datamodeling_score", cache_dir=cache)


def draw(subsets, repeats=1, noise=1.0, seed=0):
    """Predictions that are the truth, and noisy trainings."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=subsets)
    return truth, truth[:, None] + noise * rng.normal(size=(subsets, repeats))


class TestScore:
    @settings(max_examples=60, deadline=None)
    @given(st.data(), VALUES)
    def test_is_spearman(self, metric, data, predictions):
        count = len(predictions)
        references = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
        result = metric.compute(predictions=predictions, references=references, resamples=0)
        if len(set(predictions)) == 1 or len(set(references)) == 1:
            assert result["lds"] is None
            assert "equal" in result["undefined"]["lds"]
        else:
            assert result["lds"] == pytest.approx(spearmanr(predictions, references).statistic)

    def test_repeats_are_averaged(self, metric):
        predictions, references = draw(20, repeats=3)
        result = metric.compute(predictions=predictions, references=references)
        expected = spearmanr(predictions, references.mean(axis=1)).statistic
        assert result["lds"] == pytest.approx(expected)
        assert (result["subsets"], result["repeats"]) == (20, 3)

    def test_units_of_the_predictions_do_not_matter(self, metric):
        predictions, references = draw(20)
        results = [
            metric.compute(predictions=p, references=references)
            for p in (predictions, np.exp(3 * predictions) + 7)
        ]
        assert results[0] == results[1]


class TestBootstrap:
    def test_is_that_of_a_plain_loop(self, metric):
        predictions, references = draw(15)
        result = metric.compute(
            predictions=predictions, references=references, resamples=200, confidence=0.8, seed=3
        )
        rng = np.random.default_rng(3)
        scores = [
            spearmanr(predictions[chosen], references[chosen, 0]).statistic
            for chosen in rng.integers(15, size=(200, 15))
        ]
        assert result["stderr"] == pytest.approx(np.std(scores))
        interval = [result["ci_low"], result["ci_high"]]
        assert interval == pytest.approx(np.quantile(scores, [0.1, 0.9]))

    def test_stderr_is_the_spread_over_draws_of_subsets(self, metric):
        scores, errors = [], []
        for seed in range(40):
            predictions, references = draw(60, seed=seed)
            result = metric.compute(predictions=predictions, references=references, resamples=200)
            scores.append(result["lds"])
            errors.append(result["stderr"])
        assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.35)

    def test_constant_samples_are_left_out(self, metric):
        result = metric.compute(predictions=[1, 1, 2], references=[1, 1, 2])
        assert result["lds"] == result["ci_low"] == result["ci_high"] == pytest.approx(1)

    def test_none_of_it_without_resamples(self, metric):
        result = metric.compute(predictions=[1, 2, 3], references=[1, 3, 2], resamples=0)
        assert result["stderr"] is result["ci_low"] is result["ci_high"] is None
        assert result["undefined"]["stderr"] == "resamples = 0"


class TestCeiling:
    @pytest.mark.parametrize(("repeats", "noise"), [(2, 0.5), (2, 2.0), (5, 1.0)])
    def test_is_what_the_truth_itself_reaches(self, metric, repeats, noise):
        truth, references = draw(4000, repeats, noise)
        result = metric.compute(predictions=truth, references=references, resamples=0)
        assert result["noise_ceiling"] == pytest.approx(result["lds"], abs=0.02)
        linear = pearsonr(truth, references.mean(axis=1)).statistic
        assert result["noise_ceiling"] == pytest.approx(linear, abs=0.03)

    def test_order_of_repeats_does_not_matter(self, metric):
        predictions, references = draw(12, repeats=3)
        results = [
            metric.compute(predictions=predictions, references=references[:, order], resamples=0)
            for order in ([0, 1, 2], [2, 0, 1])
        ]
        assert results[0]["noise_ceiling"] == pytest.approx(results[1]["noise_ceiling"])

    @pytest.mark.parametrize(
        ("references", "reason"),
        [([1, 2, 3], "repeated"), ([[1], [2], [3]], "repeated"), ([[1, 2]] * 3, "equal")],
    )
    def test_reason_where_it_cannot_be_known(self, metric, references, reason):
        result = metric.compute(predictions=[1, 2, 3], references=references, resamples=0)
        assert result["noise_ceiling"] is None
        assert reason in result["undefined"]["noise_ceiling"]

    def test_is_zero_where_repeats_disagree(self, metric):
        references = [[1, 3], [2, 2], [3, 1]]
        result = metric.compute(predictions=[1, 2, 3], references=references, resamples=0)
        assert result["noise_ceiling"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ([1, 2], [1, 2], {}, "2 subsets"),
        ([1, None, 3], [1, 2, 3], {}, r"predictions\[1\]"),
        ([1, 2, 3], [1, 2, float("nan")], {}, r"references\[2\]"),
        ([1, 2, 3], [[1, 2], [1, 2], [1]], {}, r"references\[2\] has 1 repeats"),
        ([1, 2, 3], [1, 2, 3], {"confidence": 95}, "confidence = 95"),
        ([1, 2, 3], [1, 2, 3], {"resamples": -1}, "resamples = -1"),
    ],
)
def test_bad_input_is_named(tmp_path, predictions, references, options, message):
    metric = metrics.load("linear_datamodeling_score", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)
