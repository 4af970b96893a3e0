"""Result of a fit, as one thing that can be kept, sent and scored with elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ecif.engine.solvers import SolveReport
from hf_ecif.engine.system import Spectrum
from hf_ecif.influence.fitting import FitReport
from hf_ecif.influence.response import Checkpoint
from hf_ecif.influence.scoring import Directions
from hf_ecif.utils.checkpoints import State


@dataclass(frozen=True, repr=False)
class Fitted:
    """Result of a fit, without the rows that it was made with.

    Attributes:
        theta: attributed parameters at which everything is linearised, ``(P,)``.
        directions: tangents of the scoring pass at ``theta``.
        spectrum: spectrum of the curvature there.
        train_count: rows fitted on, the ``N`` of every score.
        fit: how the parameters were fitted.
        solvers: reports by purpose.
        query_loss_before: loss of the query at the model's own parameters, in nats.
        query_loss: loss of the query at ``theta``.
        alignment: cosine of the query's gradient and the training gradient.
        checkpoints: checkpoints of an unrolled response, which score the query in place of its
            direction at ``theta``; none for a stationary one.
    """

    theta: Tensor
    directions: Directions
    spectrum: Spectrum
    train_count: int
    fit: FitReport
    solvers: dict[str, SolveReport]
    query_loss_before: float
    query_loss: float
    alignment: float
    checkpoints: Sequence[Checkpoint] = ()

    @property
    def scored_at(self) -> Sequence[Checkpoint]:
        """Where, and along which directions, the query is scored, whatever the response."""
        return self.checkpoints or [Checkpoint(self.theta, self.directions.query)]

    def __repr__(self) -> str:
        """One line of text: the tensors would fill a screen."""
        open_ends = [purpose for purpose, report in self.solvers.items() if not report.converged]
        return (
            f"Fitted({self.train_count} rows, {len(self.theta)} parameters, query loss "
            f"{self.query_loss_before:.4f} -> {self.query_loss:.4f}, solves "
            f"{'not converged: ' + ', '.join(open_ends) if open_ends else 'converged'})"
        )

    def to_state(self) -> State:
        """Tensors, and values for JSON."""
        values: dict[str, Any] = {
            "spectrum": asdict(self.spectrum),
            "train_count": self.train_count,
            "fit": asdict(self.fit),
            "solvers": {purpose: asdict(report) for purpose, report in self.solvers.items()},
            "query_loss_before": self.query_loss_before,
            "query_loss": self.query_loss,
            "alignment": self.alignment,
        }
        tensors = {"theta": self.theta} | self.directions._asdict()
        if self.checkpoints:
            columns = zip(Checkpoint._fields, zip(*self.checkpoints, strict=True), strict=True)
            tensors |= {f"checkpoints.{name}": torch.stack(column) for name, column in columns}
        return State(tensors, values)

    @classmethod
    def from_state(cls, state: State, like: Tensor) -> Fitted:
        """Read what `to_state` wrote, with the dtype and the device of ``like``."""
        tensors = {name: value.to(like) for name, value in state.tensors.items()}
        values = dict(state.values)
        columns = [_pop_checkpoints(tensors, name) for name in Checkpoint._fields]
        return cls(
            theta=tensors.pop("theta"),
            checkpoints=[Checkpoint(*column) for column in zip(*columns, strict=True)],
            directions=Directions(**tensors),
            spectrum=Spectrum(**values.pop("spectrum")),
            fit=FitReport(**values.pop("fit")),
            solvers={name: SolveReport(**report) for name, report in values.pop("solvers").items()},
            **values,
        )


def _pop_checkpoints(tensors: dict[str, Tensor], name: str) -> Sequence[Tensor]:
    """A column of all checkpoints; version 0.1 called them stations."""
    for column in (f"checkpoints.{name}", f"stations.{name}"):
        if column in tensors:
            return list(tensors.pop(column))
    return []
