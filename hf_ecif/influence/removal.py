"""Remove pairs from a trained model in closed form, as if it had been trained without them.

A fit that stopped early ends where ``grad J(theta_0)`` is not zero, and directions of little
curvature are hardly followed at all. Both are as if a penalty ``damping/2 |theta - start|^2`` had
held it. Retrained without the set, it is held alike, and ends where this vanishes, in which the
start no longer occurs:

    r(theta) = grad J_without(theta) - grad J(theta_0) + damping (theta - theta_0)

One Newton step from ``theta_0`` with the curvature of the *remaining* pairs is the influence
function of the whole set in its exact group form, and without the shrinkage that a pair's own
curvature causes; further steps, each with fresh curvature, follow the loss where it is not
quadratic. The penalty is about ``theta_0`` in all of them: about the last step's end, each step
would go further along the flat directions than the fit itself did.

``r`` is the gradient of ``M(theta) = J_without(theta) - <grad J(theta_0), theta> + damping/2
|theta - theta_0|^2``. Every step must go down on that, not on ``|r|``: where a fit has memorised
its pairs, the way to the minimum makes ``|r|`` larger first. There the softmax, saturated at the
start, gains curvature along the way, so that a whole Newton step leads too far, though not equally
so in all directions. A step that does not go down is therefore taken again with more damping
(Levenberg and Marquardt), rather than made shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from hf_ecif.engine.objective import Curvature, Objective
from hf_ecif.engine.solvers import ConjugateGradients, SolveReport, solve
from hf_ecif.engine.system import Spectrum, System

# Of the decrease that the gradient promises, how much a step must bring (Armijo).
SUFFICIENT = 0.1
MORE_DAMPING, MOST_TRIALS = 3.0, 8


@dataclass(frozen=True)
class RemovalReport:
    """How a removal went.

    Attributes:
        removed: pairs that left.
        change: ``|theta - theta_0|``.
        residuals: ``|r|`` before the first step and after every step.
        solvers: report of every step's solve, with the damping that the step took; fewer than the
            steps asked for where ``|r|`` is down to the tolerance, or where no step leads down.
        trials: solves in all; more than steps where some led too far.
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
    """The attributed parameters ``(P,)`` without the influence of some pairs, and a report.

    Args:
        objective: training objective, members included.
        theta: ``(P,)``, the trained parameters.
        members: ``(N,)`` booleans, true for pairs that leave.
        spectrum: spectrum of the objective's curvature; sets the damping.
        steps: Newton steps at most.
        rescale: whether the remaining pairs are to count as much as all did, as in a retraining,
            whose loss is a mean over them; else, as in influence functions, each counts as before.
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
    """Where a step leads; ``solver`` is None where none leads down."""

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
    """A Newton step with the least damping, of some, that leads down.

    How far down is taken from the slopes at both ends, by the trapezoid rule: values of ``M``
    differ by less than rounding where the set is small. After a step that leads too far, the
    damping is a few times the curvature, damping included, that was found along it.
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
