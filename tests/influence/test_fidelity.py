"""Predictions against true retraining: delete a pair and fit to convergence again."""

import pytest
import torch

from hf_ecif.engine.objective import Objective
from tests.support.retraining import BATCHES, EVERY, PAIRS, WRONG, Study, spearman, training_loss


@pytest.fixture(scope="module")
def study() -> Study:
    return Study()


def test_the_two_losses_are_one(study: Study) -> None:
    """The oracle and the library train on the same objective."""
    objective = Objective(study.encoder, study.features, BATCHES)
    oracle = training_loss(study.theta, study.theta, study.features, EVERY)
    torch.testing.assert_close(objective.value(study.theta), oracle)


def test_removing_the_wrong_pair_helps(study: Study) -> None:
    assert study.true_change(WRONG) < 0
    task = study.scores["exact"].task
    assert task[WRONG] < 0
    assert task.argmin() == WRONG


def test_predictions_rank_true_retrainings(study: Study) -> None:
    pairs = [WRONG, *range(0, PAIRS, 3)]
    true = torch.tensor([study.true_change(pair) for pair in pairs], dtype=torch.float64)
    exact, first_order = (study.scores[form] for form in ("exact", "first_order"))
    assert spearman(exact.task[pairs], true) >= 0.9
    assert spearman(first_order.task[pairs], true) >= 0.85
    assert spearman(exact.positive[pairs], true) < spearman(exact.task[pairs], true)
    predicted = exact.task[pairs]
    assert 0.5 < (true * predicted).sum() / predicted.square().sum() < 2
