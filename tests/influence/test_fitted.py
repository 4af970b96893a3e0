"""What a notebook shows of a fit."""

from typing import Any

import pytest
import torch

from hf_ecif.engine.solvers import SolveReport, Spectrum
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.fitting import FitReport
from hf_ecif.influence.scoring import Directions


@pytest.mark.parametrize(
    ("converged", "words"), [(True, "converged"), (False, "not converged: task score")]
)
def test_repr_is_a_line(converged: bool, words: str) -> None:
    theta = torch.zeros(16_384)
    numbers: dict[str, Any] = dict.fromkeys(SolveReport.__annotations__, 0.0)
    report = SolveReport(**numbers | {"converged": converged})
    fitted = Fitted(
        theta=theta,
        directions=Directions.none(theta),
        spectrum=Spectrum(1.0, 2.0),
        train_count=300,
        fit=FitReport(10, 2.0, 1.0, 0.1),
        solvers={"task score": report},
        query_loss_before=1.08362,
        query_loss=1.0,
        alignment=0.0,
    )
    assert repr(fitted) == (
        f"Fitted(300 rows, 16384 parameters, query loss 1.0836 -> 1.0000, solves {words})"
    )
