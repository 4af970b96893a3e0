"""Every solver against `torch.linalg.solve`, and what its report claims against the truth."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_ecif.engine import solvers
from hf_ecif.engine.low_rank import DivergenceError, LowRank, Matvec, lanczos, nystrom, random_signs
from hf_ecif.engine.solvers import (
    ConjugateGradients,
    Exact,
    Identity,
    Lissa,
    LowRankInverse,
    Solver,
    SolveReport,
)
from hf_ecif.engine.system import (
    Spectrum,
    System,
    estimate_largest_eigenvalue,
    estimate_spectrum,
)
from hf_ecif.errors import UserError

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


SOLVERS: dict[str, type[Solver]] = {
    "cg": ConjugateGradients,
    "lissa": Lissa,
    "low_rank": LowRankInverse,
    "exact": Exact,
    "identity": Identity,
}
METHODS = list(SOLVERS)


class Preconditioned(System):
    """A system whose preconditioner is brought along."""

    brought: LowRank

    def nystrom(self, like: Tensor, rank: int) -> LowRank:
        return self.brought


def solve(
    product: Matvec,
    b: Tensor,
    spectrum: Spectrum,
    *,
    relative_damping: float,
    method: str = "cg",
    noisy_product: Matvec | None = None,
    one_matrix: bool = True,
    preconditioner: LowRank | None = None,
    **options: Any,
) -> tuple[Tensor, SolveReport]:
    """By a solver with those of the options that it has."""
    kind = SOLVERS[method]
    own = {field.name for field in fields(kind)}
    solver = kind(**{name: value for name, value in options.items() if name in own})
    system = Preconditioned(product, spectrum, relative_damping, noisy_product, one_matrix)
    if preconditioner is not None:
        object.__setattr__(system, "brought", preconditioner)
        solver = replace(solver, preconditioner_rank=1)
    return solvers.solve(system, b, solver)


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
        ("low_rank", 1e-2, 200),
        ("low_rank", 10.0, 200),
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


@pytest.mark.parametrize("method", ["cg", "exact", "lissa", "low_rank"])
def test_zero_right_hand_side(method: str) -> None:
    matrix = MATRICES["full rank"]
    b = right_hand_sides()
    b[1] = 0
    x, report = solve(
        product_with(matrix), b, spectrum_of(matrix), relative_damping=1.0, method=method
    )
    assert report.converged
    assert torch.equal(x[1], torch.zeros(SIZE, dtype=b.dtype))


@settings(max_examples=10, deadline=None)
@given(weights=st.tuples(*[st.floats(-10, 10)] * SIDES))
@pytest.mark.parametrize("method", METHODS)
def test_the_solution_is_linear(method: str, weights: tuple[float, ...]) -> None:
    matrix, b = MATRICES["full rank"], right_hand_sides()
    b = b / b.norm(dim=1, keepdim=True)
    weights = torch.tensor(weights, dtype=torch.float64)
    options = {"relative_damping": 1.0, "method": method, "tolerance": 1e-11, "rank": 5}
    products, spectrum = product_with(matrix), spectrum_of(matrix)
    each = solve(products, b, spectrum, max_iterations=1000, **options)[0]
    total = solve(products, (weights @ b)[None], spectrum, max_iterations=1000, **options)[0]
    scale = weights.abs().sum() + 1
    torch.testing.assert_close(total[0] / scale, weights @ each / scale, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e25])
@pytest.mark.parametrize("method", METHODS)
def test_float32_of_any_scale(method: str, scale: float) -> None:
    """The squares of such numbers leave the range of float32."""
    matrix = MATRICES["full rank"]
    spectrum = spectrum_of(matrix)
    b = right_hand_sides()[[0]]
    x, report = solve(
        product_with(matrix.float()),
        (scale * b).float(),
        spectrum,
        relative_damping=1.0,
        method=method,
        tolerance=1e-4,
    )
    assert x.dtype == torch.float32
    assert report.converged is (method != "identity")
    if method != "identity":
        residual = true_residual(matrix, report.damping, x.double() / scale, b)
        assert residual <= 1.1e-4


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


# ----------------------------------------------------------------- cg in one space and in many


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_hand_sides_share_a_krylov_space(dtype: torch.dtype) -> None:
    matrix = ill_conditioned()
    b = torch.randn(16, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"relative_damping": 0.05, "tolerance": 1e-3}
    run = partial(solve, product_with(matrix.to(dtype)), b, spectrum_of(matrix), **options)
    (x, report), (apart, report_apart) = run(), run(one_matrix=False)
    assert report.converged
    assert report_apart.converged
    assert report.iterations * 2 <= report_apart.iterations
    torch.testing.assert_close(x, apart, rtol=0, atol=0.05 * apart.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_hand_sides_that_depend_on_each_other(dtype: torch.dtype) -> None:
    """The same twice, a sum, and more of them than parameters."""
    matrix, b = MATRICES["full rank"], right_hand_sides().to(dtype)
    b = b / b.norm(dim=1, keepdim=True)
    many = torch.cat([b] * 10 + [b.sum(dim=0, keepdim=True)])
    products, spectrum = product_with(matrix.to(dtype)), spectrum_of(matrix)
    x, report = solve(products, many, spectrum, relative_damping=0.5, tolerance=1e-5)
    assert len(many) > SIZE
    assert report.converged
    damped = matrix + report.damping * torch.eye(SIZE).double()
    oracle = torch.linalg.solve(damped, many.double().T).T
    assert (x - oracle).norm() <= 1e-4 * oracle.norm()


def test_a_matrix_for_each_right_hand_side() -> None:
    matrices, b = random_parts(SIDES), right_hand_sides()

    def products(x: Tensor) -> Tensor:
        return (matrices @ x[..., None])[..., 0]

    options = {"relative_damping": 1.0, "tolerance": 1e-9, "one_matrix": False}
    x, report = solve(products, b, Spectrum(1.0, 10.0), **options)
    assert report.converged
    eye = torch.eye(SIZE, dtype=b.dtype)
    oracle = torch.stack(
        [torch.linalg.solve(m + eye, side) for m, side in zip(matrices, b, strict=True)]
    )
    assert ((x - oracle).norm(dim=1) <= 1e-7 * oracle.norm(dim=1)).all()


# --------------------------------------------------------------------------- preconditioned cg


def ill_conditioned(size: int = 300) -> Tensor:
    """Eigenvalues ``k^-2``, those of a curvature matrix more often than not."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    return (basis * torch.arange(1, size + 1, dtype=torch.float64) ** -2) @ basis.T


@pytest.mark.parametrize("build", [nystrom, lambda *a: lanczos(*a)[0]], ids=["nystrom", "lanczos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditioner(build: Callable, dtype: torch.dtype) -> None:
    matrix = ill_conditioned()
    spectrum, products = spectrum_of(matrix), product_with(matrix.to(dtype))
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(SIDES, 300, generator=generator).to(dtype)
    b[2] = 0
    pairs = build(products, b[0], 40)
    options = {"relative_damping": 0.05, "tolerance": 1e-3, "max_iterations": 400}
    plain_report = solve(products, b, spectrum, **options)[1]
    x, report = solve(products, b, spectrum, preconditioner=pairs, **options)
    assert plain_report.converged
    assert report.converged
    assert report.iterations * 2 <= plain_report.iterations
    damped = matrix + report.damping * torch.eye(300).double()
    rest = (b.double() - x.double() @ damped.T).norm(dim=1)
    assert (rest <= 1.001e-3 * b.norm(dim=1)).all()
    oracle = torch.linalg.solve(damped, b.double().T).T
    assert (x - oracle).norm() <= 0.02 * oracle.norm()


def test_preconditioner_does_not_change_the_solution() -> None:
    matrix, b = MATRICES["full rank"], right_hand_sides()
    wrong = nystrom(product_with(random_parts(seed=7).mean(dim=0)), b[0], 5)
    options = {"relative_damping": 0.1, "tolerance": 1e-12}
    spectrum = spectrum_of(matrix)
    plain = solve(product_with(matrix), b, spectrum, **options)[0]
    x, report = solve(product_with(matrix), b, spectrum, preconditioner=wrong, **options)
    assert report.converged
    torch.testing.assert_close(x, plain, rtol=1e-9, atol=1e-15)


def test_rounding_is_named() -> None:
    matrix = ill_conditioned()
    b = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    report = solve(
        product_with(matrix.float()),
        b,
        spectrum_of(matrix),
        relative_damping=1e-3,
        tolerance=1e-6,
        max_iterations=5000,
    )[1]
    assert not report.converged
    assert report.iterations < 5000
    assert "float64" in report.advice


# ------------------------------------------------------------------------------------ low rank


def test_low_rank_residual_falls_with_the_rank() -> None:
    matrix, products = ill_conditioned(), []

    def product(x: Tensor) -> Tensor:
        products.append(len(x))
        return x @ matrix.T

    b = torch.randn(SIDES, 300, generator=torch.Generator().manual_seed(1)).double()
    residuals = []
    for rank in (5, 20, 80, 300):
        products.clear()
        x, report = solve(
            product,
            b,
            spectrum_of(matrix),
            relative_damping=1.0,
            method="low_rank",
            rank=rank,
            tolerance=1e-9,
        )
        assert report.iterations == len(products) - 1 == rank + 1  # the residual takes the last
        assert report.converged is (rank == 300)
        assert ("rank" in report.advice and "damping" in report.advice) is (rank < 300)
        damped = matrix + report.damping * torch.eye(300).double()
        rest = (b - x @ damped.T).norm(dim=1) / b.norm(dim=1)
        assert report.relative_residual == pytest.approx(rest.max().item(), rel=1e-6, abs=1e-13)
        residuals.append(report.relative_residual)
    assert all(b < a / 2 for a, b in pairwise(residuals))
    assert residuals[2] < 0.1


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
        noisy_product=fresh_products(parts),
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
        noisy_product=noisy,
    )[1]
    assert len(calls) == report.iterations > 0


def test_repeats_average_the_noise() -> None:
    """The mean squared error of 8 runs is an eighth of that of one."""
    parts = random_parts()
    matrix, b = parts.mean(dim=0), right_hand_sides()[[0]]
    spectrum = spectrum_of(matrix)
    oracle = torch.linalg.solve(matrix + spectrum.mean_eigenvalue * torch.eye(SIZE), b.T).T

    def squared_error(repeats: int, seed: int) -> float:
        x, report = solve(
            product_with(matrix),
            b,
            spectrum,
            relative_damping=1.0,
            method="lissa",
            tolerance=1e-6,
            max_iterations=127,
            noisy_product=fresh_products(parts, seed),
            repeats=repeats,
        )
        assert report.iterations == 127 * repeats
        return (x - oracle).square().sum().item()

    one, eight = (sum(squared_error(r, seed) for seed in range(12)) for r in (1, 8))
    assert 1 / 16 < eight / one < 1 / 4


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


# ---------------------------------------------------------------------------------- indefinite


INDEFINITE = random_parts().mean(dim=0) - 0.5 * torch.eye(SIZE, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["cg", "lissa", "low_rank", "exact"])
def test_negative_curvature_is_an_error(method: str, dtype: torch.dtype) -> None:
    assert torch.linalg.eigvalsh(INDEFINITE)[0] < -0.05
    with pytest.raises(
        DivergenceError, match=r"negative.*Raise the damping.*Gauss-Newton"
    ) as error:
        solve(
            product_with(INDEFINITE.to(dtype)),
            right_hand_sides().to(dtype),
            spectrum_of(INDEFINITE),
            relative_damping=0.05,
            method=method,
            tolerance=1e-6,
            max_iterations=1000,
        )
    if method == "exact":
        assert f"{torch.linalg.eigvalsh(INDEFINITE)[0]:.3g}" in str(error.value)


@pytest.mark.parametrize(("budget", "early"), [(50, False), (100_000, True)])
def test_lissa_finds_negative_curvature(budget: int, early: bool) -> None:
    """By what it has grown into, be that all that it has, or past any solution."""
    calls = []

    def product(x: Tensor) -> Tensor:
        calls.append(1)
        return x @ INDEFINITE.T

    with pytest.raises(DivergenceError, match="Raise the damping"):
        solve(
            product,
            right_hand_sides(),
            spectrum_of(INDEFINITE),
            relative_damping=0.05,
            method="lissa",
            max_iterations=budget,
        )
    assert (len(calls) < budget / 10) is early


def test_negative_curvature_is_an_error_with_a_preconditioner() -> None:
    pairs = nystrom(product_with(MATRICES["full rank"]), INDEFINITE[0], 5)
    with pytest.raises(DivergenceError, match="Raise the damping"):
        solve(
            product_with(INDEFINITE),
            right_hand_sides(),
            spectrum_of(INDEFINITE),
            relative_damping=0.05,
            preconditioner=pairs,
        )


@pytest.mark.parametrize("method", ["cg", "lissa", "low_rank", "exact"])
def test_enough_damping_makes_up_for_negative_curvature(method: str) -> None:
    spectrum, b = spectrum_of(INDEFINITE), right_hand_sides()
    enough = -1.5 * torch.linalg.eigvalsh(INDEFINITE)[0].item() / spectrum.mean_eigenvalue
    x, report = solve(
        product_with(INDEFINITE),
        b,
        spectrum,
        relative_damping=enough,
        method=method,
        max_iterations=2000,
    )
    assert report.converged
    assert true_residual(INDEFINITE, report.damping, x, b) <= 1e-3


def test_spectrum_of_an_indefinite_matrix() -> None:
    matrix = INDEFINITE - 2 * torch.eye(SIZE, dtype=torch.float64)
    expected = spectrum_of(matrix)
    largest = estimate_largest_eigenvalue(product_with(matrix), matrix[0], steps=20)
    assert largest == pytest.approx(expected.largest_eigenvalue, rel=0.01)
    actual = estimate_spectrum(product_with(matrix), matrix[0], probes=64)
    assert actual.mean_eigenvalue == pytest.approx(expected.mean_eigenvalue, rel=0.1)
    with pytest.raises(ValueError, match=r"mean eigenvalue, -.*Gauss-Newton"):
        solve(product_with(matrix), right_hand_sides(), actual, relative_damping=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_only_lissa_asks_for_the_largest_eigenvalue(method: str) -> None:
    matrix, b = MATRICES["full rank"], right_hand_sides()
    known, mean = spectrum_of(matrix), Spectrum(spectrum_of(matrix).mean_eigenvalue)
    options = {"relative_damping": 1.0, "method": method, "max_iterations": 3000}
    x, report = solve(product_with(matrix), b, mean, **options)
    assert report.converged or method in ("identity", "low_rank")
    if method == "lissa":
        assert report.largest_eigenvalue == pytest.approx(known.largest_eigenvalue, rel=0.05)
    else:
        assert report.largest_eigenvalue is None
        torch.testing.assert_close(x, solve(product_with(matrix), b, known, **options)[0])


# ------------------------------------------------------------------------------------ refusals


def test_exact_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "EXACT_LIMIT", SIZE - 1)
    matrix = MATRICES["full rank"]
    with pytest.raises(UserError, match=r"at most 29 parameters\. Use cg"):
        solve(
            product_with(matrix),
            right_hand_sides(),
            spectrum_of(matrix),
            relative_damping=1.0,
            method="exact",
        )


@pytest.mark.parametrize(
    ("mean", "relative_damping"),
    [(1.0, 0.0), (1.0, -1.0), (0.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (float("nan"), 1.0)],
)
def test_damping_must_be_positive(mean: float, relative_damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be positive"):
        solve(
            product_with(MATRICES["full rank"]),
            right_hand_sides(),
            Spectrum(mean, 2.0),
            relative_damping=relative_damping,
        )


@pytest.mark.parametrize(
    ("option", "message"), [({"repeats": 0}, "at least 1 run"), ({"rank": 0}, "at least 1")]
)
def test_options_in_range(option: dict[str, int], message: str) -> None:
    matrix = MATRICES["full rank"]
    method = "lissa" if "repeats" in option else "low_rank"
    with pytest.raises(ValueError, match=message):
        solve(
            product_with(matrix),
            right_hand_sides(),
            spectrum_of(matrix),
            relative_damping=1.0,
            method=method,
            **option,
        )


@pytest.mark.parametrize("broken", ["product", "right-hand side"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_is_an_error(method: str, broken: str) -> None:
    matrix, b = MATRICES["full rank"].clone(), right_hand_sides()
    spectrum = spectrum_of(matrix)
    (matrix if broken == "product" else b)[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="rows with infinite embeddings"):
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
    largest = estimate_largest_eigenvalue(product_with(matrix.to(dtype)), like, seed=seed)
    assert largest == pytest.approx(expected.largest_eigenvalue, rel=0.05)
    assert largest >= expected.largest_eigenvalue * (1 - 1e-5)


def test_signs_are_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = random_signs((200, 200), generator)
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean().abs() < 0.02
