"""Inverse curvature of an objective at a point, by the solver that a config names."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.engine.solvers import (
    LOW_RANK,
    ConjugateGradients,
    Exact,
    Identity,
    Lissa,
    LowRankInverse,
    Solver,
    SolveReport,
    require_small,
    solve,
)
from hf_ecif.engine.system import Spectrum, System, estimate_spectrum
from hf_ecif.utils.seeds import derive, stream

ROUGHEST = 0.1  # residual of the solve for a few probes


class InverseCurvature:
    """``(H + damping I)^-1`` for any number of right-hand sides.

    What does not depend on them (the spectrum, a preconditioner, Ritz pairs) is computed once.

    Args:
        objective: the objective with curvature ``H``.
        theta: ``(P,)``, the point at which ``H`` is taken.
        config: curvature, solver, damping, tolerance.
        spectrum: what is known of ``H``; estimated if absent.

    Attributes:
        product: ``H v`` for every row ``v``, ``(K, P)``.
        spectrum: of ``H``.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        config: InfluenceConfig,
        spectrum: Spectrum | None = None,
    ) -> None:
        self.product = objective.operator(config.curvature, theta)
        self.spectrum = spectrum or estimate_spectrum(
            self.product, theta, seed=derive(config.seed, "spectrum")
        )
        self._config = config
        generator = stream(config.seed, "noisy products")

        def product_of_a_batch(vectors: Tensor) -> Tensor:
            """Over one random batch, a fresh one at every call."""
            batch = random_batches(len(objective.features), config.batch_size, generator)[:1]
            return objective.over(batch).operator(config.curvature, theta)(vectors)

        seed = derive(config.seed, "preconditioner")
        self._system = System(
            self.product, self.spectrum, config.damping, product_of_a_batch, seed=seed
        )

    def solve(self, b: Tensor) -> tuple[Tensor, SolveReport]:
        """``(H + damping I)^-1 b`` for every row of ``b``, ``(K, P)``, and a report.

        Raises:
            DivergenceError: the curvature is negative along the way, or not finite.
        """
        return solve(self._system, b, choose_solver(self._config))

    def solve_probes(self, probes: Tensor) -> tuple[Tensor, SolveReport]:
        """As `solve`, as exactly as random probes deserve: of ``K`` of them, a norm is rough.

        Its relative standard error is ``1 / sqrt(2 K)``; a residual of half of that moves it by
        less.
        """
        rough = min(0.5 / (2 * max(1, len(probes))) ** 0.5, ROUGHEST)
        config = replace(self._config, tolerance=max(self._config.tolerance, rough))
        return solve(self._system, probes, choose_solver(config))


def choose_solver(config: InfluenceConfig) -> Solver:
    """The solver that a config names, with its options."""
    tolerance, most = config.tolerance, config.max_iterations
    if config.solver == "cg":
        return ConjugateGradients(tolerance, most, preconditioner_rank=config.rank)
    if config.solver == "lissa":
        return Lissa(tolerance, most, config.lissa_repeats)
    if config.solver == "low_rank":
        return LowRankInverse(config.rank or LOW_RANK, tolerance)
    return Exact(tolerance) if config.solver == "exact" else Identity(tolerance)


def require_solvable(config: InfluenceConfig, parameters: int) -> None:
    """Refuse a solver that cannot take so many parameters, before anything is computed.

    Raises:
        UserError: it cannot.
    """
    if config.solver == "exact":
        require_small(parameters)
