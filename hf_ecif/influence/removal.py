"""Removal of pairs from a trained model in closed form, as if it was trained without them.

A fit that stopped early ends where ``grad J(theta_0)`` is not zero, and hardly moves along
directions of small curvature. A penalty ``damping/2 |theta - start|^2`` would have both effects. A
retraining without the set, under the same penalty, ends where this vanishes, in which the start no
longer occurs:

    r(theta) = grad J_without(theta) - grad J(theta_0) + damping (theta - theta_0)

One Newton step from ``theta_0`` with the curvature of the *remaining* pairs is the influence
function of the whole set in its exact group form, without the shrinkage due to a pair's own
curvature. Further steps, each with fresh curvature, follow a loss that is not quadratic. The
penalty is centred at ``theta_0`` in all of them: centred at the end of the step before, each step
would go further along flat directions than the fit did.

``r`` is the gradient of ``M(theta) = J_without(theta) - <grad J(theta_0), theta> + damping/2
|theta - theta_0|^2``. Every step must decrease ``M``, not ``|r|``: if a fit has memorised its
pairs, ``|r|`` first grows on the way to the minimum. There the softmax, saturated at the start,
gains curvature along the way, so a full Newton step leads too far, by different amounts in
different directions. A step that does not decrease ``M`` is therefore repeated with more damping
(Levenberg and Marquardt) instead of being shortened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from hf_ecif.engine.objective import Curvature, Objective
from hf_ecif.engine.solvers import ConjugateGradients, SolveReport, solve
from hf_ecif.engine.system import Spectrum, System

# Share of the decrease promised by the gradient that a step must reach (Armijo).
SUFFICIENT = 0.1
MORE_DAMPING, MOST_TRIALS = 3.0, 8


@dataclass(frozen=True)
class RemovalReport:
    """Report of a removal.

    Attributes:
        removed: number of removed pairs.
        change: ``|theta - theta_0|``.
        residuals: ``|r|`` before the first step and after every step.
        solvers: report of every step's solve, with the damping of the step; fewer than the steps
            asked for if ``|r|`` is within the tolerance, or if no step decreases ``M``.
        trials: number of solves; more than steps if some led too far.
    """

    removed: int
    change: float
    residuals: list[float]
    solvers: list[SolveReport]
    trials: int


def remove(
    objective: Objective,
    theta: Tensor,
    members: Tensor,
    spectrum: Spectrum,
    *,
    steps: int = 1,
    rescale: bool = False,
    curvature: Curvature = "ggn",
    relative_damping: float = 0.01,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[Tensor, RemovalReport]:
    """Attributed parameters ``(P,)`` without the influence of some pairs, and a report.

    Args:
        objective: training objective, members included.
        theta: ``(P,)``, the trained parameters.
        members: ``(N,)`` booleans, true for pairs that leave.
        spectrum: spectrum of the objective's curvature; sets the damping.
        steps: largest number of Newton steps.
        rescale: whether the weights of the remaining pairs keep their sum, as in a retraining,
            whose loss is a mean over them; else each keeps its weight, as in influence functions.
        curvature: kind of curvature of the steps.
        relative_damping: weight of the penalty, in units of the mean eigenvalue.
        tolerance: relative residual of every solve, and of ``|r|`` at which to stop.
        max_iterations: largest number of products with the curvature in every solve.
        advance: called after every step, for a progress bar.
    """
    remaining = objective.without(members, rescale=rescale)
    given, penalty = objective.gradient(theta), relative_damping * spectrum.mean_eigenvalue

    def residual_at(there: Tensor) -> Tensor:
        return remaining.gradient(there) - given + penalty * (there - theta)

    current, residual = theta, residual_at(theta)
    norms, reports, trials = [residual.norm().item()], [], 0
    solver = ConjugateGradients(tolerance, max_iterations)
    for _ in range(steps):
        product = partial(remaining.curvature, curvature, current)
        system = System(product, spectrum, relative_damping)
        step = _step_down(system, solver, residual_at, current, residual)
        trials += step.trials
        advance(1)
        if step.solver is None:
            break
        current, residual = step.theta, step.residual
        reports.append(step.solver)
        norms.append(residual.norm().item())
        if norms[-1] <= tolerance * norms[0]:
            break
    return current, RemovalReport(
        removed=int(members.sum()),
        change=(current - theta).norm().item(),
        residuals=norms,
        solvers=reports,
        trials=trials,
    )


@dataclass(frozen=True)
class _Step:
    """Result of a step; ``solver`` is None if no step decreases ``M``."""

    theta: Tensor
    residual: Tensor
    solver: SolveReport | None
    trials: int


def _step_down(
    system: System,
    solver: ConjugateGradients,
    residual_at: Callable[[Tensor], Tensor],
    theta: Tensor,
    residual: Tensor,
) -> _Step:
    """Newton step with the smallest damping, of several, that decreases ``M``.

    The decrease is computed from the slopes at both ends, by the trapezoid rule, since values of
    ``M`` differ by less than rounding for a small set. After a step that leads too far, the damping
    becomes a few times the damped curvature that was found along it.
    """
    for trial in range(1, MOST_TRIALS + 1):
        solution, report = solve(system, residual[None], solver)
        there = theta - solution[0]
        moved = residual_at(there)
        slope, slope_there = residual @ solution[0], moved @ solution[0]
        if (slope + slope_there) / 2 > SUFFICIENT * slope:
            return _Step(there, moved, report, trial)
        along = (slope / solution.square().sum()).item()
        more = MORE_DAMPING * along / system.spectrum.mean_eigenvalue
        system = replace(system, relative_damping=more)
    return _Step(theta, residual, None, MOST_TRIALS)
