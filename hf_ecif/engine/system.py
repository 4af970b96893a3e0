"""The damped linear system ``(H + damping I) x = b``, with ``H`` known only through its products.

``product`` maps ``(K, P)`` to ``(K, P)``, one product per row; right-hand sides are rows, too, so
that many solves share every pass over the data. Nothing here knows what ``H`` is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_ecif.engine.low_rank import (
    DivergenceError,
    LowRank,
    Matvec,
    lanczos,
    nystrom,
    random_signs,
    ritz_pairs,
)

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


@dataclass(frozen=True, eq=False)
class System:
    """``H + damping I``, with the eigenpairs that solvers have computed.

    Eigenpairs do not depend on the right-hand sides, so they are kept for later solves.

    Attributes:
        product: products with ``H``, which must be positive definite once damped.
        spectrum: eigenvalues of ``H``; set the damping, and LiSSA's scale if the largest is known.
        relative_damping: ``damping / mean_eigenvalue``.
        noisy_product: products over a fresh random part of the data at every call, for LiSSA;
            `product` if absent.
        one_matrix: whether all rows have the same ``H`` and can share a Krylov space. If `product`
            has an ``H`` for each row, every row is solved by itself.
        seed: seed of the random vectors for eigenpairs.

    Raises:
        ValueError: the damping would not be positive.
    """

    product: Matvec
    spectrum: Spectrum
    relative_damping: float
    noisy_product: Matvec | None = None
    one_matrix: bool = True
    seed: int = 0
    _pairs: dict[tuple[str, int], LowRank] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        mean = self.spectrum.mean_eigenvalue
        if mean < 0:
            raise ValueError(
                f"The damping must be positive, but is in units of the mean eigenvalue, {mean:.3g}."
                " One below zero means a Hessian far from positive semi-definite: use the "
                "generalised Gauss-Newton matrix."
            )
        if not self.damping > 0:
            raise ValueError(
                f"The damping must be positive, but is {self.damping:.3g} (relative damping "
                f"{self.relative_damping:g} x mean eigenvalue {mean:.3g}). A mean eigenvalue of "
                "zero means that the loss does not depend on the attributed parameters."
            )

    @property
    def damping(self) -> float:
        """Absolute damping."""
        return self.relative_damping * self.spectrum.mean_eigenvalue

    def __call__(self, x: Tensor) -> Tensor:
        """``(H + damping I) x`` for every row."""
        return self.product(x) + self.damping * x

    def noisy(self, x: Tensor) -> Tensor:
        """``(H + damping I) x`` for every row, with ``H`` over a random part of the data."""
        return (self.noisy_product or self.product)(x) + self.damping * x

    def nystrom(self, like: Tensor, rank: int) -> LowRank:
        """Preconditioner with ``rank`` eigenpairs, computed once; ``like`` is ``(P,)``."""
        key = ("nystrom", rank)
        if key not in self._pairs:
            self._pairs[key] = nystrom(self.product, like, rank, seed=self.seed)
        return self._pairs[key]

    def ritz_pairs(self, like: Tensor, rank: int) -> LowRank:
        """``rank`` Ritz pairs, computed once; ``like`` is ``(P,)``."""
        key = ("ritz", rank)
        if key not in self._pairs:
            self._pairs[key] = ritz_pairs(self.product, like, rank)
        return self._pairs[key]

    def require_positive(self, direction: Tensor, product: Tensor) -> None:
        """Check that ``H + damping I`` is positive along all rows of ``direction``.

        Args:
            direction: ``(K, P)``.
            product: ``(K, P)``, its product with ``H + damping I``.

        Raises:
            DivergenceError: the matrix is not positive along one of them.
        """
        curvature = (direction * product).sum(dim=1) / direction.square().sum(dim=1)
        if (curvature <= 0).any():
            raise indefinite(curvature[curvature <= 0].min().item() - self.damping, self.damping)

    def relative_residual(self, x: Tensor, b: Tensor) -> float:
        """Largest ``|b - (H + damping I) x| / |b|`` over all rows."""
        norms = b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
        return ((b - self(x)).norm(dim=1) / norms).max().item()


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


def indefinite(lowest: float, damping: float) -> DivergenceError:
    """Error for a curvature ``lowest`` that is negative by more than the damping."""
    return DivergenceError(
        f"The curvature is negative along some direction: {lowest:.3g}, more than the damping of "
        f"{damping:.3g} makes up for. Raise the damping above the most negative eigenvalue, or use "
        "the generalised Gauss-Newton matrix, which has none. (A value that is tiny next to the "
        "largest eigenvalue is rounding: use float64.)"
    )
