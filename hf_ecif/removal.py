"""Remove pairs from a trained model in closed form, as if it had been trained without them.

With ``r(theta) = grad J_without(theta) - grad J(theta_0)``, a model retrained without the set is
where ``r`` vanishes: just as far from its optimum as the given one is from its own. One Newton step
from ``theta_0`` with the curvature of the *remaining* pairs is the influence function of the whole
set in its exact group form, and without the shrinkage that a pair's own curvature causes; further
steps, each with fresh curvature, follow the loss where it is not quadratic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from hf_ecif.operators import Curvature, Objective
from hf_ecif.solvers import SolveReport, Spectrum, solve


@dataclass(frozen=True)
class RemovalReport:
    """How a removal went.

    Attributes:
        removed: pairs that left.
        change: ``|theta - theta_0|``.
        residuals: ``|r|`` before the first step and after every step.
        steps: length of every step, one unless it had to be shortened; fewer than asked for where
            no step made ``r`` smaller.
        solvers: report of every step's solve.
    """

    removed: int
    change: float
    residuals: list[float]
    steps: list[float]
    solvers: list[SolveReport]


def remove(
    objective: Objective,
    theta: Tensor,
    members: Tensor,
    spectrum: Spectrum,
    *,
    steps: int = 1,
    curvature: Curvature = "ggn",
    relative_damping: float = 0.01,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[Tensor, RemovalReport]:
    """The attributed parameters ``(P,)`` without the influence of some pairs, and a report.

    Args:
        objective: that the model was trained on, members included.
        theta: ``(P,)``, the trained parameters.
        members: ``(N,)`` booleans, true for pairs that leave.
        spectrum: of the objective's curvature; sets the damping.
        steps: Newton steps at most.
        curvature: of the steps.
        relative_damping: in units of the mean eigenvalue.
        tolerance: relative residual of every solve.
        max_iterations: of every solve.
        advance: called after every step, for a progress bar.
    """
    remaining = objective.without(members)
    given = objective.gradient(theta)

    def residual_at(theta: Tensor) -> Tensor:
        return remaining.gradient(theta) - given

    current, residual = theta, residual_at(theta)
    norms, lengths, reports = [residual.norm().item()], [], []
    for _ in range(steps):
        direction, report = solve(
            partial(remaining.curvature, curvature, current),
            residual[None],
            spectrum,
            relative_damping=relative_damping,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        reports.append(report)
        length, current, residual = _step(residual_at, current, -direction[0], residual)
        advance(1)
        if length == 0:
            break
        lengths.append(length)
        norms.append(residual.norm().item())
    return current, RemovalReport(
        removed=int(members.sum()),
        change=(current - theta).norm().item(),
        residuals=norms,
        steps=lengths,
        solvers=reports,
    )


def _step(
    residual_at: Callable[[Tensor], Tensor], theta: Tensor, direction: Tensor, residual: Tensor
) -> tuple[float, Tensor, Tensor]:
    """The longest of some steps that makes the residual smaller; length zero if none does.

    A softmax saturates, so that a whole Newton step may lead too far.
    """
    for length in (1.0, 0.5, 0.25, 0.125):
        there = theta + length * direction
        moved = residual_at(there)
        if moved.norm() < residual.norm():
            return length, there, moved
    return 0.0, theta, residual
