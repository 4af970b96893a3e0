"""Scores by dense gradients of the model's own forward: the oracle of a pass."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import logsigmoid

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import RoleForm
from hf_ecif.influence.scoring import Pass
from tests.support.families import SIGMOID, build, build_inputs

COUNT, TRAIN_COUNT, BATCH = 10, 12, 5
SAME = torch.tensor([0, 1, 2, 0, 4, 5, 1, 1, 8, 9])
PARAMETERS = r"_projection\.|text_model\.head\.weight|logit_"
MASKS = pytest.mark.parametrize("same", [None, SAME], ids=["all negatives", "masked"])
FAMILIES = pytest.mark.parametrize("family", ["clip", "siglip"])


@dataclass(frozen=True)
class Dense:
    """Terms of the loss by the model's own forward; what leaves is left out, nothing expanded."""

    model: nn.Module
    encoder: DualEncoder
    inputs: Features
    sigmoid: bool

    def logits(self, theta: Tensor, rows: Tensor) -> Tensor:
        values = [self.model.get_parameter(name) for name in self.encoder.names]
        pieces = theta.split([value.numel() for value in values])
        named = zip(self.encoder.names, pieces, values, strict=True)
        weights = {name: piece.view(value.shape) for name, piece, value in named}
        part = self.inputs[rows]
        return functional_call(
            self.model, weights, kwargs={**part.text, **part.image}
        ).logits_per_text

    def terms(self, logits: Tensor, same: Tensor | None) -> Tensor:
        """Sum of all terms of a batch, ``TERMS * B * L``."""
        values = self.cells if self.sigmoid else self.own_terms
        return values(logits, same).sum()

    def own_terms(self, logits: Tensor, same: Tensor | None) -> Tensor:
        """Terms of the pairs themselves, ``(B,)``."""
        if self.sigmoid:
            return self.cells(logits, same).diagonal()
        if same is not None:
            logits = logits.masked_fill(repeated(same), -1e4)
        return -logits.log_softmax(1).diagonal() - logits.log_softmax(0).diagonal()

    @staticmethod
    def cells(logits: Tensor, same: Tensor | None) -> Tensor:
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        values = -logsigmoid(signs * logits)
        return values if same is None else values * ~repeated(same)

    def leaving(
        self, theta: Tensor, rows: Tensor, leave: Tensor, same: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What goes with some pairs of a batch: their own terms, and the rest of the change.

        Args:
            theta: parameters.
            rows: of the batch.
            leave: booleans, which of them leave.
            same: numbers of the captions of all rows.
        """
        logits = self.logits(theta, rows)
        own = None if same is None else same[rows]
        rest = logits[~leave][:, ~leave]
        after = self.terms(rest, None if own is None else own[~leave]) if len(rest) else 0.0
        positive = self.own_terms(logits, own)[leave].sum()
        return positive, self.terms(logits, own) - after - positive

    def roles(
        self, theta: Tensor, rows: Tensor, same: Tensor | None, form: RoleForm = "exact"
    ) -> Tensor:
        """``(B, 2)`` of every pair alone."""
        if form == "first_order" and not self.sigmoid:
            return self._first_order(theta, rows, same)
        each = torch.eye(len(rows), dtype=torch.bool)
        return torch.stack([torch.stack(self.leaving(theta, rows, n, same)) for n in each])

    def _first_order(self, theta: Tensor, rows: Tensor, same: Tensor | None) -> Tensor:
        logits = self.logits(theta, rows)
        own = None if same is None else same[rows]
        positive = self.own_terms(logits, own)
        if own is not None:
            logits = logits.masked_fill(repeated(own), -1e4)
        others = 1 - torch.eye(len(rows), dtype=logits.dtype)
        negative = (logits.softmax(1) * others).sum(0) + (logits.softmax(0) * others).sum(1)
        return torch.stack([positive, negative], dim=1)

    def gradients(self, rows: Tensor, same: Tensor | None, form: RoleForm = "exact") -> Tensor:
        """Of `roles`, over ``TERMS * N``; ``(B, 2, P)``."""
        jacobian = jacrev(partial(self.roles, rows=rows, same=same, form=form))
        return jacobian(self.encoder.theta) / (self.factor * TRAIN_COUNT)

    @property
    def factor(self) -> int:
        return 1 if self.sigmoid else 2


def repeated(same: Tensor) -> Tensor:
    return (same[:, None] == same[None, :]) & ~torch.eye(len(same), dtype=torch.bool)


def make(family: str, parameters: str = PARAMETERS) -> tuple[Dense, Features]:
    """The oracle, and the rows at the boundary."""
    inputs = build_inputs(family, COUNT)
    encoder = DualEncoder(build(family), parameters, micro_batch_size=4)
    return Dense(build(family), encoder, inputs, family in SIGMOID), encoder.freeze(inputs)


def batching(
    partitions: int = 2,
    same: Tensor | None = None,
    size: int = BATCH,
    seed: int = 3,
    **options: Any,
) -> Pass:
    return Pass(size, partitions, seed, same, **options)
