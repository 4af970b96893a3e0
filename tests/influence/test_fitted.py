"""What a notebook shows of a fit."""

from typing import Any

import pytest
import torch

from hf_ecif.engine.solvers import SolveReport
from hf_ecif.engine.system import Spectrum
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.fitting import FitReport
from hf_ecif.influence.response import Checkpoint
from hf_ecif.influence.scoring import Directions
from hf_ecif.utils.checkpoints import State


def build(report: SolveReport, **parts: Any) -> Fitted:
    theta = torch.zeros(16_384)
    return Fitted(
        theta=theta,
        directions=Directions.none(theta),
        spectrum=Spectrum(1.0, 2.0),
        train_count=300,
        fit=FitReport(10, 2.0, 1.0, 0.1),
        solvers={"task score": report},
        query_loss_before=1.08362,
        query_loss=1.0,
        alignment=0.0,
        **parts,
    )


def build_report(converged: bool = True) -> SolveReport:
    numbers: dict[str, Any] = dict.fromkeys(SolveReport.__annotations__, 0.0)
    return SolveReport(**numbers | {"converged": converged})


@pytest.mark.parametrize(
    ("converged", "words"), [(True, "converged"), (False, "not converged: task score")]
)
def test_repr_is_a_line(converged: bool, words: str) -> None:
    fitted = build(build_report(converged))
    assert repr(fitted) == (
        f"Fitted(300 rows, 16384 parameters, query loss 1.0836 -> 1.0000, solves {words})"
    )


@pytest.mark.parametrize("old", [False, True])
def test_checkpoints_come_back_also_by_the_names_of_version_0_1(old: bool) -> None:
    ends = [Checkpoint(torch.full((4,), n), torch.full((2, 4), -n)) for n in (1.0, 2.0)]
    state = build(build_report(), checkpoints=ends).to_state()
    if old:
        renamed = {k.replace("checkpoints.", "stations."): v for k, v in state.tensors.items()}
        assert renamed.keys() != state.tensors.keys()
        state = State(renamed, state.values)
    found = Fitted.from_state(state, like=torch.zeros(1))
    for one, other in zip(found.checkpoints, ends, strict=True):
        assert torch.equal(one.theta, other.theta)
        assert torch.equal(one.directions, other.directions)
    assert found.scored_at == found.checkpoints
