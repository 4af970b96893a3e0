"""The inverse curvature follows its config."""

import pytest
import torch

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.inverse import InverseCurvature
from hf_ecif.engine.objective import Objective
from tests.support.retraining import BATCHES, L2, Study


@pytest.fixture(scope="module")
def study() -> Study:
    return Study()


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize(
    ("solver", "rank", "close"),
    [
        ("cg", 0, 1e-6),
        ("cg", 20, 1e-6),
        ("exact", 0, 1e-6),
        ("low_rank", 100, 0.05),
        ("lissa", 0, 0.2),
    ],
)
def test_solution_is_the_dense_one(
    study: Study, curvature: str, solver: str, rank: int, close: float
) -> None:
    config = InfluenceConfig(
        curvature=curvature,
        solver=solver,
        rank=rank,
        damping=0.5,
        tolerance=1e-8 if solver == "cg" else 1e-2,
        max_iterations=1000,
        batch_size=8,
    )
    objective = Objective(study.encoder, study.features, BATCHES, l2=L2, center=study.origin)
    inverse = InverseCurvature(objective, study.theta, config)
    size = len(study.theta)
    dense = inverse.product(torch.eye(size, dtype=torch.float64))
    damping = 0.5 * inverse.spectrum.mean_eigenvalue
    b = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle = torch.linalg.solve(dense + damping * torch.eye(size, dtype=torch.float64), b.T).T
    solution, report = inverse.solve(b)
    assert (solution - oracle).norm() <= close * oracle.norm()
    assert report.damping == pytest.approx(damping)
    assert report.method == solver


def test_ritz_pairs_are_made_once(study: Study) -> None:
    config = InfluenceConfig(solver="low_rank", rank=20, damping=0.5)
    objective = Objective(study.encoder, study.features, BATCHES, l2=L2, center=study.origin)
    inverse = InverseCurvature(objective, study.theta, config)
    b = torch.randn(2, len(study.theta), dtype=torch.float64)
    together = inverse.solve(b)[0]
    calls, product = [], Objective.ggn

    def counted(self: Objective, theta: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        calls.append(len(vectors))
        return product(self, theta, vectors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "ggn", counted)
        apart = torch.cat([inverse.solve(side[None])[0] for side in b])
    assert calls == [1, 1]  # of the residuals
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["cg", "exact"])
@pytest.mark.parametrize(("probes", "tolerance"), [(2, 0.1), (50, 0.05), (5000, 0.005)])
def test_probes_are_solved_as_exactly_as_they_tell(
    study: Study, solver: str, probes: int, tolerance: float
) -> None:
    """A residual of half the standard error of a norm by so many of them, ``1 / sqrt(2 K)``."""
    config = InfluenceConfig(solver=solver, damping=5.0, batch_size=8, max_iterations=400)
    objective = Objective(study.encoder, study.features, BATCHES, l2=L2, center=study.origin)
    inverse = InverseCurvature(objective, study.theta, config)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(probes, len(study.theta), generator=generator, dtype=torch.float64)
    solved, report = inverse.solve_probes(z)
    assert report.tolerance == pytest.approx(tolerance)
    assert report.converged
    left = z - inverse.product(solved) - report.damping * solved
    true = (left.norm(dim=1) / z.norm(dim=1)).max().item()
    assert report.relative_residual == pytest.approx(true, rel=1e-6)
    assert true <= tolerance
    if solver == "cg":
        assert report.iterations < inverse.solve(z[:2])[1].iterations
