"""Solve ``(H + damping I) x = b`` knowing ``H`` only through its products.

``matvec`` maps ``(K, P)`` to ``(K, P)``, a product per row; right-hand sides come as rows too, so
that many solves share every pass over the data. Nothing here knows what ``H`` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
Method = Literal["cg", "lissa", "exact", "identity"]

EXACT_LIMIT = 8192


@dataclass(frozen=True)
class Spectrum:
    """What is known of ``H`` before a solve.

    Attributes:
        mean_eigenvalue: ``trace(H) / P``, by Hutchinson's estimator.
        largest_eigenvalue: by Lanczos, with its residual added: an upper estimate.
    """

    mean_eigenvalue: float
    largest_eigenvalue: float


@dataclass(frozen=True)
class SolveReport:
    """How a solve went.

    Attributes:
        method: the solver.
        iterations: products with ``H`` (sweeps over the data, or over batches for LiSSA).
        relative_residual: the largest ``|b - (H + damping) x| / |b|`` of the right-hand sides.
        tolerance: what was asked for.
        converged: whether the residual is within the tolerance.
        damping: absolute.
        relative_damping: in units of the mean eigenvalue, which means the same on every model.
        mean_eigenvalue: of ``H``.
        largest_eigenvalue: of ``H``.
        advice: what to do about a solve that did not converge; empty for one that did.
    """

    method: str
    iterations: int
    relative_residual: float
    tolerance: float
    converged: bool
    damping: float
    relative_damping: float
    mean_eigenvalue: float
    largest_eigenvalue: float
    advice: str = ""


class DivergenceError(ArithmeticError):
    """A solve produced numbers that grow without bound, or that are no numbers."""


def estimate_spectrum(
    matvec: Matvec, like: Tensor, *, probes: int = 8, steps: int = 10, seed: int = 0
) -> Spectrum:
    """Mean and largest eigenvalue of ``H``.

    Args:
        matvec: products with ``H``.
        like: ``(P,)``, gives size, dtype and device.
        probes: random sign vectors of Hutchinson's trace estimator.
        steps: Lanczos steps.
        seed: of the random vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs((probes, len(like)), generator).to(like)
    mean = (signs * matvec(signs)).sum(dim=1).mean().item() / len(like)
    return Spectrum(mean, _lanczos_largest(matvec, signs[0], steps))


def solve(
    matvec: Matvec,
    b: Tensor,
    spectrum: Spectrum,
    *,
    relative_damping: float,
    method: Method = "cg",
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    stochastic_matvec: Matvec | None = None,
) -> tuple[Tensor, SolveReport]:
    """``x = (H + damping I)^-1 b`` for every row of ``b``.

    Args:
        matvec: products with ``H``, positive semi-definite.
        b: ``(K, P)``.
        spectrum: of ``H``; sets the damping and LiSSA's scale.
        relative_damping: ``damping / mean_eigenvalue``.
        method: ``cg`` (conjugate gradients, the reference), ``lissa`` (stochastic recursion),
            ``exact`` (dense Cholesky, for at most `EXACT_LIMIT` parameters) or ``identity``
            (``H`` replaced by its mean eigenvalue: no curvature, as TracIn).
        tolerance: relative residual at which to stop.
        max_iterations: products to spend at most.
        stochastic_matvec: a product over a fresh random part of the data at every call, for
            ``lissa``; ``matvec`` if absent.

    Returns:
        ``x`` of the shape of ``b``, and the report. A solve that did not converge is returned, with
        advice in its report.

    Raises:
        DivergenceError: the iteration grew without bound; the message names the remedy.
        ValueError: ``exact`` with too many parameters, or a damping that is not positive.
    """
    damping = relative_damping * spectrum.mean_eigenvalue
    if not damping > 0:
        raise ValueError(
            f"The damping must be positive, but is {damping:.3g} (relative damping "
            f"{relative_damping:g} x mean eigenvalue {spectrum.mean_eigenvalue:.3g}). A mean "
            "eigenvalue of zero means that the loss does not depend on the attributed parameters."
        )
    damped = _Damped(matvec, damping)
    if method == "cg":
        x, iterations = _conjugate_gradients(damped, b, tolerance, max_iterations)
    elif method == "lissa":
        noisy = _Damped(stochastic_matvec or matvec, damping)
        sigma = 1.1 * (spectrum.largest_eigenvalue + damping)
        x, iterations = _lissa(damped, noisy, b, sigma, tolerance, max_iterations)
    elif method == "exact":
        x, iterations = _cholesky(damped, b), b.shape[1]
    elif method == "identity":
        x, iterations = b / (spectrum.mean_eigenvalue + damping), 0
    else:
        raise ValueError(f"Unknown solver {method!r}: use cg, lissa, exact or identity.")

    residual = _relative_residual(damped, x, b)
    if not math.isfinite(residual):
        raise DivergenceError(_diverged(method, residual))
    report = SolveReport(
        method=method,
        iterations=iterations,
        relative_residual=residual,
        tolerance=tolerance,
        converged=residual <= tolerance,
        damping=damping,
        relative_damping=relative_damping,
        mean_eigenvalue=spectrum.mean_eigenvalue,
        largest_eigenvalue=spectrum.largest_eigenvalue,
    )
    return x, report if report.converged else replace(report, advice=_advice(method))


def random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent ``+1`` and ``-1`` (Rademacher), the probes of least variance."""
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


# -------------------------------------------------------------------------------- the solvers


@dataclass(frozen=True)
class _Damped:
    matvec: Matvec
    damping: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.matvec(x) + self.damping * x


def _conjugate_gradients(
    matvec: Matvec, b: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Conjugate gradients on all right-hand sides at once, each with its own step lengths."""
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = residual.square().sum(dim=1, keepdim=True)
    goal = tolerance**2 * squared
    for iteration in range(max_iterations):
        if (squared <= goal).all():
            return x, iteration
        product = matvec(direction)
        # A right-hand side that is solved exactly has direction zero; its step is zero, not 0 / 0.
        curvature = (direction * product).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, squared / curvature.clamp_min(1e-300), 0.0)
        x = x + step * direction
        residual = residual - step * product
        previous, squared = squared, residual.square().sum(dim=1, keepdim=True)
        if not squared.isfinite().all():
            raise DivergenceError(_diverged("cg", float("nan")))
        direction = residual + torch.where(previous > 0, squared / previous, 0.0) * direction
    return x, max_iterations


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

    This is the recursion of Agarwal et al. (2017), written for ``x`` itself. It contracts only
    while ``sigma`` exceeds the largest eigenvalue, also of a single batch; should it grow past the
    bound ``|b| / damping`` of every solution, sigma is doubled and the recursion starts again.
    Iterates are averaged since the last power of two, which takes out the noise of the batches; the
    residual is checked on all data.
    """
    bound = 10 * b.norm() / matvec.damping
    x = b / sigma
    average, averaged = torch.zeros_like(b), 0
    for iteration in range(1, max_iterations + 1):
        x = x + (b - stochastic_matvec(x)) / sigma
        if not x.norm() <= bound:
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
    candidates = [x, average / max(averaged, 1)]
    return min(candidates, key=lambda c: _relative_residual(matvec, c, b)), max_iterations


def _cholesky(matvec: Matvec, b: Tensor) -> Tensor:
    size = b.shape[1]
    if size > EXACT_LIMIT:
        raise ValueError(
            f"The exact solver builds a dense {size:,} x {size:,} matrix; it takes at most "
            f"{EXACT_LIMIT:,} parameters. Use cg, or attribute fewer parameters."
        )
    rows = [matvec(part) for part in torch.eye(size).to(b).split(256)]
    dense = torch.cat(rows)
    if not dense.isfinite().all():
        raise DivergenceError(_diverged("exact", float("nan")))
    factor = torch.linalg.cholesky((dense + dense.T) / 2)
    return torch.cholesky_solve(b.T, factor).T


def _lanczos_largest(matvec: Matvec, start: Tensor, steps: int) -> float:
    """Largest eigenvalue by Lanczos with full reorthogonalisation, plus its residual."""
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(steps, len(start))):
        product = matvec(basis[-1][None])[0]
        diagonal.append((product @ basis[-1]).item())
        known = torch.stack(basis)
        for _ in range(2):  # once is not enough in float32
            product = product - known.T @ (known @ product)
        off_diagonal.append(product.norm().item())
        if off_diagonal[-1] <= 1e-6 * abs(diagonal[0]):
            break
        basis.append(product / off_diagonal[-1])
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    inner = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    small = small + torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(small)
    return values[-1].item() + off_diagonal[-1] * abs(vectors[-1, -1].item())


def _relative_residual(matvec: Matvec, x: Tensor, b: Tensor) -> float:
    # A right-hand side of zero is solved by zero; its residual counts as none.
    norms = b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
    return ((b - matvec(x)).norm(dim=1) / norms).max().item()


def _advice(method: str) -> str:
    if method == "identity":
        return "identity ignores the curvature; its residual is for information"
    return (
        "the solve stopped short of its tolerance: raise max_iterations, raise the damping, "
        "or accept the residual" + ("; cg converges in fewer passes" if method == "lissa" else "")
    )


def _diverged(method: str, residual: float) -> str:
    return (
        f"The {method} solve diverged (residual {residual}). Raise the damping, use float64, or "
        "look for rows with infinite embeddings."
    )
