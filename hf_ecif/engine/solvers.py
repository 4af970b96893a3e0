"""Solvers of a damped linear system: small objects with their options and one method.

`solve` runs one of them and reports how it went.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hf_ecif.engine.low_rank import DivergenceError, LowRank, require_finite
from hf_ecif.engine.system import System, estimate_largest_eigenvalue, indefinite
from hf_ecif.errors import UserError

EXACT_LIMIT = 8192
LOW_RANK = 64
CHECK_EVERY = 20  # steps of LiSSA between two checks of the residual
# Tolerance from which on the residual that conjugate gradients carry along is believed: rounding
# makes it differ from the true one by far less. The check would take another product.
BELIEVED = 1e-2
ROUNDING = "rounding is in the way: use float64, or raise the damping"


class Solver(Protocol):
    """Solver of ``(H + damping I) x = b``, with its options.

    Attributes:
        name: its name in `InfluenceConfig.solver`.
        tolerance: relative residual at which to stop, or below which the result has converged.
    """

    @property
    def name(self) -> str: ...

    @property
    def tolerance(self) -> float: ...

    def solve(self, system: System, b: Tensor) -> Solution:
        """Solution for every row of ``b``, ``(K, P)``, converged or not.

        Raises:
            DivergenceError: the iteration grew without bound, or ``H + damping I`` is not positive
                definite; the message names the remedy.
        """

    def remedy(self, iterations: int) -> str:
        """Advice on a solve that did not converge within so many iterations."""


@dataclass(frozen=True)
class Solution:
    """Result of a solver.

    Attributes:
        x: ``(K, P)``.
        iterations: number of products with ``H``.
        largest_eigenvalue: largest eigenvalue of ``H``, if the solver knows it.
        relative_residual: largest ``|b - (H + damping) x| / |b|``, if the solver knows it.
    """

    x: Tensor
    iterations: int
    largest_eigenvalue: float | None = None
    relative_residual: float | None = None


@dataclass(frozen=True)
class SolveReport:
    """Outcome of a solve.

    Attributes:
        method: name of the solver.
        iterations: products with ``H`` (each over all data, or over a batch for LiSSA; for LiSSA,
            over all runs together).
        relative_residual: largest ``|b - (H + damping) x| / |b|`` of the right-hand sides.
        tolerance: relative residual that was asked for.
        converged: whether the residual is within the tolerance.
        damping: absolute damping.
        relative_damping: damping in units of the mean eigenvalue, comparable between models.
        mean_eigenvalue: mean eigenvalue of ``H``.
        largest_eigenvalue: largest eigenvalue of ``H``, if known.
        advice: what to do if the solve did not converge; empty if it did.
    """

    method: str
    iterations: int
    relative_residual: float
    tolerance: float
    converged: bool
    damping: float
    relative_damping: float
    mean_eigenvalue: float
    largest_eigenvalue: float | None
    advice: str = ""


def solve(system: System, b: Tensor, solver: Solver) -> tuple[Tensor, SolveReport]:
    """``x = (H + damping I)^-1 b`` for every row of ``b``, ``(K, P)``, and a report.

    A solve that did not converge is returned, too, with advice in its report.

    Raises:
        DivergenceError: the iteration grew without bound, or ``H + damping I`` is not positive
            definite; the message names the remedy.
    """
    # Squares of small gradients leave the range of float32, so each is scaled to one first.
    scale = b.abs().amax(dim=1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    b = b / scale
    found = solver.solve(system, b)
    residual = found.relative_residual
    if residual is None:
        residual = system.relative_residual(found.x, b)
    if not math.isfinite(residual):
        raise _diverged(solver.name, residual)
    converged = residual <= solver.tolerance
    report = SolveReport(
        method=solver.name,
        iterations=found.iterations,
        relative_residual=residual,
        tolerance=solver.tolerance,
        converged=converged,
        damping=system.damping,
        relative_damping=system.relative_damping,
        mean_eigenvalue=system.spectrum.mean_eigenvalue,
        largest_eigenvalue=found.largest_eigenvalue or system.spectrum.largest_eigenvalue,
        advice="" if converged else solver.remedy(found.iterations),
    )
    return found.x * scale, report


def require_small(parameters: int) -> None:
    """Refuse a dense matrix over too many parameters.

    Raises:
        UserError: there are more than `EXACT_LIMIT`.
    """
    if parameters > EXACT_LIMIT:
        raise UserError(
            f"The exact solver builds a dense {parameters:,} x {parameters:,} matrix; it takes at "
            f"most {EXACT_LIMIT:,} parameters. Use cg, or attribute fewer parameters."
        )


# -------------------------------------------------------------------------- conjugate gradients


@dataclass(frozen=True)
class ConjugateGradients:
    """Conjugate gradients, the reference among the solvers.

    Attributes:
        tolerance: relative residual at which to stop.
        max_iterations: largest number of products.
        preconditioner_rank: eigenpairs of a Nyström preconditioner, 0 for none. It changes the
            number of iterations, neither the solution nor the residual at which to stop.
    """

    tolerance: float = 1e-3
    max_iterations: int = 200
    preconditioner_rank: int = 0
    name = "cg"

    def solve(self, system: System, b: Tensor) -> Solution:
        """Solution in one Krylov space for all rows, or in one per row if matrices differ."""
        rank = self.preconditioner_rank
        preconditioner = system.nystrom(b[0], rank) if rank else None
        share = system.one_matrix and len(b) > 1
        cg = _block_conjugate_gradients if share else _conjugate_gradients
        found = cg(system, b, preconditioner, self.tolerance, self.max_iterations)
        return found if self.tolerance >= BELIEVED else replace(found, relative_residual=None)

    def remedy(self, iterations: int) -> str:
        """Advice to allow more iterations, if all were used."""
        if iterations < self.max_iterations:
            return _short(ROUNDING)
        return _short("raise max_iterations, raise the damping, or use a preconditioner")


def _conjugate_gradients(
    system: System,
    b: Tensor,
    preconditioner: LowRank | None,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Preconditioned conjugate gradients, each right-hand side with its own step lengths.

    As in Golub & Van Loan, section 11.5, but the norm of the plain residual decides when to stop,
    whatever the preconditioner.
    """

    def precondition(residual: Tensor) -> Tensor:
        return preconditioner.precondition(residual, system.damping) if preconditioner else residual

    x, residual = torch.zeros_like(b), b
    direction = precondition(residual)
    inner = (residual * direction).sum(dim=1, keepdim=True)
    goal = max(tolerance, torch.finfo(b.dtype).eps)
    for iteration in range(max_iterations):
        left = _relative(residual, b)
        unsolved = left > goal
        if not unsolved.any() and residual.isfinite().all():
            return Solution(x, iteration, relative_residual=left.max().item())
        product = system(direction)
        system.require_positive(direction[unsolved], product[unsolved])
        # After an exact solution the direction is zero; the step is then zero, not 0 / 0.
        curvature = (direction * product).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, inner / curvature, 0.0)
        x = x + step * direction
        residual = residual - step * product
        preconditioned = precondition(residual)
        previous, inner = inner, (residual * preconditioned).sum(dim=1, keepdim=True)
        if not inner.isfinite().all():
            raise _diverged("cg", float("nan"))
        direction = preconditioned + torch.where(previous > 0, inner / previous, 0.0) * direction
    return Solution(x, max_iterations)


def _block_conjugate_gradients(
    system: System,
    b: Tensor,
    preconditioner: LowRank | None,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Conjugate gradients in the Krylov space of all right-hand sides together.

    A product with ``K`` rows extends the space of every solution by ``K`` dimensions, not by one.
    The residuals are ``weights^T basis`` with orthonormal rows ``basis``: BCGrQ of Dubrulle (2001),
    which copes with linearly dependent right-hand sides. The square root of a preconditioner is
    applied on both sides; the residuals without it decide when to stop.
    """

    def scale(x: Tensor, power: float) -> Tensor:
        return preconditioner.precondition(x, system.damping, power) if preconditioner else x

    basis, weights = _orthonormalise(scale(b, 0.5))
    direction, x = basis, torch.zeros_like(b)
    goal = max(tolerance, torch.finfo(b.dtype).eps)
    for iteration in range(max_iterations):
        # Without a preconditioner, the basis is orthonormal: the weights have the residuals' norms.
        residual = weights.T @ scale(basis, -0.5) if preconditioner else weights.T
        left = _relative(residual, b).max().item()
        if left <= goal:
            return Solution(scale(x, 0.5), iteration, relative_residual=left)
        taken = scale(direction, 0.5)
        moved = system(taken)
        product = scale(moved, 0.5)
        curvature = direction @ product.T
        require_finite(curvature)  # nor is it if any entry of the product is not
        factor, failed = torch.linalg.cholesky_ex(curvature)
        if failed:
            lowest = torch.linalg.eigh(curvature)[1][:, :1].T
            system.require_positive(lowest @ taken, lowest @ moved)
            # Positive up to rounding: no further progress.
            return Solution(scale(x, 0.5), iteration, relative_residual=left)
        # Products with a small inverse: solves with as many columns as parameters take far longer.
        inverse = torch.cholesky_inverse(factor)
        x = x + (inverse @ weights).T @ direction
        basis, change = _orthonormalise(basis - inverse @ product)
        direction = basis + change @ direction
        weights = change @ weights
    return Solution(scale(x, 0.5), max_iterations)


def _relative(residual: Tensor, b: Tensor) -> Tensor:
    """Norms ``(K,)`` of residuals over those of the right-hand sides."""
    return residual.norm(dim=1) / b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)


def _orthonormalise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(basis, weights)`` with ``rows = weights^T basis`` and orthonormal rows in the basis."""
    q, r = torch.linalg.qr(rows.T)
    return q.T, r


# ---------------------------------------------------------------------------------------- LiSSA


@dataclass(frozen=True)
class Lissa:
    """LiSSA, a stochastic recursion with products over random batches.

    Attributes:
        tolerance: relative residual at which to stop.
        max_iterations: largest number of products in each run.
        repeats: number of independent runs that are averaged, the ``r`` of Koh & Liang (2017): the
            variance due to random batches falls by this factor.
    """

    tolerance: float = 1e-3
    max_iterations: int = 200
    repeats: int = 1
    name = "lissa"

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"LiSSA takes at least 1 run, not {self.repeats}.")

    def solve(self, system: System, b: Tensor) -> Solution:
        """Mean of the solutions of runs that share only the right-hand side."""
        largest = system.spectrum.largest_eigenvalue
        if largest is None:
            largest = estimate_largest_eigenvalue(system.product, b[0])
        sigma = 1.1 * (largest + system.damping)
        total, iterations = torch.zeros_like(b), 0
        for _ in range(self.repeats):
            x, spent = self._run(system, b, sigma)
            total, iterations = total + x, iterations + spent
        return Solution(total / self.repeats, iterations, largest)

    def remedy(self, iterations: int) -> str:
        """Advice to allow more iterations, or to take another solver."""
        return _short(
            "raise max_iterations, raise the damping, or use cg, which takes fewer passes"
        )

    def _run(self, system: System, b: Tensor, sigma: float) -> tuple[Tensor, int]:
        """``x <- x + (b - (H + damping) x) / sigma`` with a fresh random batch in every step.

        The recursion of Agarwal et al. (2017), written for ``x`` itself. It contracts only while
        ``sigma`` exceeds the largest eigenvalue of every batch; if ``x`` grows beyond
        ``|b| / damping``, the bound of every solution, sigma is doubled and the recursion restarts.
        Iterates since the last power of two are averaged, to reduce the noise of the batches; the
        residual is checked on all data.
        """
        bound = 10 * b.norm() / system.damping
        x = b / sigma
        average, averaged = torch.zeros_like(b), 0
        for iteration in range(1, self.max_iterations + 1):
            x = x + (b - system.noisy(x)) / sigma
            if not x.norm() <= bound:
                # The grown direction shows the cause: an eigenvalue above sigma, or one below zero.
                system.require_positive(x, system(x))
                sigma, x = 2 * sigma, b / (2 * sigma)
                average, averaged = torch.zeros_like(b), 0
                continue
            if iteration & (iteration - 1) == 0:
                average, averaged = torch.zeros_like(b), 0
            average, averaged = average + x, averaged + 1
            if iteration % CHECK_EVERY == 0:
                if system.relative_residual(x, b) <= self.tolerance:
                    return x, iteration
                if system.relative_residual(average / averaged, b) <= self.tolerance:
                    return average / averaged, iteration
        system.require_positive(x, system(x))
        candidates = [x, average / max(averaged, 1)]
        return min(candidates, key=lambda c: system.relative_residual(c, b)), self.max_iterations


# ------------------------------------------------------------------------------ without iterations


@dataclass(frozen=True)
class LowRankInverse:
    """Inverse from Ritz pairs of ``H``: many right-hand sides at the cost of one basis.

    Attributes:
        rank: number of eigenpairs; each takes a product.
        tolerance: relative residual below which the result has converged.
    """

    rank: int = LOW_RANK
    tolerance: float = 1e-3
    name = "low_rank"

    def solve(self, system: System, b: Tensor) -> Solution:
        """Solution with ``H`` replaced by the pairs and one eigenvalue for all others."""
        pairs = system.ritz_pairs(b[0], self.rank)
        lowest = pairs.values[-1].item()
        if lowest + system.damping <= 0:
            raise indefinite(lowest, system.damping)
        # All probes of the rest share one product.
        return Solution(pairs.inverse(b, system.damping), len(pairs.values) + 1)

    def remedy(self, iterations: int) -> str:
        """Advice to take more pairs, or another solver."""
        return _short("raise the rank, raise the damping, or use cg")


@dataclass(frozen=True)
class Exact:
    """Dense Cholesky factorisation, for at most `EXACT_LIMIT` parameters.

    Attributes:
        tolerance: relative residual below which the result has converged.
    """

    tolerance: float = 1e-3
    name = "exact"

    def solve(self, system: System, b: Tensor) -> Solution:
        """Solution from the dense matrix.

        Raises:
            UserError: there are more than `EXACT_LIMIT` parameters.
        """
        size = b.shape[1]
        require_small(size)
        dense = torch.cat([system(part) for part in torch.eye(size).to(b).split(256)])
        require_finite(dense)
        dense = (dense + dense.T) / 2
        factor, failed = torch.linalg.cholesky_ex(dense)
        if failed:
            lowest = torch.linalg.eigvalsh(dense)[0].item() - system.damping
            raise indefinite(lowest, system.damping)
        return Solution(torch.cholesky_solve(b.T, factor).T, size)

    def remedy(self, iterations: int) -> str:
        """Advice to compute with more digits."""
        return _short(ROUNDING)


@dataclass(frozen=True)
class Identity:
    """Inverse with ``H`` replaced by its mean eigenvalue: no curvature, as in TracIn.

    Attributes:
        tolerance: relative residual below which the result has converged.
    """

    tolerance: float = 1e-3
    name = "identity"

    def solve(self, system: System, b: Tensor) -> Solution:
        """Solution, which is a multiple of the right-hand side."""
        return Solution(b / (system.spectrum.mean_eigenvalue + system.damping), 0)

    def remedy(self, iterations: int) -> str:
        """No advice, since this solver has no options."""
        return "identity ignores the curvature; its residual is for information"


def _short(remedy: str) -> str:
    return f"the solve stopped short of its tolerance: {remedy}; or accept the residual"


def _diverged(name: str, residual: float) -> DivergenceError:
    return DivergenceError(
        f"The {name} solve diverged (residual {residual}). Raise the damping, use float64, or "
        "look for rows with infinite embeddings."
    )
