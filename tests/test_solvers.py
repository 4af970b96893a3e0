"""Every solver against `torch.linalg.solve`, and what its report claims against the truth."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_ecif import solvers
from hf_ecif.solvers import DivergenceError, Spectrum, estimate_spectrum, solve

SIZE, SIDES = 30, 4


def random_parts(count: int = 10, seed: int = 0) -> Tensor:
    """``(count, P, P)`` positive semi-definite, each of low rank, as those of single batches."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, SIZE, 12, generator=generator, dtype=torch.float64)
    return factors @ factors.transpose(1, 2) / 12


def right_hand_sides(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(SIDES, SIZE, generator=generator, dtype=torch.float64)
    return b * torch.tensor([1.0, 1e-6, 1e4, 1.0], dtype=torch.float64)[:, None]


def spectrum_of(matrix: Tensor) -> Spectrum:
    values = torch.linalg.eigvalsh(matrix)
    return Spectrum(values.mean().item(), values.max().item())


def product_with(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ matrix.T


def true_residual(matrix: Tensor, damping: float, x: Tensor, b: Tensor) -> float:
    """The largest ``|b - (H + damping I) x| / |b|``."""
    rest = b - x @ (matrix + damping * torch.eye(SIZE, dtype=b.dtype)).T
    return (rest.norm(dim=1) / b.norm(dim=1)).max().item()


def fresh_products(parts: Tensor, seed: int = 2) -> Callable[[Tensor], Tensor]:
    """A product with another random part at every call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: x @ parts[torch.randint(len(parts), (), generator=generator)].T


MATRICES = {
    "full rank": random_parts().mean(dim=0),
    "low rank": random_parts(1)[0],
    "one direction": torch.outer(*right_hand_sides()[[0, 0]]),
    "multiple of identity": 3 * torch.eye(SIZE, dtype=torch.float64),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize(
    ("method", "relative_damping", "budget"),
    [
        ("cg", 1e-2, 200),
        ("cg", 10.0, 200),
        ("exact", 1e-2, 200),
        ("exact", 10.0, 200),
        ("lissa", 1.0, 3000),
        ("lissa", 10.0, 3000),
    ],
)
def test_solve(matrix: Tensor, method: str, relative_damping: float, budget: int) -> None:
    b, spectrum = right_hand_sides(), spectrum_of(matrix)
    x, report = solve(
        product_with(matrix),
        b,
        spectrum,
        relative_damping=relative_damping,
        method=method,
        tolerance=1e-9,
        max_iterations=budget,
    )
    damping = relative_damping * spectrum.mean_eigenvalue
    oracle = torch.linalg.solve(matrix + damping * torch.eye(SIZE, dtype=b.dtype), b.T).T
    assert ((x - oracle).norm(dim=1) / oracle.norm(dim=1)).max() <= 1e-6
    assert report.converged
    assert report.advice == ""
    assert report.method == method
    assert report.damping == pytest.approx(damping)
    assert report.relative_residual <= report.tolerance == 1e-9
    assert report.relative_residual == pytest.approx(
        true_residual(matrix, damping, x, b), rel=1e-6, abs=1e-13
    )
    assert report.iterations <= budget


@pytest.mark.parametrize("method", ["cg", "exact", "lissa"])
def test_zero_right_hand_side(method: str) -> None:
    matrix = MATRICES["full rank"]
    b = right_hand_sides()
    b[1] = 0
    x, report = solve(
        product_with(matrix), b, spectrum_of(matrix), relative_damping=1.0, method=method
    )
    assert report.converged
    assert torch.equal(x[1], torch.zeros(SIZE, dtype=b.dtype))


@pytest.mark.parametrize("method", ["cg", "lissa"])
def test_a_solve_cut_short_says_so(method: str) -> None:
    matrix, b = MATRICES["full rank"], right_hand_sides()
    spectrum = spectrum_of(matrix)
    x, report = solve(
        product_with(matrix), b, spectrum, relative_damping=0.1, method=method, max_iterations=3
    )
    assert not report.converged
    assert "max_iterations" in report.advice
    assert report.iterations == 3
    assert report.relative_residual > report.tolerance
    residual = true_residual(matrix, report.damping, x, b)
    assert report.relative_residual == pytest.approx(residual, rel=1e-6)


def test_identity_replaces_the_curvature_by_its_mean() -> None:
    matrix, b = MATRICES["full rank"], right_hand_sides()
    spectrum = spectrum_of(matrix)
    x, report = solve(product_with(matrix), b, spectrum, relative_damping=0.5, method="identity")
    torch.testing.assert_close(x, b / (1.5 * spectrum.mean_eigenvalue))
    assert report.iterations == 0
    residual = true_residual(matrix, report.damping, x, b)
    assert report.relative_residual == pytest.approx(residual)
    assert not report.converged
    assert "identity" in report.advice

    scaled = MATRICES["multiple of identity"]
    report = solve(
        product_with(scaled), b, spectrum_of(scaled), relative_damping=0.5, method="identity"
    )[1]
    assert report.converged


# ------------------------------------------------------------------------------------- LiSSA


@pytest.mark.parametrize(
    ("tolerance", "budget", "reached"), [(5e-2, 4000, True), (1e-6, 400, False)]
)
def test_lissa_with_noisy_products_is_honest(tolerance: float, budget: int, reached: bool) -> None:
    parts = random_parts()
    matrix, b = parts.mean(dim=0), right_hand_sides()
    x, report = solve(
        product_with(matrix),
        b,
        spectrum_of(matrix),
        relative_damping=5.0,
        method="lissa",
        tolerance=tolerance,
        max_iterations=budget,
        stochastic_matvec=fresh_products(parts),
    )
    residual = true_residual(matrix, report.damping, x, b)
    assert report.relative_residual == pytest.approx(residual, rel=1e-6)
    assert report.converged is reached
    assert (residual <= tolerance) is reached
    assert residual < 0.5
    assert bool(report.advice) is not reached


def test_lissa_does_use_the_noisy_products() -> None:
    matrix, calls = MATRICES["full rank"], []

    def noisy(x: Tensor) -> Tensor:
        calls.append(1)
        return x @ matrix.T

    report = solve(
        product_with(matrix),
        right_hand_sides(),
        spectrum_of(matrix),
        relative_damping=1.0,
        method="lissa",
        stochastic_matvec=noisy,
    )[1]
    assert len(calls) == report.iterations > 0


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_lissa_recovers_from_a_small_largest_eigenvalue(share: float) -> None:
    matrix, b = MATRICES["full rank"], right_hand_sides()
    spectrum = spectrum_of(matrix)
    low = Spectrum(spectrum.mean_eigenvalue, share * spectrum.largest_eigenvalue)
    x, report = solve(
        product_with(matrix),
        b,
        low,
        relative_damping=0.1,
        method="lissa",
        tolerance=1e-8,
        max_iterations=6000,
    )
    assert report.converged
    assert true_residual(matrix, report.damping, x, b) <= 1e-8


# ------------------------------------------------------------------------------------ refusals


def test_exact_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "EXACT_LIMIT", SIZE - 1)
    matrix = MATRICES["full rank"]
    with pytest.raises(ValueError, match=r"at most 29 parameters\. Use cg"):
        solve(
            product_with(matrix),
            right_hand_sides(),
            spectrum_of(matrix),
            relative_damping=1.0,
            method="exact",
        )


@pytest.mark.parametrize(
    ("mean", "relative_damping"), [(1.0, 0.0), (1.0, -1.0), (0.0, 1.0), (float("nan"), 1.0)]
)
def test_damping_must_be_positive(mean: float, relative_damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be positive"):
        solve(
            product_with(MATRICES["full rank"]),
            right_hand_sides(),
            Spectrum(mean, 2.0),
            relative_damping=relative_damping,
        )


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="use cg, lissa, exact or identity"):
        solve(
            product_with(MATRICES["full rank"]),
            right_hand_sides(),
            Spectrum(1.0, 2.0),
            relative_damping=1.0,
            method="gmres",
        )


@pytest.mark.parametrize("broken", ["product", "right-hand side"])
@pytest.mark.parametrize("method", ["cg", "lissa", "identity", "exact"])
def test_nan_is_an_error(method: str, broken: str) -> None:
    matrix, b = MATRICES["full rank"].clone(), right_hand_sides()
    spectrum = spectrum_of(matrix)
    (matrix if broken == "product" else b)[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="Raise the damping"):
        solve(product_with(matrix), b, spectrum, relative_damping=1.0, method=method)


# ------------------------------------------------------------------------------------ spectrum


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectrum(matrix: Tensor, seed: int, dtype: torch.dtype) -> None:
    """Hutchinson with signs has variance ``2 sum_{i != j} H_ij^2 / probes`` in the trace."""
    probes = 64
    like = torch.zeros(SIZE, dtype=dtype)
    actual = estimate_spectrum(product_with(matrix.to(dtype)), like, probes=probes, seed=seed)
    expected = spectrum_of(matrix)
    off_diagonal = matrix - torch.diag(matrix.diagonal())
    deviation = (2 * off_diagonal.square().sum() / probes).sqrt().item() / SIZE
    assert abs(actual.mean_eigenvalue - expected.mean_eigenvalue) <= 4 * deviation + 1e-6
    assert actual.largest_eigenvalue == pytest.approx(expected.largest_eigenvalue, rel=0.05)
    assert actual.largest_eigenvalue >= expected.largest_eigenvalue * (1 - 1e-5)


def test_signs_are_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = solvers.random_signs((200, 200), generator)
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean().abs() < 0.02
