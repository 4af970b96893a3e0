"""Logits of a contrastive batch in blocks of rows, and their tangents, as all losses use them.

A batch of ``B`` pairs has logits ``S = scale * U V^T + bias``, with texts as rows and images as
columns. A large batch is processed in blocks of rows, so that memory is ``BLOCK * B`` (per tangent,
if tangents of the logits are needed), never ``B * B``.

Shapes: ``r`` rows in a block, ``K`` tangents, embeddings of size ``d``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RoleForm = Literal["exact", "first_order"]
BLOCK = 1024
CELLS = 2**20  # tangents of logits computed at a time, which fit the cache of a core


class Embeddings(NamedTuple):
    """A contrastive batch after the encoders; also its tangents and cotangents.

    Attributes:
        text: ``(B, d)``, unit rows.
        image: ``(B, d)``, unit rows.
        scale: ``()``, the inverse temperature ``exp(logit_scale)``.
        bias: ``()``, added to every logit by the sigmoid loss; InfoNCE ignores it.
    """

    text: Tensor
    image: Tensor
    scale: Tensor
    bias: Tensor = torch.zeros(())


class Roles(NamedTuple):
    """Both roles of every pair, ``(B,)``, or their derivatives along tangents, ``(K, B)``."""

    positive: Tensor
    negative: Tensor


class Direction(NamedTuple):
    """Logits in one direction: a row for each of `anchors`, a column for each of `keys`.

    Also their tangents, with a leading ``K``, and cotangents. The bias is None for a loss that
    normalises rows, since it does not depend on a constant in all logits of a row.
    """

    anchors: Tensor
    keys: Tensor
    scale: Tensor
    bias: Tensor | None = None


# ------------------------------------------------------------------------- a batch and its blocks


def one_way(embeddings: Embeddings) -> Direction:
    """Text to image, with the bias, for a loss in which every cell counts once."""
    text, image, scale, bias = embeddings
    return Direction(text, image, scale, bias.to(text))


def two_ways(embeddings: Embeddings) -> tuple[Direction, Direction]:
    """Text to image and image to text, without the bias, for a loss that normalises both."""
    text, image, scale, _ = embeddings
    return Direction(text, image, scale), Direction(image, text, scale)


def blocks(count: int, rows: range | None = None) -> Iterator[slice]:
    """Slices of at most `BLOCK` rows that cover ``rows``; all of ``count`` rows if absent."""
    rows = range(count) if rows is None else rows
    return (slice(start, min(start + BLOCK, rows.stop)) for start in rows[::BLOCK])


def own_cells(values: Tensor, rows: slice) -> Tensor:
    """View ``(..., r)`` of the cells of ``(..., r, B)`` in which a row meets its own column."""
    return values.diagonal(rows.start, -2, -1)


def own_columns(values: Tensor, rows: slice) -> Tensor:
    """Columns of `own_cells`, ``(r,)``, on the device of ``values``."""
    return torch.arange(rows.start, rows.stop, device=values.device)


def repeated(same: Tensor, rows: slice) -> Tensor:
    """Booleans ``(r, B)``: true for other pairs that agree with the row's in ``same``."""
    alike = agree(same[rows], same)
    own_cells(alike, rows).fill_(False)
    return alike


def agree(first: Tensor, second: Tensor) -> Tensor:
    """Booleans ``(n, m)``: which rows have an equal number in some column.

    Args:
        first: ``(n,)`` or ``(n, L)`` integers.
        second: ``(m,)`` or ``(m, L)``.
    """
    ends = (side[:, None] if side.dim() == 1 else side for side in (first, second))
    columns = zip(*(side.unbind(1) for side in ends), strict=True)
    return reduce(torch.logical_or, (one[:, None] == other for one, other in columns))


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    return reduce(torch.add, tensors)


# ------------------------------------------------------------------------- the logits of a block


def logits(direction: Direction, rows: slice) -> Tensor:
    """``S`` of a block, ``(r, B)``."""
    values = (direction.scale * direction.anchors[rows]) @ direction.keys.T
    return values if direction.bias is None else values + direction.bias


def logits_tangent(direction: Direction, moved: Direction, rows: slice) -> Tensor:
    """``S'`` of a block, ``(K, r, B)``."""
    anchors, scale = direction.anchors[rows], direction.scale
    # The scale goes into the factors, which are smaller than the logits.
    moved_anchors = scale * moved.anchors[:, rows] + moved.scale[:, None, None] * anchors
    by_anchors = moved_anchors @ direction.keys.T
    values = torch.baddbmm(by_anchors, (scale * anchors).expand_as(moved_anchors), moved.keys.mT)
    return values if moved.bias is None else values + moved.bias[..., None, None]


class FactorTangents(NamedTuple):
    """Weighted sums of ``S' = scale (a' b + a b') + scale' a b``, computed from its factors.

    The weights of a sum are equal for all tangents. So the tangents ``a'`` of rows only meet
    averages of ``b``, and one matrix product remains for each tangent: ``a b'``, with a cell for
    every weight. It is computed for `CELLS` cells at a time, which all sums use while in cache.
    """

    direction: Direction
    moved: Direction

    def picked(self, rows: slice, columns: Tensor | slice) -> Tensor:
        """One cell of each row of a block, in the given columns ``(r,)``; ``(K, r)``."""
        anchors, moved_anchors = self.direction.anchors[rows], self.moved.anchors[:, rows]
        keys, moved_keys = self.direction.keys[columns], self.moved.keys[:, columns]
        dot_tangent = _dots(anchors, moved_keys) + _dots(keys, moved_anchors)
        dot = (anchors * keys).sum(dim=1)
        return self._sums(dot_tangent, dot, torch.ones_like(dot))

    def row_sums(self, rows: slice, weights: Tensor) -> Tensor:
        """``sum_j weights_kj S'_kj`` of every row ``k`` of a block.

        Args:
            rows: rows of the block.
            weights: ``(..., r, B)``.

        Returns:
            ``(..., K, r)``.
        """
        anchors, keys = self.direction.anchors[rows], self.direction.keys
        moved_anchors, moved_keys = self.moved.anchors[:, rows], self.moved.keys
        return self._weighted(anchors, keys, moved_anchors, moved_keys, weights)

    def column_sums(self, rows: slice, weights: Tensor) -> Tensor:
        """``sum_k weights_kn S'_kn`` over the rows ``k`` of a block, ``(K, B)``."""
        anchors, keys = self.direction.anchors[rows], self.direction.keys
        moved_anchors, moved_keys = self.moved.anchors[:, rows], self.moved.keys
        return self._weighted(keys, anchors, moved_keys, moved_anchors, weights.mT)

    def _weighted(
        self, own: Tensor, others: Tensor, moved_own: Tensor, moved_others: Tensor, weights: Tensor
    ) -> Tensor:
        """Sums ``(..., K, own)`` over the others, with weights ``(..., own, others)``."""
        flat = weights.reshape(-1, *weights.shape[-2:]).movedim(0, 1)  # (own, sums, others)
        mixed = flat @ others  # (own, sums, d)
        dot_tangent = mixed @ moved_own.permute(1, 2, 0) + _cell_sums(own, moved_others, flat)
        dot = (mixed @ own[..., None])[..., 0]
        sums = self._sums(dot_tangent.permute(1, 2, 0), dot.T, flat.sum(dim=2).T)
        return sums.reshape(*weights.shape[:-2], *sums.shape[-2:])

    def _sums(self, dot_tangent: Tensor, dot: Tensor, weight: Tensor) -> Tensor:
        """Tangents ``(..., K, r)`` of ``scale * dot + weight * bias``, from those of the dot."""
        moved_scale, moved_bias = self.moved.scale[:, None], self.moved.bias
        sums = self.direction.scale * dot_tangent + moved_scale * dot[..., None, :]
        if moved_bias is None:
            return sums
        return sums + moved_bias[..., None] * weight[..., None, :]


def _dots(fixed: Tensor, moved: Tensor) -> Tensor:
    """Inner products ``(K, r)`` of ``(r, d)`` and ``(K, r, d)``."""
    return (moved.transpose(0, 1) @ fixed[..., None])[..., 0].T


def _cell_sums(own: Tensor, moved_others: Tensor, weights: Tensor) -> Tensor:
    """``sum_j weights_imj own_i . moved_kj``, ``(i, m, k)``, some cells ``(i, k, j)`` at a time."""
    size = max(1, CELLS // (len(own) * moved_others.shape[1]))
    parts = []
    for some in moved_others.split(size):
        cells = own @ some.reshape(-1, some.shape[2]).T
        parts.append(weights @ cells.view(len(own), *some.shape[:2]).mT)
    return torch.cat(parts, dim=2)
