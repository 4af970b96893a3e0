"""Solvers for ``(H + damping I) x = b`` that know ``H`` only through its products.

``matvec`` maps ``(K, P)`` to ``(K, P)``, one product per row; right-hand sides are rows, too, so
that many solves share every pass over the data. Nothing here knows what ``H`` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Imported under its own name for other modules that look for it here.
from hf_ecif.engine.low_rank import DivergenceError as DivergenceError
from hf_ecif.engine.low_rank import LowRank, lanczos, require_finite, ritz_pairs
from hf_ecif.engine.low_rank import Matvec as Matvec
from hf_ecif.engine.low_rank import random_signs as random_signs
from hf_ecif.errors import UserError

Method = Literal["cg", "lissa", "low_rank", "exact", "identity"]

EXACT_LIMIT = 8192
LOW_RANK = 64
LANCZOS_STEPS = 10  # to find the largest eigenvalue


@dataclass(frozen=True)
class Spectrum:
    """What is known of ``H`` before a solve.

    Attributes:
        mean_eigenvalue: ``trace(H) / P``, by Hutchinson's estimator; negative for some Hessians
            that are not positive semi-definite.
        largest_eigenvalue: if it is known; otherwise LiSSA, which alone needs it, estimates it.
    """

    mean_eigenvalue: float
    largest_eigenvalue: float | None = None


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


def estimate_spectrum(matvec: Matvec, like: Tensor, *, probes: int = 8, seed: int = 0) -> Spectrum:
    """Mean eigenvalue of ``H``, which is all that most solvers need.

    Args:
        matvec: products with ``H``.
        like: ``(P,)``, gives size, dtype and device.
        probes: number of random sign vectors of Hutchinson's trace estimator.
        seed: seed of the random vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs((probes, len(like)), generator).to(like)
    return Spectrum((signs * matvec(signs)).sum(dim=1).mean().item() / len(like))


def estimate_largest_eigenvalue(
    matvec: Matvec, like: Tensor, *, steps: int = LANCZOS_STEPS, seed: int = 0
) -> float:
    """Largest eigenvalue of ``H`` by Lanczos, with its residual added: an upper estimate.

    Args:
        matvec: products with ``H``.
        like: ``(P,)``, gives size, dtype and device.
        steps: largest number of products.
        seed: seed of the random start.

    Raises:
        DivergenceError: a product is not finite.
    """
    pairs, residuals = lanczos(matvec, like, steps, seed=seed)
    return (pairs.values[0] + residuals[0]).item()


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


def solve(
    matvec: Matvec,
    b: Tensor,
    spectrum: Spectrum,
    *,
    relative_damping: float,
    method: Method = "cg",
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    preconditioner: LowRank | None = None,
    one_matrix: bool = True,
    stochastic_matvec: Matvec | None = None,
    repeats: int = 1,
    rank: int = LOW_RANK,
    pairs: LowRank | None = None,
) -> tuple[Tensor, SolveReport]:
    """``x = (H + damping I)^-1 b`` for every row of ``b``.

    Args:
        matvec: products with ``H``, which must be positive definite once damped.
        b: ``(K, P)``.
        spectrum: eigenvalues of ``H``; set the damping, and LiSSA's scale if the largest is known.
        relative_damping: ``damping / mean_eigenvalue``.
        method: ``cg`` (conjugate gradients, the reference), ``lissa`` (stochastic recursion),
            ``low_rank`` (Ritz pairs of ``H``, for many right-hand sides at the cost of one basis),
            ``exact`` (dense Cholesky, for at most `EXACT_LIMIT` parameters) or ``identity``
            (``H`` replaced by its mean eigenvalue: no curvature, as TracIn).
        tolerance: relative residual at which to stop.
        max_iterations: largest number of products, for ``cg`` and for each run of ``lissa``.
        preconditioner: for ``cg``, from `nystrom`; it changes the number of iterations, neither the
            solution nor the residual at which to stop.
        one_matrix: for ``cg``: whether all rows have the same ``H`` and can share a Krylov space.
            If ``matvec`` has an ``H`` for each row, every row is solved by itself.
        stochastic_matvec: for ``lissa``: products over a fresh random part of the data at every
            call; ``matvec`` if absent.
        repeats: number of independent runs of ``lissa`` that are averaged, the ``r`` of Koh & Liang
            (2017): the variance due to random batches falls by this factor.
        rank: number of eigenpairs for ``low_rank``; each takes a product.
        pairs: Ritz pairs for ``low_rank``, if `ritz_pairs` has made them already.

    Returns:
        ``x``, ``(K, P)``, and the report. A solve that did not converge is returned, too, with
        advice in its report.

    Raises:
        DivergenceError: the iteration grew without bound, or ``H + damping I`` is not positive
            definite; the message names the remedy.
        ValueError: ``exact`` with too many parameters, a damping that is not positive, or an
            argument out of range.
    """
    damping = _absolute_damping(relative_damping, spectrum)
    damped, largest = _Damped(matvec, damping), spectrum.largest_eigenvalue
    # Squares of small gradients leave the range of float32, so each is scaled to one first.
    scale = b.abs().amax(dim=1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    b = b / scale
    if method == "cg":
        cg = _block_conjugate_gradients if one_matrix else _conjugate_gradients
        x, iterations = cg(damped, b, preconditioner, tolerance, max_iterations)
    elif method == "lissa":
        noisy = _Damped(stochastic_matvec or matvec, damping)
        if largest is None:
            largest = estimate_largest_eigenvalue(matvec, b[0])
        sigma = 1.1 * (largest + damping)
        x, iterations = _repeated_lissa(repeats, damped, noisy, b, sigma, tolerance, max_iterations)
    elif method == "low_rank":
        x, iterations = _low_rank(damped, b, pairs or ritz_pairs(matvec, b[0], rank))
    elif method == "exact":
        x, iterations = _cholesky(damped, b), b.shape[1]
    elif method == "identity":
        x, iterations = b / (spectrum.mean_eigenvalue + damping), 0
    else:
        methods = "cg, lissa, low_rank, exact or identity"
        raise ValueError(f"Unknown solver {method!r}: use {methods}.")

    residual = _relative_residual(damped, x, b)
    if not math.isfinite(residual):
        raise DivergenceError(_diverged(method, residual))
    converged = residual <= tolerance
    report = SolveReport(
        method=method,
        iterations=iterations,
        relative_residual=residual,
        tolerance=tolerance,
        converged=converged,
        damping=damping,
        relative_damping=relative_damping,
        mean_eigenvalue=spectrum.mean_eigenvalue,
        largest_eigenvalue=largest,
        advice="" if converged else _advice(method, spent=iterations >= max_iterations),
    )
    return x * scale, report


# -------------------------------------------------------------------------------- the solvers


@dataclass(frozen=True)
class _Damped:
    matvec: Matvec
    damping: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.matvec(x) + self.damping * x

    def require_positive(self, direction: Tensor, product: Tensor) -> None:
        """Raise `DivergenceError` unless ``H + damping I`` is positive along every direction.

        Args:
            direction: ``(K, P)``.
            product: ``(K, P)``, its product with ``H + damping I``.
        """
        curvature = (direction * product).sum(dim=1) / direction.square().sum(dim=1)
        if (curvature <= 0).any():
            lowest = curvature[curvature <= 0].min().item() - self.damping
            raise DivergenceError(_indefinite(lowest, self.damping))


def _absolute_damping(relative_damping: float, spectrum: Spectrum) -> float:
    mean = spectrum.mean_eigenvalue
    damping = relative_damping * mean
    if mean < 0:
        raise ValueError(
            f"The damping must be positive, but is in units of the mean eigenvalue, {mean:.3g}. "
            "One below zero means a Hessian far from positive semi-definite: use the generalised "
            "Gauss-Newton matrix."
        )
    if not damping > 0:
        raise ValueError(
            f"The damping must be positive, but is {damping:.3g} (relative damping "
            f"{relative_damping:g} x mean eigenvalue {mean:.3g}). A mean eigenvalue of zero means "
            "that the loss does not depend on the attributed parameters."
        )
    return damping


def _conjugate_gradients(
    matvec: _Damped,
    b: Tensor,
    preconditioner: LowRank | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, int]:
    """Preconditioned conjugate gradients, each right-hand side with its own step lengths.

    As in Golub & Van Loan, section 11.5, but the norm of the plain residual decides when to stop,
    whatever the preconditioner.
    """

    def precondition(residual: Tensor) -> Tensor:
        return preconditioner.precondition(residual, matvec.damping) if preconditioner else residual

    x, residual = torch.zeros_like(b), b
    direction = precondition(residual)
    inner = (residual * direction).sum(dim=1, keepdim=True)
    goal = max(tolerance, torch.finfo(b.dtype).eps) * b.norm(dim=1)
    for iteration in range(max_iterations):
        unsolved = residual.norm(dim=1) > goal
        if not unsolved.any() and residual.isfinite().all():
            return x, iteration
        product = matvec(direction)
        matvec.require_positive(direction[unsolved], product[unsolved])
        # After an exact solution the direction is zero; the step is then zero, not 0 / 0.
        curvature = (direction * product).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, inner / curvature, 0.0)
        x = x + step * direction
        residual = residual - step * product
        preconditioned = precondition(residual)
        previous, inner = inner, (residual * preconditioned).sum(dim=1, keepdim=True)
        if not inner.isfinite().all():
            raise DivergenceError(_diverged("cg", float("nan")))
        direction = preconditioned + torch.where(previous > 0, inner / previous, 0.0) * direction
    return x, max_iterations


def _block_conjugate_gradients(
    matvec: _Damped,
    b: Tensor,
    preconditioner: LowRank | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, int]:
    """Conjugate gradients in the Krylov space of all right-hand sides together.

    A product with ``K`` rows extends the space of every solution by ``K`` dimensions, not by one.
    The residuals are ``weights^T basis`` with orthonormal rows ``basis``: BCGrQ of Dubrulle (2001),
    which copes with linearly dependent right-hand sides. The square root of a preconditioner is
    applied on both sides; the residuals without it decide when to stop.
    """

    def scale(x: Tensor, power: float) -> Tensor:
        return preconditioner.precondition(x, matvec.damping, power) if preconditioner else x

    basis, weights = _orthonormalise(scale(b, 0.5))
    direction, x = basis, torch.zeros_like(b)
    goal = max(tolerance, torch.finfo(b.dtype).eps) * b.norm(dim=1)
    for iteration in range(max_iterations):
        if ((weights.T @ scale(basis, -0.5)).norm(dim=1) <= goal).all():
            return scale(x, 0.5), iteration
        taken = scale(direction, 0.5)
        moved = matvec(taken)
        require_finite(moved)
        product = scale(moved, 0.5)
        curvature = direction @ product.T
        factor, failed = torch.linalg.cholesky_ex(curvature)
        if failed:
            lowest = torch.linalg.eigh(curvature)[1][:, :1].T
            matvec.require_positive(lowest @ taken, lowest @ moved)
            return scale(x, 0.5), iteration  # positive up to rounding: no further progress
        x = x + torch.cholesky_solve(weights, factor).T @ direction
        basis, change = _orthonormalise(basis - torch.cholesky_solve(product, factor))
        direction = basis + change @ direction
        weights = change @ weights
    return scale(x, 0.5), max_iterations


def _orthonormalise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(basis, weights)`` with ``rows = weights^T basis`` and orthonormal rows in the basis."""
    q, r = torch.linalg.qr(rows.T)
    return q.T, r


def _repeated_lissa(
    repeats: int,
    matvec: _Damped,
    stochastic_matvec: _Damped,
    b: Tensor,
    sigma: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, int]:
    """Mean of runs that share only the right-hand side, and their total of iterations."""
    if repeats < 1:
        raise ValueError(f"LiSSA takes at least 1 run, not {repeats}.")
    total, iterations = torch.zeros_like(b), 0
    for _ in range(repeats):
        x, spent = _lissa(matvec, stochastic_matvec, b, sigma, tolerance, max_iterations)
        total, iterations = total + x, iterations + spent
    return total / repeats, iterations


def _lissa(
    matvec: _Damped,
    stochastic_matvec: _Damped,
    b: Tensor,
    sigma: float,
    tolerance: float,
    max_iterations: int,
    check_every: int = 20,
) -> tuple[Tensor, int]:
    """``x <- x + (b - (H + damping) x) / sigma`` with a fresh random batch in every step.

    The recursion of Agarwal et al. (2017), written for ``x`` itself. It contracts only while
    ``sigma`` exceeds the largest eigenvalue of every batch; if ``x`` grows beyond
    ``|b| / damping``, the bound of every solution, sigma is doubled and the recursion restarts.
    Iterates since the last power of two are averaged, to reduce the noise of the batches; the
    residual is checked on all data.
    """
    bound = 10 * b.norm() / matvec.damping
    x = b / sigma
    average, averaged = torch.zeros_like(b), 0
    for iteration in range(1, max_iterations + 1):
        x = x + (b - stochastic_matvec(x)) / sigma
        if not x.norm() <= bound:
            # The grown direction shows the cause: an eigenvalue above sigma, or one below zero.
            matvec.require_positive(x, matvec(x))
            sigma, x = 2 * sigma, b / (2 * sigma)
            average, averaged = torch.zeros_like(b), 0
            continue
        if iteration & (iteration - 1) == 0:
            average, averaged = torch.zeros_like(b), 0
        average, averaged = average + x, averaged + 1
        if iteration % check_every == 0:
            if _relative_residual(matvec, x, b) <= tolerance:
                return x, iteration
            if _relative_residual(matvec, average / averaged, b) <= tolerance:
                return average / averaged, iteration
    matvec.require_positive(x, matvec(x))
    candidates = [x, average / max(averaged, 1)]
    return min(candidates, key=lambda c: _relative_residual(matvec, c, b)), max_iterations


def _low_rank(matvec: _Damped, b: Tensor, pairs: LowRank) -> tuple[Tensor, int]:
    lowest = pairs.values[-1].item()
    if lowest + matvec.damping <= 0:
        raise DivergenceError(_indefinite(lowest, matvec.damping))
    # All probes of the rest share one product.
    return pairs.inverse(b, matvec.damping), len(pairs.values) + 1


def _cholesky(matvec: _Damped, b: Tensor) -> Tensor:
    size = b.shape[1]
    require_small(size)
    rows = [matvec(part) for part in torch.eye(size).to(b).split(256)]
    dense = torch.cat(rows)
    require_finite(dense)
    dense = (dense + dense.T) / 2
    factor, failed = torch.linalg.cholesky_ex(dense)
    if failed:
        lowest = torch.linalg.eigvalsh(dense)[0].item() - matvec.damping
        raise DivergenceError(_indefinite(lowest, matvec.damping))
    return torch.cholesky_solve(b.T, factor).T


def _relative_residual(matvec: Matvec, x: Tensor, b: Tensor) -> float:
    # Zero solves a right-hand side of zero, with residual zero.
    norms = b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
    return ((b - matvec(x)).norm(dim=1) / norms).max().item()


def _advice(method: str, spent: bool) -> str:
    if method == "identity":
        return "identity ignores the curvature; its residual is for information"
    if method == "low_rank":
        remedy = "raise the rank, raise the damping, or use cg"
    elif method == "lissa":
        remedy = "raise max_iterations, raise the damping, or use cg, which takes fewer passes"
    elif method == "cg" and spent:
        remedy = "raise max_iterations, raise the damping, or use a preconditioner"
    else:
        remedy = "rounding is in the way: use float64, or raise the damping"
    return f"the solve stopped short of its tolerance: {remedy}; or accept the residual"


def _diverged(method: str, residual: float) -> str:
    return (
        f"The {method} solve diverged (residual {residual}). Raise the damping, use float64, or "
        "look for rows with infinite embeddings."
    )


def _indefinite(lowest: float, damping: float) -> str:
    return (
        f"The curvature is negative along some direction: {lowest:.3g}, more than the damping of "
        f"{damping:.3g} makes up for. Raise the damping above the most negative eigenvalue, or use "
        "the generalised Gauss-Newton matrix, which has none. (A value that is tiny next to the "
        "largest eigenvalue is rounding: use float64.)"
    )
