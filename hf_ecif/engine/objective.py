"""Training objective ``J`` over a data set: value, gradient and curvature products.

A contrastive batch is not a micro-batch. A product over one contrastive batch of any size takes
three steps: embed its rows with tangents in micro-batches, apply the loss's curvature to the
embeddings, pull the result back in micro-batches. No graph outlives a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.forward_mode import Derivative
from hf_ecif.engine.low_rank import Matvec
from hf_ecif.engine.objectives import Contrastive, Embeddings, LinearisedLoss
from hf_ecif.utils import distributed

Curvature = Literal["ggn", "hessian"]

BROUGHT_BYTES = 2**30  # activations that a process may hold for its own batches
KEPT_BYTES = 2**30  # what an operator may keep between products


@dataclass(frozen=True)
class Objective:
    """``J(theta) = sum_m w_m L_m + l2/2 |theta - center|^2`` over contrastive batches ``m``.

    Attributes:
        encoder: embeds the rows.
        features: all rows, at the frozen boundary.
        batches: indices of the rows of each contrastive batch.
        same: ``(N, L)`` integers; rows that agree in a column are not negatives of each other. Or
            None.
        l2: weight of the penalty, ``delta`` in the paper.
        center: ``(P,)``, where the penalty is zero; the origin if absent, as in the paper.
        weights: ``w_m``; one over the number of batches, for the mean, if absent.
    """

    encoder: DualEncoder
    features: Features
    batches: Sequence[Tensor]
    same: Tensor | None = None
    l2: float = 0.0
    center: Tensor | None = None
    weights: Sequence[float] | None = None

    def value(self, theta: Tensor) -> Tensor:
        """``J(theta)``, scalar, in nats."""
        total = theta.new_zeros(())
        for chunk in self._chunks(0):
            embeddings = self.encoder.embed(theta, chunk.features)
            for batch in chunk.mine():
                loss = self._loss.loss(batch.of(embeddings), batch.same, batch.rows)
                total += batch.weight * loss
        return distributed.add_up(total) + self.l2 / 2 * self._from_center(theta).square().sum()

    def gradient(self, theta: Tensor) -> Tensor:
        """``grad J``, ``(P,)``."""
        total = self.l2 * self._from_center(theta)[None]
        for chunk in self._chunks(2):  # a graph takes as much memory as two tangents
            embeddings, pull = self.encoder.embed_and_pull(theta, chunk.features)
            cotangents = self._gradient_of(chunk, embeddings)
            total += pull(Embeddings(*(part[None] for part in cotangents)))
        return total[0]

    def curvature(self, kind: Curvature, theta: Tensor, vectors: Tensor) -> Tensor:
        """Products with the `ggn` or the `hessian`, ``(K, P)``, by name."""
        return self.ggn(theta, vectors) if kind == "ggn" else self.hessian(theta, vectors)

    def operator(self, kind: Curvature, theta: Tensor) -> Matvec:
        """`curvature` as a function of the vectors alone, for many products at one ``theta``.

        If no more than a head remains of each tower, everything that does not depend on the vectors
        (embeddings, and the loss's derivatives with respect to the logits) is computed once and
        kept, for as many batches as fit in `KEPT_BYTES`. With several processes, and batches for
        all of them, each then receives the rows of its own contrastive batches once, and a product
        exchanges only its result ``(K, P)``; otherwise, embeddings and tangents of all rows.
        """
        own = self._own_batches()
        if own is None:
            return lambda vectors: self.curvature(kind, theta, vectors)
        with distributed.alone():
            kept, rest = own._linearise(theta)

        def product(vectors: Tensor) -> Tensor:
            with distributed.alone():
                part = rest.curvature(kind, theta, vectors)
                for batch in kept:
                    part += batch.product(kind, vectors)
            return distributed.add_up(part) + self.l2 * vectors

        return product

    def ggn(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """Products ``G v`` with the generalised Gauss-Newton matrix, positive semi-definite.

        Args:
            theta: ``(P,)``.
            vectors: ``(K, P)``; all share one primal pass.

        Returns:
            ``(K, P)``.
        """
        total = self.l2 * vectors
        for chunk in self._chunks(len(vectors)):
            pushed = self.encoder.push(theta, vectors, chunk.features)
            cotangents = self._product_of(LinearisedLoss.ggn_product, chunk, *pushed)
            total += self.encoder.pull(theta, cotangents, chunk.features)
        return total

    def hessian(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """Products ``H v`` with the full Hessian, which may be indefinite; see `ggn`."""
        total = self.l2 * vectors
        for chunk in self._chunks(len(vectors)):
            pushed = self.encoder.push(theta, vectors, chunk.features)
            fixed = self._gradient_of(chunk, pushed[0])
            moved = self._product_of(LinearisedLoss.hessian_product, chunk, *pushed)
            total += self.encoder.pull_tangent(theta, vectors, fixed, moved, chunk.features)
        return total

    def without(self, members: Tensor, *, rescale: bool = False) -> Objective:
        """Objective after the rows in ``members`` have left their batches.

        What remains of a batch keeps its denominator, so the two objectives differ by
        ``(Pos_E + Neg_E) / (TERMS * N)`` for the leaving set ``E``. A batch with fewer than two
        remaining rows has no loss.

        Args:
            members: ``(N,)`` booleans, true for rows that leave.
            rescale: whether the weights of the batches keep their sum, for a mean over the rows
                that remain.
        """
        remaining = [
            (batch[~members[batch]], weight / len(batch))
            for batch, weight in zip(self.batches, self.batch_weights, strict=True)
        ]
        kept = [(rows, len(rows) * weight) for rows, weight in remaining if len(rows) > 1]
        if not kept:
            raise ValueError("No contrastive batch keeps two rows.")
        batches, weights = zip(*kept, strict=True)
        factor = sum(self.batch_weights) / sum(weights) if rescale else 1.0
        return replace(self, batches=batches, weights=[factor * weight for weight in weights])

    def over(self, batches: Sequence[Tensor]) -> Objective:
        """This objective over other contrastive batches of its rows."""
        return replace(self, batches=batches, weights=None)

    def _own_batches(self) -> Objective | None:
        """This process's part of the sum over batches, with all its rows held here; without l2.

        None if more than heads remains of the towers; with several processes, also if there are
        fewer batches than processes, or rows too large to be sent.
        """
        count = distributed.count()
        if len(self.batches) < count or not self.features.are_light():
            return None
        if count == 1:
            return replace(self, l2=0.0)
        if self.features.bytes_per_row() * sum(map(len, self.batches)) > BROUGHT_BYTES * count:
            return None
        share = distributed.share(len(self.batches))
        own = slice(share.start, share.stop)
        batches = self.batches[own]
        rows = torch.cat(list(batches))
        return Objective(
            self.encoder,
            self.features.brought(rows),
            torch.arange(len(rows)).split([len(batch) for batch in batches]),
            None if self.same is None else self.same[rows],
            weights=self.batch_weights[own],
        )

    def _linearise(self, theta: Tensor) -> tuple[list[_Linearised], Objective]:
        """Batches linearised at ``theta``, as many as may be kept; objective of the others."""
        rows = max(map(len, self.batches))
        cells = 3 * rows * self.encoder.dtype.itemsize  # per row: no loss keeps more tables
        embeddings = self.encoder.bytes_per_row(self.features, tangents=1)  # with their graph
        most = KEPT_BYTES // (rows * (self.features.bytes_per_row() + embeddings + cells))
        rest = replace(self, batches=self.batches[most:], weights=self.batch_weights[most:])
        return [self._linearise_batch(theta, n) for n in range(len(self.batches[:most]))], rest

    def _linearise_batch(self, theta: Tensor, number: int) -> _Linearised:
        rows = self.batches[number]
        embeddings = self.encoder.linearise(theta, self.features[rows])
        same = None if self.same is None else self.same[rows].to(self.encoder.device)
        loss = self._loss.linearise(Embeddings(*embeddings.value), same).kept()
        return _Linearised(self.batch_weights[number], embeddings, loss)

    @property
    def batch_weights(self) -> Sequence[float]:
        """Weight of every batch in the mean; they are equal if none were given."""
        if self.weights is None:
            return [1 / len(self.batches)] * len(self.batches)
        return self.weights

    @property
    def _loss(self) -> Contrastive:
        return self.encoder.contrastive

    def _gradient_of(self, chunk: _Chunk, embeddings: Embeddings) -> Embeddings:
        """Gradient of the loss with respect to the embeddings of a chunk."""
        return chunk.join(lambda b: b.near(embeddings, self._loss).gradient(), like=embeddings)

    def _product_of(
        self,
        product: Callable[[LinearisedLoss, Embeddings], Embeddings],
        chunk: _Chunk,
        embeddings: Embeddings,
        tangents: Embeddings,
    ) -> Embeddings:
        """Products of the loss's curvature with tangents of the embeddings of a chunk."""
        return chunk.join(
            lambda b: product(b.near(embeddings, self._loss), b.of(tangents)), like=tangents
        )

    def _from_center(self, theta: Tensor) -> Tensor:
        return theta if self.center is None else theta - self.center

    def _chunks(self, tangents: int) -> Iterator[_Chunk]:
        """Chunks of as many batches as fit in memory; a row is encoded alike in any batch."""
        most = self.encoder.rows_that_fit(self.features, tangents)
        size = max(1, most // max((len(batch) for batch in self.batches), default=1))
        for start in range(0, len(self.batches), size):
            batches = self.batches[start : start + size]
            rows = torch.cat(list(batches))
            yield _Chunk(
                features=self.features[rows],
                sizes=[len(batch) for batch in batches],
                weights=self.batch_weights[start : start + size],
                same=None if self.same is None else self.same[rows].to(self.encoder.device),
            )


@dataclass(frozen=True)
class _Chunk:
    """Contrastive batches that are encoded together.

    Attributes:
        features: their rows, one batch after the other.
        sizes: number of rows of each batch.
        weights: weight of each batch in the objective.
        same: as in `Objective`, for these rows.
    """

    features: Features
    sizes: list[int]
    weights: Sequence[float]
    same: Tensor | None

    def mine(self) -> Iterator[_Batch]:
        """Batches that this process works on: whole ones, or some rows of each if there are few."""
        ends = list(accumulate(self.sizes))
        numbers = range(len(ends)) if self._split else distributed.share(len(ends))
        for number in numbers:
            size = self.sizes[number]
            rows = distributed.share(size) if self._split else None
            if rows is None or rows:
                place = slice(ends[number] - size, ends[number])
                same = None if self.same is None else self.same[place]
                yield _Batch(place, self.weights[number], same, rows)

    def join(self, of_batch: Callable[[_Batch], Embeddings], like: Embeddings) -> Embeddings:
        """Weighted cotangents of all batches, joined over all rows; those of the scale add up.

        Args:
            of_batch: returns the cotangents of a batch.
            like: tensors of the shapes that are returned.
        """
        text, image = torch.zeros_like(like.text), torch.zeros_like(like.image)
        common = torch.zeros_like(torch.stack(like[2:]))
        for batch in self.mine():
            part = of_batch(batch)
            text[..., batch.place, :] = batch.weight * part.text
            image[..., batch.place, :] = batch.weight * part.image
            common += batch.weight * torch.stack(part[2:])
        if self._split:  # every process has terms of every row
            text, image = distributed.add_up(text), distributed.add_up(image)
        else:
            for whole in (text, image):
                distributed.fill_in(whole, self._shares())
        return Embeddings(text, image, *distributed.add_up(common))

    @property
    def _split(self) -> bool:
        """Whether the processes divide the rows of every batch among them."""
        return len(self.sizes) < distributed.count()

    def _shares(self) -> list[int]:
        """Number of rows of each process, if the processes divide whole batches."""
        numbers = (distributed.share(len(self.sizes), n) for n in range(distributed.count()))
        return [sum(self.sizes[n.start : n.stop]) for n in numbers]


@dataclass(frozen=True)
class _Batch:
    """One contrastive batch of a chunk.

    Attributes:
        place: where its rows are in the chunk.
        weight: weight in the objective.
        same: as in `Objective`, for its rows.
        rows: rows of the batch whose terms this process works on; all if None.
    """

    place: slice
    weight: float
    same: Tensor | None
    rows: range | None

    def of(self, embeddings: Embeddings) -> Embeddings:
        """The batch's part of a chunk's embeddings or tangents."""
        text, image = (part[..., self.place, :] for part in embeddings[:2])
        return embeddings._replace(text=text, image=image)

    def near(self, embeddings: Embeddings, loss: Contrastive) -> LinearisedLoss:
        """Loss of the batch, linearised at the embeddings of its chunk."""
        return loss.linearise(self.of(embeddings), self.same, self.rows)


@dataclass(frozen=True)
class _Linearised:
    """A contrastive batch at one ``theta``: all that its products need besides the vectors.

    Attributes:
        weight: weight in the objective.
        embeddings: derivative of the batch's embeddings.
        loss: loss linearised at these embeddings.
    """

    weight: float
    embeddings: Derivative
    loss: LinearisedLoss

    def product(self, kind: Curvature, vectors: Tensor) -> Tensor:
        """The batch's part of a product with the `ggn` or the `hessian`, ``(K, P)``."""
        moved = Embeddings(*self.embeddings.push(vectors))
        if kind == "ggn":
            return self.weight * self.embeddings.pull(self.loss.ggn_product(moved))
        straight = self.embeddings.pull(self.loss.hessian_product(moved))
        return self.weight * (straight + self.embeddings.bend(self.loss.gradient(), vectors))


def random_batches(count: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Random partition of ``count`` rows into contrastive batches of equal size.

    InfoNCE depends on the batch size (``log B``), so the last batch is filled up with rows from
    earlier ones. Every row is in at least one batch; if there are fewer rows than ``batch_size``,
    all are in one batch.
    """
    size = min(batch_size, count)
    order = torch.randperm(count, generator=generator)
    padded = torch.cat([order, order[: -count % size]])
    return list(padded.split(size))
