"""Score rows: one forward-mode pass over random partitions into contrastive batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ecif import objectives
from hf_ecif.encoders import DualEncoder, Features
from hf_ecif.objectives import RoleForm


class Directions(NamedTuple):
    """Tangents of the attributed parameters along which a pass differentiates the roles.

    Attributes:
        query: ``(P,)``, ``s = (H + damping)^-1 grad F``.
        probes: ``(K, P)``, random signs ``z``.
        solved: ``(K, P)``, ``(H + damping)^-1 z``.
    """

    query: Tensor
    probes: Tensor
    solved: Tensor

    @classmethod
    def none(cls, theta: Tensor) -> Directions:
        """Directions that lead nowhere, for a pass that wants the losses alone."""
        empty = theta.new_zeros(0, len(theta))
        return cls(torch.zeros_like(theta), empty, empty)


@dataclass(frozen=True)
class Scores:
    """Per-row results, each ``(N,)``, averaged over partitions.

    Attributes:
        positive: predicted change of the query, in its own units, through the pair's role as a
            positive, if the pair were removed from training. Negative is harmful.
        negative: the same through its role as a negative in the terms of other pairs.
        stderr: standard error of ``positive + negative`` over the partitions.
        size: ``|omega|``, norm of the change of the attributed parameters that the removal causes.
        self_influence: ``grad Pos . (H + damping)^-1 grad(Pos + Neg) / 2N``: by how much the pair's
            own loss would rise without it, in nats.
        loss: ``Pos_n``, the pair's own loss in both directions, in nats.
        clip_score: cosine of the pair, in [-1, 1].
        scale: inverse temperature of the model as given, ``exp(logit_scale)``.
    """

    positive: Tensor
    negative: Tensor
    stderr: Tensor
    size: Tensor
    self_influence: Tensor
    loss: Tensor
    clip_score: Tensor
    scale: float

    @property
    def task(self) -> Tensor:
        """``ecif_score``: predicted change of the query if the pair were removed."""
        return self.positive + self.negative

    @property
    def relative(self) -> Tensor:
        """``ecif_relative``: the score over `size`; pairs that move everything stand back."""
        return self.task / self.size

    @property
    def neg_clip_loss(self) -> Tensor:
        """NegCLIPLoss (Wang et al., 2024): higher where the pair is better aligned."""
        return -self.loss / (2 * self.scale)

    @property
    def loo_loss(self) -> Tensor:
        """The loss that the pair would have had, had it not been trained on; nats."""
        return self.loss + self.self_influence


def score_rows(
    encoder: DualEncoder,
    theta: Tensor,
    features: Features,
    directions: Directions,
    partitions: Sequence[Sequence[Tensor]],
    *,
    train_count: int,
    form: RoleForm = "exact",
    same: Tensor | None = None,
    advance: Callable[[int], None] = lambda partitions: None,
) -> Scores:
    """Scores of all rows, averaged over ``partitions`` (lists of batches of row numbers).

    Args:
        encoder: of the attributed parameters.
        theta: ``(P,)``.
        features: ``N`` rows.
        directions: from a fit.
        partitions: every row must occur in each of them.
        train_count: rows of the training set, the ``N`` of ``1 / 2N``.
        form: of the negative role.
        same: ``(N,)``, equal for rows that are not negatives of each other.
        advance: called after every partition, for a progress bar.
    """
    sums = torch.zeros(6, len(features), dtype=theta.dtype)
    squares, visits = torch.zeros(2, len(features), dtype=theta.dtype)
    for partition in partitions:
        for batch in partition:
            own = None if same is None else same[batch]
            values = _score_batch(
                encoder, theta, features[batch], directions, form, own, train_count
            )
            sums.index_add_(1, batch, values)
            squares.index_add_(0, batch, (values[0] + values[1]).square())
            visits.index_add_(0, batch, torch.ones_like(values[0]))
        advance(1)
    mean = sums / visits
    task = mean[0] + mean[1]
    # Of a single visit nothing is known about the spread: its error is infinite, not zero.
    variance = (squares / visits - task.square()).clamp_min(0) / (visits - 1).clamp_min(0)
    stderr = torch.where(visits > 1, variance, torch.inf).sqrt()
    positive, negative, squared_size, self_influence, loss, cosine = mean
    return Scores(
        positive=positive,
        negative=negative,
        stderr=stderr,
        size=squared_size.sqrt(),
        self_influence=self_influence,
        loss=loss,
        clip_score=cosine,
        scale=encoder.scale,
    )


def _score_batch(
    encoder: DualEncoder,
    theta: Tensor,
    features: Features,
    directions: Directions,
    form: RoleForm,
    same: Tensor | None,
    train_count: int,
) -> Tensor:
    """``(6, B)``: positive and negative part, squared size, self-influence, own loss, cosine."""
    tangents = torch.cat([directions.query[None], directions.probes, directions.solved])
    embeddings, moved = encoder.push(theta, tangents, features)
    along = objectives.role_tangents(embeddings, moved, form=form, same=same)
    positive = along.positive / (2 * train_count)
    both = positive + along.negative / (2 * train_count)
    count = len(directions.probes)
    along_solved = both[1 + count :]
    values = torch.stack(
        [
            positive[0],
            both[0] - positive[0],
            along_solved.square().sum(dim=0) / max(count, 1),
            # One factor 1 / 2N belongs to the pair's removal; the other factor is its plain loss.
            (along.positive[1 : 1 + count] * along_solved).sum(dim=0) / max(count, 1),
            objectives.roles(embeddings, form=form, same=same).positive,
            (embeddings.text * embeddings.image).sum(dim=1),
        ]
    )
    return values.cpu()
