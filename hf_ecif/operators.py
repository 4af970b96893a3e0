"""The training objective ``J`` over a data set: value, gradient and curvature products.

The contrastive batch and the micro-batch are different things. A product over one contrastive batch
of any size is three steps: embed its rows with tangents in micro-batches, apply the loss's
curvature to the embeddings, pull the result back in micro-batches. No graph outlives a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ecif import objectives
from hf_ecif.encoders import DualEncoder, Features
from hf_ecif.objectives import Embeddings


@dataclass(frozen=True)
class Objective:
    """``J(theta) = mean over contrastive batches of L_m + l2/2 |theta|^2``.

    Attributes:
        encoder: embeds the rows.
        features: all rows, at the frozen boundary.
        batches: indices of the rows of each contrastive batch.
        same: ``(N,)`` integers, equal for rows that are not to be negatives of each other; or None.
        l2: the paper's ``delta``.
    """

    encoder: DualEncoder
    features: Features
    batches: Sequence[Tensor]
    same: Tensor | None = None
    l2: float = 0.0

    def value(self, theta: Tensor) -> Tensor:
        """``J(theta)``, scalar, in nats."""
        losses = [
            objectives.loss(self.encoder.embed(theta, self.features[batch]), self._same(batch))
            for batch in self.batches
        ]
        return torch.stack(losses).mean() + self.l2 / 2 * theta.square().sum()

    def gradient(self, theta: Tensor) -> Tensor:
        """``grad J``, ``(P,)``."""
        total = torch.zeros_like(theta)
        for batch in self.batches:
            features = self.features[batch]
            embeddings = self.encoder.embed(theta, features)
            cotangent = objectives.loss_gradient(embeddings, self._same(batch))
            single = Embeddings(*(part[None] for part in cotangent))
            total += self.encoder.pull(theta, single, features)[0]
        return total / len(self.batches) + self.l2 * theta

    def ggn(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """Generalised Gauss-Newton products ``G v``, positive semi-definite.

        Args:
            theta: ``(P,)``.
            vectors: ``(K, P)``; all share one primal pass.

        Returns:
            ``(K, P)``.
        """
        total = torch.zeros_like(vectors)
        for batch in self.batches:
            features = self.features[batch]
            embeddings, tangents = self.encoder.push(theta, vectors, features)
            cotangents = objectives.ggn_product(embeddings, tangents, self._same(batch))
            total += self.encoder.pull(theta, cotangents, features)
        return total / len(self.batches) + self.l2 * vectors

    def over(self, batches: Sequence[Tensor]) -> Objective:
        """The same objective over other contrastive batches of the same rows."""
        return Objective(self.encoder, self.features, batches, self.same, self.l2)

    def _same(self, batch: Tensor) -> Tensor | None:
        return None if self.same is None else self.same[batch]


def random_batches(count: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """One random partition of ``count`` rows into contrastive batches of equal size.

    InfoNCE depends on the size of the batch (``log B``), so the last batch is filled up with rows
    that were drawn already. Every row is in at least one batch; fewer rows than ``batch_size`` make
    one batch of all.
    """
    size = min(batch_size, count)
    order = torch.randperm(count, generator=generator)
    padded = torch.cat([order, order[: -count % size]])
    return list(padded.split(size))
