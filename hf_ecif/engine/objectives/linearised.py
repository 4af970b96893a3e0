"""A contrastive loss linearised at one batch: gradient, and products of curvature and tangents.

Besides the tangents, a product needs derivatives with respect to the logits, which do not depend on
the tangents. They are ``B x B`` tables for a batch of ``B`` pairs, so they are computed block by
block and dropped. For many products at one batch they can be kept.

Shapes: ``r`` rows in a block, ``K`` tangents, embeddings of size ``d``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_ecif.engine.objectives.similarity import Direction, Embeddings, blocks, logits_tangent


class Derivatives(NamedTuple):
    """First two derivatives of a loss with respect to a block of logits.

    Attributes:
        cotangent: returns ``dL/dS``, ``(r, B)``.
        curvature: maps logits tangents ``S'`` to ``(d2L/dS2) S'``, both ``(K, r, B)``.
    """

    cotangent: Callable[[], Tensor]
    curvature: Callable[[Tensor], Tensor]


Reading = Callable[[Embeddings], Sequence[Direction]]
Part = tuple[slice, Derivatives]


@dataclass(frozen=True)
class LinearisedLoss:
    """First two derivatives of a loss at a batch, as cotangents with the batch's shapes.

    Attributes:
        embeddings: the batch.
        read: directions over which the loss is summed, text to image first.
        derivatives: maps the number of a direction to its blocks, with the derivatives there.
        rows: pairs whose terms are counted; all if absent.
    """

    embeddings: Embeddings
    read: Reading
    derivatives: Callable[[int], Iterable[Part]]
    rows: range | None = None

    def gradient(self) -> Embeddings:
        """Gradient of the loss with respect to text, image, scale and bias."""
        return self._add_up(
            lambda number, block, at: _pull(self._ways[number], block, at.cotangent())
        )

    def ggn_product(self, tangents: Embeddings) -> Embeddings:
        """Generalised Gauss-Newton product ``J_S^T (d2L/dS2) J_S e'`` for every tangent ``e'``.

        Positive semi-definite. The result is a cotangent, which becomes the product in parameter
        space when it is pulled back through the encoders.
        """
        moved = self.read(tangents)

        def of_block(number: int, block: slice, at: Derivatives) -> Direction:
            way = self._ways[number]
            return _pull(way, block, at.curvature(logits_tangent(way, moved[number], block)))

        return self._add_up(of_block)

    def hessian_product(self, tangents: Embeddings) -> Embeddings:
        """Derivative of `gradient` along every tangent: the full Hessian at the embeddings.

        Since logits are bilinear in the embeddings, it is `ggn_product` plus the change of
        ``J_S^T`` with ``dL/dS`` held fixed.
        """
        moved = self.read(tangents)

        def of_block(number: int, block: slice, at: Derivatives) -> Direction:
            way, moved_way = self._ways[number], moved[number]
            straight = _pull(way, block, at.curvature(logits_tangent(way, moved_way, block)))
            return _add(straight, _pull_tangent(way, moved_way, block, at.cotangent()))

        return self._add_up(of_block)

    def kept(self) -> LinearisedLoss:
        """This loss with its derivatives computed now and kept, for many products."""
        made = [[*self.derivatives(number)] for number in range(len(self._ways))]
        return replace(self, derivatives=made.__getitem__)

    @property
    def _ways(self) -> Sequence[Direction]:
        return self.read(self.embeddings)

    def _add_up(self, of_block: Callable[[int, slice, Derivatives], Direction]) -> Embeddings:
        """Cotangents of all blocks and directions, added up to one of the batch."""
        ways = []
        for number in range(len(self._ways)):
            parts = (of_block(number, block, at) for block, at in self.derivatives(number))
            ways.append(_gather(parts, len(self.embeddings.text), self.rows))
        return _merge(ways)


def linearise(
    embeddings: Embeddings,
    read: Reading,
    differentiate: Callable[[Direction, slice], Derivatives],
    rows: range | None = None,
) -> LinearisedLoss:
    """Loss at a batch, from its derivatives with respect to a block of a direction's logits."""
    ways, count = read(embeddings), len(embeddings.text)

    def derivatives(number: int) -> Iterable[Part]:
        return ((block, differentiate(ways[number], block)) for block in blocks(count, rows))

    return LinearisedLoss(embeddings, read, derivatives, rows)


# ------------------------------------------------------------------------------------- pulling


def _pull(direction: Direction, rows: slice, cotangent: Tensor) -> Direction:
    """Cotangent of the block's anchors and of all keys, from one of its logits, ``(..., r, B)``."""
    anchors, through_keys = direction.anchors[rows], cotangent @ direction.keys
    return Direction(
        direction.scale * through_keys,
        direction.scale * (cotangent.mT @ anchors),
        (through_keys * anchors).sum(dim=(-2, -1)),
        None if direction.bias is None else cotangent.sum(dim=(-2, -1)),
    )


def _pull_tangent(
    direction: Direction, moved: Direction, rows: slice, cotangent: Tensor
) -> Direction:
    """Derivative of `_pull` along each tangent, with the cotangent ``(r, B)`` held fixed."""
    anchors, moved_anchors = direction.anchors[rows], moved.anchors[:, rows]
    through_keys, moved_through_keys = cotangent @ direction.keys, _mix(cotangent, moved.keys)
    moved_scale = moved.scale[:, None, None]
    return Direction(
        direction.scale * moved_through_keys + moved_scale * through_keys,
        direction.scale * _mix(cotangent.T, moved_anchors) + moved_scale * (cotangent.T @ anchors),
        (through_keys * moved_anchors + moved_through_keys * anchors).sum(dim=(-2, -1)),
        None if direction.bias is None else torch.zeros_like(moved.scale),
    )


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` for values ``(K, B, d)``, as one matrix product."""
    columns = values.movedim(-2, 0)
    mixed = weights @ columns.reshape(len(columns), -1)
    return mixed.view(len(weights), *columns.shape[1:]).movedim(0, -2)


def _gather(parts: Iterable[Direction], count: int, rows: range | None) -> Direction:
    """Cotangents of blocks, joined: anchors follow one another, everything else adds up.

    Of ``count`` anchors in all, those outside ``rows`` get zero.
    """
    anchors: list[Tensor] = []
    shared: Direction | None = None
    for part in parts:
        anchors.append(part.anchors)
        # Added up at once: kept until the end, cotangents of keys would take more than the batch.
        rest = part._replace(anchors=torch.zeros_like(part.scale))
        shared = rest if shared is None else _add(shared, rest)
    assert shared is not None
    joined = anchors[0] if len(anchors) == 1 else torch.cat(anchors, dim=-2)
    if rows is not None:
        joined = pad(joined, (0, 0, rows.start, count - rows.stop))
    return shared._replace(anchors=joined)


def _add(one: Direction, other: Direction) -> Direction:
    bias = None if one.bias is None or other.bias is None else one.bias + other.bias
    return Direction(
        one.anchors + other.anchors, one.keys + other.keys, one.scale + other.scale, bias
    )


def _merge(ways: Sequence[Direction]) -> Embeddings:
    """Cotangent of the batch, from text to image and, if given, image to text; zero for no bias."""
    text, image, scale, bias = ways[0]
    for back in ways[1:]:
        text, image, scale = text + back.keys, image + back.anchors, scale + back.scale
    return Embeddings(text, image, scale, torch.zeros_like(scale) if bias is None else bias)
