"""Fit of the attributed parameters to the training objective.

An influence function assumes a model that has been trained on the data. For a pretrained model that
has not seen them, scores can even be inverted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.utils.checkpoints import Checkpoints, State

DECAYS, EPSILON = (0.9, 0.999), 1e-8  # of Adam's moments, and added to its root


@dataclass(frozen=True)
class FitReport:
    """Outcome of fitting the attributed parameters.

    Attributes:
        epochs: passes over the data.
        loss_before: mean contrastive loss of the training rows before the fit, in nats.
        loss_after: mean contrastive loss after the fit, in nats.
        gradient_norm: ``|grad J|`` after the fit.
    """

    epochs: int
    loss_before: float
    loss_after: float
    gradient_norm: float


class Epoch(NamedTuple):
    """Start and batches of an epoch, which are enough to repeat it.

    Attributes:
        theta: parameters before its first step, ``(P,)``.
        first: Adam's mean of the gradients before its first step, ``(P,)``.
        second: Adam's mean of their squares, ``(P,)``.
        steps: number of steps of the fit before it.
        learning_rate: learning rate of the epoch.
        batches: rows of the batch of each step.
    """

    theta: Tensor
    first: Tensor
    second: Tensor
    steps: int
    learning_rate: float
    batches: list[Tensor]


def fit_parameters(
    objective: Objective,
    theta: Tensor,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
    checkpoints: Checkpoints | None = None,
    trajectory: list[Epoch] | None = None,
    advance: Callable[[int], None] = lambda epochs: None,
) -> tuple[Tensor, FitReport]:
    """Minimise ``objective`` from ``theta`` with Adam, with new random batches in every epoch.

    Args:
        objective: objective; its own batches are used only to report the loss.
        theta: ``(P,)``, the start.
        batch_size: number of pairs in a contrastive batch.
        epochs: number of epochs; zero leaves the parameters unchanged.
        learning_rate: learning rate at the start; it falls to zero along a cosine.
        generator: generator of the batches.
        checkpoints: store of the state after the last epoch.
        trajectory: list to which every epoch not known from the checkpoints is added.
        advance: called after every epoch, for a progress bar.

    Returns:
        The fitted parameters ``(P,)``, and a report.
    """
    known = checkpoints or Checkpoints()
    current = theta.clone()
    optimizer = adam(current)
    done = _resume(known, current, optimizer, generator)
    advance(done)
    for epoch in range(done, epochs):
        rate = learning_rate * cosine_fall(epoch, epochs)
        batches = random_batches(len(objective.features), batch_size, generator)
        if trajectory is not None:
            trajectory.append(_begin(current, optimizer, epoch * len(batches), rate, batches))
        run_epoch(objective, current, optimizer, rate, batches)
        _keep(known, current, optimizer, generator, epoch + 1)
        advance(1)
    return current, FitReport(
        epochs=epochs,
        loss_before=objective.value(theta).item(),
        loss_after=objective.value(current).item(),
        gradient_norm=objective.gradient(current).norm().item(),
    )


def adam(current: Tensor) -> torch.optim.Adam:
    """Adam for parameters ``(P,)``; `run_epoch` sets its learning rate."""
    return torch.optim.Adam([current], betas=DECAYS, eps=EPSILON)


def run_epoch(
    objective: Objective,
    current: Tensor,
    optimizer: torch.optim.Adam,
    learning_rate: float,
    batches: Iterable[Tensor],
) -> None:
    """Update the parameters in place, with one step per batch.

    Args:
        objective: what is minimised; its own batches are not used.
        current: parameters ``(P,)``.
        optimizer: from `adam`.
        learning_rate: learning rate of all steps.
        batches: rows of each batch.
    """
    optimizer.param_groups[0]["lr"] = learning_rate
    for batch in batches:
        current.grad = objective.over([batch]).gradient(current)
        optimizer.step()


def cosine_fall(done: int, total: int) -> float:
    """Factor of the learning rate, which falls from one to zero along a cosine."""
    return (1 + math.cos(math.pi * done / total)) / 2


def _begin(
    current: Tensor,
    optimizer: torch.optim.Adam,
    steps: int,
    learning_rate: float,
    batches: list[Tensor],
) -> Epoch:
    zeros = torch.zeros_like(current)
    state = optimizer.state[current] if steps else {"exp_avg": zeros, "exp_avg_sq": zeros}
    first, second = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    return Epoch(current.clone(), first, second, steps, learning_rate, batches)


def _keep(
    known: Checkpoints,
    current: Tensor,
    optimizer: torch.optim.Adam,
    generator: torch.Generator,
    epochs: int,
) -> None:
    moments = {f"adam.{key}": value for key, value in optimizer.state[current].items()}
    tensors = {"theta": current.detach(), "generator": generator.get_state()} | moments
    known.save("fit", State(tensors, {"epochs": epochs}))


def _resume(
    known: Checkpoints, current: Tensor, optimizer: torch.optim.Adam, generator: torch.Generator
) -> int:
    """Restore the state from `_keep`, in place; returns the number of finished epochs."""
    state = known.load("fit")
    if state is None:
        return 0
    current.copy_(state.tensors["theta"])
    generator.set_state(state.tensors["generator"])
    optimizer.state[current] = {
        key.removeprefix("adam."): value.to(current.device) if value.ndim else value
        for key, value in state.tensors.items()
        if key.startswith("adam.")
    }
    return int(state.values["epochs"])
