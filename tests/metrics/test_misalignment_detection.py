import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_fscore_support

from hf_ecif import metrics

# Few distinct values, so that ties are common.
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return metrics.load("misalignment_detection", cache_dir=str(tmp_path_factory.mktemp("cache")))


def compute(metric, pairs, **options):
    predictions, references = zip(*pairs, strict=True)
    return metric.compute(predictions=predictions, references=references, **options)


def steps(pairs):
    """Average precision by its definition: precision at every recall that a threshold reaches."""
    total, area, before = sum(wrong for _, wrong in pairs), 0.0, 0.0
    for cut in sorted({score for score, _ in pairs}, reverse=True):
        flagged = [wrong for score, wrong in pairs if score >= cut]
        area += (sum(flagged) / total - before) * sum(flagged) / len(flagged)
        before = sum(flagged) / total
    return area


class TestAgainstDefinitions:
    @settings(max_examples=60, deadline=None)
    @given(PAIRS)
    def test_curves(self, metric, pairs):
        result = compute(metric, pairs)
        wrong = [score for score, is_wrong in pairs if is_wrong]
        right = [score for score, is_wrong in pairs if not is_wrong]
        wins = [(w > r) + (w == r) / 2 for w in wrong for r in right]
        assert result["auroc"] == (pytest.approx(np.mean(wins)) if wins else None)
        assert result["auprc"] == (pytest.approx(steps(pairs)) if wrong else None)
        lacking = {name for name, value in result.items() if value is None}
        assert lacking == set(result["undefined"])

    @settings(max_examples=60, deadline=None)
    @given(PAIRS, st.integers(1, 8))
    def test_top_is_the_mean_over_orders_of_ties(self, metric, pairs, k):
        result = compute(metric, pairs, k=k)
        tops = [
            np.mean([wrong for _, wrong in sorted(order, key=lambda pair: -pair[0])[:k]])
            for order in itertools.permutations(pairs)
        ]
        assert result["precision_at_k"] == pytest.approx(np.mean(tops))
        assert result["k"] == min(k, len(pairs))

    @settings(max_examples=60, deadline=None)
    @given(PAIRS)
    def test_best_f1(self, metric, pairs):
        result = compute(metric, pairs)
        scores, wrong = map(np.array, zip(*pairs, strict=True))
        if not wrong.any():
            assert result["best_f1"] is result["best_threshold"] is None
            return
        best = {cut: f1_score(wrong, scores >= cut) for cut in set(scores.tolist())}
        assert result["best_f1"] == pytest.approx(max(best.values()))
        assert result["best_threshold"] == max(
            cut for cut, f1 in best.items() if f1 == pytest.approx(result["best_f1"])
        )

    @settings(max_examples=60, deadline=None)
    @given(PAIRS, st.floats(-1, 4))
    def test_given_threshold(self, metric, pairs, threshold):
        result = compute(metric, pairs, threshold=threshold)
        scores, wrong = map(np.array, zip(*pairs, strict=True))
        expected = precision_recall_fscore_support(
            wrong, scores >= threshold, average="binary", zero_division=np.nan
        )[:3]
        actual = [result[name] for name in ("precision", "recall", "f1")]
        assert [np.nan if x is None else x for x in actual] == pytest.approx(expected, nan_ok=True)


class TestEdges:
    def test_all_values_are_plain_numbers(self, metric):
        result = metric.compute(
            predictions=np.float32([0.5, 0.25]), references=np.array([True, False]), threshold=0.5
        )
        assert {type(value) for value in result.values()} == {int, float, dict}
        assert result["f1"] == 1  # at the threshold is flagged

    def test_nothing_wrong_has_reasons(self, metric):
        result = metric.compute(predictions=[1, 2], references=[0, 0], threshold=1.5)
        assert result["undefined"]["auroc"] == "no pair is misaligned"
        assert result["precision"] == result["f1"] == result["precision_at_k"] == 0

    def test_all_wrong_has_reasons(self, metric):
        result = metric.compute(predictions=[1, 2], references=[1, 1], threshold=9)
        assert result["undefined"] == {
            "auroc": "every pair is misaligned",
            "precision": "no pair is flagged",
        }
        assert result["auprc"] == result["best_f1"] == 1

    def test_without_a_threshold_nothing_is_said_of_flags(self, metric):
        assert "f1" not in metric.compute(predictions=[1, 2], references=[0, 1])


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ([0.1, float("nan")], [0, 1], {}, r"predictions\[1\] is nan"),
        ([0.1, 0.2, None], [0, 1, 1], {}, r"predictions\[2\] is None"),
        ([float("inf"), 1.0], [0, 1], {}, r"predictions\[0\] is inf"),
        ([0.1, 0.2], [0, 0.5], {}, r"references\[1\] is 0.5"),
        ([0.1, 0.2], [None, 1], {}, r"references\[0\] is None"),
        ([0.1, 0.2], [0, 1], {"k": 0}, "k = 0: must be at least 1"),
        ([], [], {}, "no predictions"),
        ([0.1], [0, 1], {}, "Mismatch"),
    ],
)
def test_bad_input_is_named(tmp_path, predictions, references, options, message):
    metric = metrics.load("misalignment_detection", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)
