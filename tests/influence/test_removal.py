"""Closed-form removal against true retraining in float64."""

import pytest
import torch
from torch import Tensor

from hf_ecif.engine.objective import Objective
from hf_ecif.engine.system import Spectrum, estimate_spectrum
from hf_ecif.influence.removal import RemovalReport, remove
from tests.support.retraining import BATCHES, L2, PAIRS, WRONG, Study, minimise


@pytest.fixture(scope="module")
def study() -> Study:
    return Study()


def remove_from(study: Study, members: list[int], steps: int) -> tuple[Tensor, RemovalReport]:
    """With the full Hessian and next to no damping, so that steps are Newton's."""
    objective = Objective(study.encoder, study.features, BATCHES, l2=L2, center=study.origin)
    gone = torch.zeros(PAIRS, dtype=torch.bool)
    gone[members] = True
    spectrum = estimate_spectrum(lambda v: objective.hessian(study.theta, v), study.theta)
    return remove(
        objective,
        study.theta,
        gone,
        spectrum,
        steps=steps,
        curvature="hessian",
        relative_damping=1e-9,
        tolerance=1e-10,
        max_iterations=2000,
    )


def test_newton_steps_arrive_at_the_retrained_model(study: Study) -> None:
    oracle = minimise(study.theta, study.origin, study.features, WRONG)
    theta, report = remove_from(study, [WRONG], steps=8)
    torch.testing.assert_close(theta, oracle, rtol=1e-6, atol=1e-7)
    assert report.removed == 1
    assert report.residuals == sorted(report.residuals, reverse=True)
    assert report.change == pytest.approx((oracle - study.theta).norm().item(), rel=1e-5)


def test_one_step_goes_most_of_the_way_for_an_ordinary_pair(study: Study) -> None:
    oracle = minimise(study.theta, study.origin, study.features, 9)
    theta, report = remove_from(study, [9], steps=1)
    assert (theta - oracle).norm() < 0.3 * (study.theta - oracle).norm()
    assert report.trials == len(report.solvers) == 1


def test_a_set_leaves_together(study: Study) -> None:
    """At the end the gradient of what remains is zero, as that of the whole was at the start."""
    members = [1, WRONG, 9, 20, 21, 22]
    theta, _ = remove_from(study, members, steps=12)
    gone = torch.zeros(PAIRS, dtype=torch.bool)
    gone[members] = True
    whole = Objective(study.encoder, study.features, BATCHES, l2=L2, center=study.origin)
    assert whole.without(gone).gradient(theta).norm() < 1e-7
    assert whole.without(gone).gradient(study.theta).norm() > 1e-3


def test_without_keeps_the_denominators(study: Study) -> None:
    """The mean over ``B`` stays a mean over ``B`` when some of a batch are gone."""
    gone = torch.zeros(PAIRS, dtype=torch.bool)
    gone[[0, 1, 9]] = True
    whole = Objective(study.encoder, study.features, BATCHES)
    expected = sum(
        Objective(study.encoder, study.features, [rows[~gone[rows]]]).value(study.theta)
        * (~gone[rows]).sum()
        for rows in BATCHES
    )
    torch.testing.assert_close(whole.without(gone).value(study.theta), expected / PAIRS)


def test_batches_of_one_have_no_loss(study: Study) -> None:
    gone = torch.ones(PAIRS, dtype=torch.bool)
    gone[[0, 9, 10]] = False
    remaining = Objective(study.encoder, study.features, BATCHES).without(gone)
    assert [rows.tolist() for rows in remaining.batches] == [[9, 10]]
    with pytest.raises(ValueError, match="two rows"):
        remaining.without(torch.ones(PAIRS, dtype=torch.bool))


def test_a_short_fit_is_held_about_where_it_stopped(study: Study) -> None:
    """More steps arrive somewhere; they do not follow the flat directions ever further."""
    objective = Objective(study.encoder, study.features, BATCHES)
    gone = torch.zeros(PAIRS, dtype=torch.bool)
    gone[[1, WRONG, 9, 20]] = True
    theta, penalty = study.origin, 0.05
    moved, report = remove(
        objective,
        theta,
        gone,
        Spectrum(1.0, 1.0),
        steps=30,
        rescale=True,
        relative_damping=penalty,
        tolerance=1e-9,
        max_iterations=2000,
    )
    remaining = objective.without(gone, rescale=True)
    pull = remaining.gradient(moved) - objective.gradient(theta) + penalty * (moved - theta)
    assert pull.norm() < 1e-7
    assert len(report.solvers) < 30


def test_rescaled_what_remains_is_a_mean(study: Study) -> None:
    gone = torch.zeros(PAIRS, dtype=torch.bool)
    gone[[0, 1, 9]] = True
    whole = Objective(study.encoder, study.features, BATCHES)
    mean = whole.without(gone, rescale=True)
    assert sum(mean.weights or ()) == pytest.approx(1)
    factor = PAIRS / (PAIRS - 3)
    torch.testing.assert_close(
        mean.value(study.theta), factor * whole.without(gone).value(study.theta)
    )
