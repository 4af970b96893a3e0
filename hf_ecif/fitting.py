"""Bring the attributed parameters near a minimum of the training objective.

An influence function answers for a model that has been trained on the data. A pretrained model that
has not seen them is no such model: its scores can even come out inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ecif.operators import Objective, random_batches


@dataclass(frozen=True)
class FitReport:
    """What fitting the attributed parameters did.

    Attributes:
        epochs: passes over the data.
        loss_before: mean contrastive loss of the training rows before, in nats.
        loss_after: the same after.
        gradient_norm: ``|grad J|`` after.
    """

    epochs: int
    loss_before: float
    loss_after: float
    gradient_norm: float


def fit_parameters(
    objective: Objective,
    theta: Tensor,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda epochs: None,
) -> tuple[Tensor, FitReport]:
    """Minimise ``objective`` from ``theta`` with Adam, fresh random batches in every epoch.

    Args:
        objective: its batches serve to report the loss; those of training are drawn anew.
        theta: ``(P,)``, the start.
        batch_size: of the contrastive batches.
        epochs: zero leaves the parameters as they are.
        learning_rate: at the start; it falls to zero along a cosine.
        generator: of the batches.
        advance: called after every epoch, for a progress bar.

    Returns:
        The fitted parameters ``(P,)``, and a report.
    """
    before = objective.value(theta).item()
    current = theta.clone()
    optimizer = torch.optim.Adam([current], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    for _ in range(epochs):
        for batch in random_batches(len(objective.features), batch_size, generator):
            current.grad = objective.over([batch]).gradient(current)
            optimizer.step()
        schedule.step()
        advance(1)
    return current, FitReport(
        epochs=epochs,
        loss_before=before,
        loss_after=objective.value(current).item(),
        gradient_norm=objective.gradient(current).norm().item(),
    )
