"""Inverse curvature of an objective at a point, by the solver that a config names."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.low_rank import LowRank, nystrom, ritz_pairs
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.engine.solvers import (
    LOW_RANK,
    SolveReport,
    Spectrum,
    estimate_spectrum,
    require_small,
    solve,
)


class InverseCurvature:
    """``(H + damping I)^-1`` for any number of right-hand sides.

    What does not depend on them (the spectrum, a preconditioner, Ritz pairs) is computed once.

    Args:
        objective: the objective with curvature ``H``.
        theta: ``(P,)``, the point at which ``H`` is taken.
        config: curvature, solver, damping, tolerance.
        spectrum: what is known of ``H``; estimated if absent.

    Attributes:
        objective: as given.
        theta: as given.
        product: maps rows ``v``, ``(K, P)``, to ``H v``.
        spectrum: what is known of ``H``.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        config: InfluenceConfig,
        spectrum: Spectrum | None = None,
    ) -> None:
        self.objective = objective
        self.theta = theta
        self._config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        self.product = objective.operator(config.curvature, theta)
        self.spectrum = spectrum or estimate_spectrum(self.product, theta, seed=config.seed)

    def solve(self, b: Tensor) -> tuple[Tensor, SolveReport]:
        """``(H + damping I)^-1 b`` for every row of ``b``, ``(K, P)``, and a report.

        Raises:
            DivergenceError: the curvature is negative along the way, or not finite.
        """
        config = self._config
        return solve(
            self.product,
            b,
            self.spectrum,
            relative_damping=config.damping,
            method=config.solver,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
            preconditioner=self._preconditioner,
            stochastic_matvec=self._product_of_a_batch,
            repeats=config.lissa_repeats,
            pairs=self._pairs,
        )

    @cached_property
    def _preconditioner(self) -> LowRank | None:
        rank, seed = self._config.rank, self._config.seed
        if self._config.solver != "cg" or not rank:
            return None
        return nystrom(self.product, self.theta, rank=rank, seed=seed)

    @cached_property
    def _pairs(self) -> LowRank | None:
        if self._config.solver != "low_rank":
            return None
        return ritz_pairs(self.product, self.theta, self._config.rank or LOW_RANK)

    def _product_of_a_batch(self, vectors: Tensor) -> Tensor:
        """``H v`` for every row ``v``, estimated on a random batch drawn anew at every call."""
        count = len(self.objective.features)
        batch = random_batches(count, self._config.batch_size, self._generator)[:1]
        return self.objective.over(batch).operator(self._config.curvature, self.theta)(vectors)


def require_solvable(config: InfluenceConfig, parameters: int) -> None:
    """Refuse a solver that cannot take so many parameters, before anything is computed.

    Raises:
        UserError: it cannot.
    """
    if config.solver == "exact":
        require_small(parameters)
