"""Eigenpairs found from products against `torch.linalg.eigh`, and what is built on them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_ecif.engine.low_rank import CHUNK, DivergenceError, LowRank, lanczos, nystrom

SIZE = 40


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix of these eigenvalues, along random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double()).Q
    return (basis * values) @ basis.T


def power_law(exponent: float, size: int = SIZE) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64) ** -exponent


def product_with(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ matrix.T


def rows(count: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def damped_inverse(matrix: Tensor, b: Tensor, damping: float) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).to(matrix), b.T).T


def dense(pairs: LowRank) -> Tensor:
    """``Q^T diag(values) Q + rest (I - Q^T Q)``."""
    projector = pairs.vectors.T @ pairs.vectors
    inside = pairs.vectors.T @ torch.diag(pairs.values) @ pairs.vectors
    return inside + pairs.rest * (torch.eye(len(projector)).to(projector) - projector)


def from_lanczos(
    matvec: Callable[[Tensor], Tensor], like: Tensor, rank: int, seed: int = 0
) -> LowRank:
    return lanczos(matvec, like, rank, seed=seed)[0]


BUILDERS = {"lanczos": from_lanczos, "nystrom": nystrom}
each_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


# ------------------------------------------------------------------------------ the eigenpairs


@each_builder
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_is_exact(build: Callable, dtype: torch.dtype) -> None:
    matrix = symmetric(power_law(1.0)).to(dtype)
    pairs = build(product_with(matrix), matrix[0], SIZE)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    exact = {"rtol": 0, "atol": tolerance}
    assert pairs.vectors.dtype == pairs.values.dtype == dtype
    torch.testing.assert_close(pairs.values, power_law(1.0).to(dtype), **exact)
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(SIZE).to(dtype), **exact)
    torch.testing.assert_close(dense(pairs), matrix, **exact)
    b = rows().to(dtype)
    x, oracle = pairs.inverse(b, 0.1), damped_inverse(matrix, b, 0.1)
    assert ((x - oracle).norm(dim=1) / oracle.norm(dim=1)).max() <= 10 * tolerance


@each_builder
@pytest.mark.parametrize("rank", [1, 7, 39])
def test_rows_are_orthonormal_and_values_descend(build: Callable, rank: int) -> None:
    matrix = symmetric(power_law(2.0))
    pairs = build(product_with(matrix), matrix[0], rank)
    assert pairs.vectors.shape == (rank, SIZE)
    gram = pairs.vectors @ pairs.vectors.T
    torch.testing.assert_close(gram, torch.eye(rank).double(), rtol=0, atol=1e-12)
    assert (pairs.values.diff() <= 0).all()
    # No Rayleigh quotient, nor what Nyström makes of them, can leave the spectrum.
    assert (pairs.values <= power_law(2.0)[:rank] + 1e-12).all()


@each_builder
def test_a_low_rank_matrix_is_found_in_full(build: Callable) -> None:
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:5] = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5])
    matrix = symmetric(values)
    pairs = build(product_with(matrix), matrix[0], 10)
    torch.testing.assert_close(dense(pairs), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(pairs.inverse(rows(), 0.1), damped_inverse(matrix, rows(), 0.1))


@each_builder
def test_rank_is_at_most_the_size(build: Callable) -> None:
    matrix = symmetric(power_law(1.0))
    assert len(build(product_with(matrix), matrix[0], 10 * SIZE).values) == SIZE


@each_builder
@pytest.mark.parametrize("rank", [0, -3])
def test_rank_must_be_positive(build: Callable, rank: int) -> None:
    matrix = symmetric(power_law(1.0))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        build(product_with(matrix), matrix[0], rank)


@each_builder
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_must_be_finite(build: Callable, bad: float) -> None:
    matrix = symmetric(power_law(1.0))
    matrix[3, 4] = bad
    with pytest.raises(DivergenceError, match="not finite"):
        build(product_with(matrix), matrix[0], 5)


@each_builder
def test_the_seed_decides(build: Callable) -> None:
    matrix = symmetric(power_law(1.0))
    pairs = [build(product_with(matrix), matrix[0], 5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(pairs[0].vectors, pairs[1].vectors)
    assert not torch.allclose(pairs[0].values, pairs[2].values)


# -------------------------------------------------------------------------------------- Lanczos


@pytest.mark.parametrize("rank", [4, 12, 25])
@pytest.mark.parametrize("shift", [0.0, -0.3], ids=["definite", "indefinite"])
def test_ritz_pairs(rank: int, shift: float) -> None:
    """An eigenvalue lies within the residual of every Ritz value, and the residual is true."""
    values = power_law(1.0) + shift
    matrix = symmetric(values)
    pairs, residuals = lanczos(product_with(matrix), matrix[0], rank)
    assert len(pairs.values) == len(residuals) == rank
    errors = pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors
    torch.testing.assert_close(errors.norm(dim=1), residuals, rtol=0, atol=1e-12)
    distance = (pairs.values[:, None] - values).abs().min(dim=1).values
    assert (distance <= residuals + 1e-12).all()
    if rank == 25:
        torch.testing.assert_close(pairs.values[:5], values[:5])
        assert pairs.values[-1] == pytest.approx(values[-1].item(), abs=1e-2)


def test_lanczos_stops_when_exhausted() -> None:
    """Three different eigenvalues make a Krylov space of dimension three."""
    values = torch.tensor([5.0] * 10 + [2.0] * 10 + [0.0] * 20, dtype=torch.float64)
    matrix, calls = symmetric(values), []

    def product(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x @ matrix.T

    pairs, residuals = lanczos(product, matrix[0], 30)
    assert len(calls) == len(pairs.values) <= 4
    torch.testing.assert_close(pairs.values[:2], torch.tensor([5.0, 2.0]).double())
    assert residuals.max() <= 1e-12


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_lanczos_on_a_multiple_of_identity(value: float) -> None:
    matrix = value * torch.eye(SIZE, dtype=torch.float64)
    pairs = from_lanczos(product_with(matrix), matrix[0], 8).with_rest(product_with(matrix))
    assert pairs.values.tolist() == pytest.approx([value])
    assert pairs.rest == pytest.approx(value)
    torch.testing.assert_close(pairs.inverse(rows(), 0.5), rows() / (value + 0.5))


# -------------------------------------------------------------------------------------- Nyström


def test_nystrom_shares_its_calls() -> None:
    size, rank, calls = 100, 2 * CHUNK + 6, []
    matrix = symmetric(power_law(1.0, size))

    def product(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x @ matrix.T

    nystrom(product, matrix[0], rank)
    assert calls == [CHUNK, CHUNK, 6]


def test_nystrom_against_its_definition() -> None:
    """``(H W)^T (W^T H W)^-1 (H W)`` depends on the range of ``W`` alone."""
    matrix, rank, seed = symmetric(power_law(1.0)), 12, 3
    pairs = nystrom(product_with(matrix), matrix[0], rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    sketch = matrix @ (test := torch.randn(SIZE, rank, generator=generator).double())
    expected = sketch @ torch.linalg.solve(test.T @ sketch, sketch.T)
    torch.testing.assert_close(dense(pairs), expected, rtol=0, atol=1e-12)


def test_nystrom_survives_slightly_negative_eigenvalues() -> None:
    values = power_law(2.0)
    values[20:] = -1e-4
    matrix = symmetric(values)
    pairs = nystrom(product_with(matrix), matrix[0], 30)
    assert (pairs.values >= 0).all()
    torch.testing.assert_close(pairs.values[:5], values[:5], rtol=1e-3, atol=0)


# ------------------------------------------------------------------------ inverse, preconditioner


@settings(max_examples=30, deadline=None)
@given(
    rank=st.integers(1, SIZE),
    damping=st.floats(1e-3, 10.0),
    rest=st.floats(0.0, 1.0),
    scales=st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
)
def test_inverse_is_linear_and_inverts_the_dense_form(
    rank: int, damping: float, rest: float, scales: tuple[float, float]
) -> None:
    vectors = torch.linalg.qr(rows(SIZE)).Q[:rank]
    pairs = LowRank(vectors, power_law(1.0)[:rank], rest)
    b = rows(2)
    x = pairs.inverse(b, damping)
    torch.testing.assert_close(x, damped_inverse(dense(pairs), b, damping), rtol=1e-8, atol=1e-9)
    weights = torch.tensor(scales, dtype=torch.float64)
    combined = pairs.inverse((weights @ b)[None], damping)[0]
    torch.testing.assert_close(combined, weights @ x, rtol=1e-8, atol=1e-9)


def test_inverse_in_float32_keeps_large_eigenvalues_apart() -> None:
    """What rounding leaves of the subspace must not come out divided by the damping alone."""
    vectors = torch.linalg.qr(rows(2000, 20)).Q.T.float()
    pairs = LowRank(vectors, torch.full((20,), 1e6))
    b = rows(8, 20).float() @ vectors
    x, Q = pairs.inverse(b, damping=1.0).double(), vectors.T.double()
    residual = b - x - 1e6 * x @ Q @ Q.T
    assert residual.norm() <= 1e-5 * b.norm()


@each_builder
def test_the_rest_is_the_mean_of_what_is_left_out(build: Callable) -> None:
    values = power_law(1.0, 400)
    matrix = symmetric(values)
    pairs = build(product_with(matrix), matrix[0], 30)
    assert pairs.rest == 0
    projector = torch.eye(400).double() - pairs.vectors.T @ pairs.vectors
    expected = (projector @ matrix @ projector).trace().item() / 370
    rests = [pairs.with_rest(product_with(matrix), seed=seed).rest for seed in range(4)]
    assert len(set(rests)) == 4
    assert rests == pytest.approx([expected] * 4, rel=0.15)

    b, damping = rows(3, 400), 0.1 * values.mean().item()
    oracle = damped_inverse(matrix, b, damping)
    with_rest = pairs.with_rest(product_with(matrix)).inverse(b, damping)
    error, error_without = (
        ((x - oracle).norm() / oracle.norm()).item() for x in (with_rest, pairs.inverse(b, damping))
    )
    assert error < 0.6 < 2 < error_without


def test_a_rest_below_zero_counts_as_zero() -> None:
    matrix = -torch.eye(SIZE, dtype=torch.float64)
    pairs = LowRank(rows(1) / rows(1).norm(), torch.ones(1, dtype=torch.float64))
    assert pairs.with_rest(product_with(matrix)).rest == 0


def test_nothing_is_left_out_of_a_full_basis() -> None:
    full = LowRank(torch.eye(SIZE).double(), torch.ones(SIZE).double())
    assert full.with_rest(product_with(torch.eye(SIZE).double())).rest == 0


def test_preconditioner_against_the_formula() -> None:
    matrix, damping = symmetric(power_law(1.0)), 0.05
    pairs = nystrom(product_with(matrix), matrix[0], 10)
    Q, values = pairs.vectors.T, pairs.values
    inside = (values[-1] + damping) * Q @ torch.diag(1 / (values + damping)) @ Q.T
    expected = inside + torch.eye(SIZE).double() - Q @ Q.T
    torch.testing.assert_close(pairs.precondition(rows(), damping), rows() @ expected.T)


def test_preconditioner_lowers_the_condition_number() -> None:
    values = power_law(2.0, 200)
    matrix, damping = symmetric(values), 1e-4
    pairs = nystrom(product_with(matrix), matrix[0], 40)
    damped = matrix + damping * torch.eye(200).double()
    eigenvalues = torch.linalg.eigvals(pairs.precondition(damped, damping)).real
    before = (values[0] + damping) / (values[-1] + damping)
    assert eigenvalues.max() / eigenvalues.min() < before / 100


def test_preconditioner_stays_positive_definite() -> None:
    pairs = LowRank(torch.eye(SIZE)[:2].double(), torch.tensor([1.0, -0.5]).double())
    x = torch.eye(SIZE, dtype=torch.float64)
    assert ((pairs.precondition(x, 0.1) * x).sum(dim=1) > 0).all()
