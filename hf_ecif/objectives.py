"""InfoNCE on a contrastive batch: loss, derivatives, and the two roles of a pair.

Pure tensor functions of normalised embeddings; nothing here knows of models or data.

A contrastive batch of ``B`` pairs has logits ``S = scale * U V^T``, rows texts and columns images.
The loss treats both directions alike: it is the mean of two classification losses, *text to image*
(softmax ``p`` over the rows of ``S``) and *image to text* (softmax ``q`` over its columns). So
every function below is written once, for one direction, and summed over the two. A direction is
walked in blocks of rows, so that memory is ``block * B``, never ``B * B``.

Pair ``n`` acts in two roles (Hu et al., ECIF, arXiv 2411.11667):

- positive: ``Pos_n = -log p_nn - log q_nn``, its own two cross-entropy terms;
- negative: what its presence adds to the terms of all other pairs,
  ``Neg_n = -sum_{k != n} [log(1 - p_kn) + log(1 - q_nk)]``, exact for a deletion, or
  ``sum_{k != n} [p_kn + q_nk]``, the paper's first-order expansion of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RoleForm = Literal["exact", "first_order"]
BLOCK = 1024


class Embeddings(NamedTuple):
    """A contrastive batch after the encoders; also a tangent or a cotangent of one.

    Attributes:
        text: ``(B, d)``, unit rows.
        image: ``(B, d)``, unit rows.
        scale: ``()``, the inverse temperature ``exp(logit_scale)``.
    """

    text: Tensor
    image: Tensor
    scale: Tensor


class Roles(NamedTuple):
    """Both roles of every pair, or their derivatives along a tangent; each ``(B,)``."""

    positive: Tensor
    negative: Tensor


def loss(embeddings: Embeddings, same: Tensor | None = None) -> Tensor:
    """``L = (1/2B) sum_n Pos_n``, what ``CLIPModel(..., return_loss=True)`` returns; scalar.

    Args:
        embeddings: the batch.
        same: ``(B,)`` integers; pairs with equal numbers (repeated captions, say) are not taken as
            negatives of each other.
    """
    return roles(embeddings, same=same).positive.mean() / 2


def loss_gradient(embeddings: Embeddings, same: Tensor | None = None) -> Embeddings:
    """Gradient of :func:`loss` with respect to the embeddings and the scale."""
    count = len(embeddings.text)
    parts = []
    for direction in _directions(embeddings):
        blocks = []
        for rows in _blocks(count):
            cotangent = _logits(direction, rows, same).softmax(dim=1)
            cotangent = cotangent - _diagonal(rows, count, cotangent)
            blocks.append(_pull_logits(direction, rows, cotangent / (2 * count)))
        parts.append(_gather(blocks))
    return _combine(*parts)


def ggn_product(
    embeddings: Embeddings, tangents: Embeddings, same: Tensor | None = None
) -> Embeddings:
    """Generalised Gauss-Newton product ``J_S^T (d2L/dS2) J_S e'`` at the embeddings.

    ``d2L/dS2`` is the softmax Fisher of the rows plus that of the columns, over ``2B``. The result
    is a cotangent: pull it back through the encoders to get the product in parameter space.

    Args:
        embeddings: the batch.
        tangents: any number of them, with a common leading dimension: ``(K, B, d)`` and ``(K,)``.
        same: as in :func:`loss`.

    Returns:
        Cotangents of the shape of ``tangents``.
    """
    count = len(embeddings.text)
    parts = []
    for direction, moved in zip(_directions(embeddings), _directions(tangents), strict=True):
        blocks = []
        for rows in _blocks(count):
            weights = _logits(direction, rows, same).softmax(dim=1)
            logits_tangent = _logits_tangent(direction, moved, rows)
            mean = (weights * logits_tangent).sum(dim=-1, keepdim=True)
            cotangent = weights * (logits_tangent - mean) / (2 * count)
            blocks.append(_pull_logits(direction, rows, cotangent))
        parts.append(_gather(blocks))
    return _combine(*parts)


def roles(embeddings: Embeddings, *, form: RoleForm = "exact", same: Tensor | None = None) -> Roles:
    """Values of the two roles of every pair, in nats, unnormalised.

    Deleting pair ``n`` from the batch changes ``2 B L`` by exactly ``-(Pos_n + Neg_n)`` when
    ``form`` is ``"exact"`` and the mean keeps its denominator.
    """
    count = len(embeddings.text)
    positive, negative = [], []
    for direction in _directions(embeddings):
        own = []
        for rows in _blocks(count):
            row = _Row.of(_logits(direction, rows, same))
            diagonal = _diagonal(rows, count, row.logits).bool()
            own.append(row.total[:, 0] - row.logits[diagonal])
            if form == "exact":
                gain = torch.where(row.is_top, row.total - row.rest_total, -(-row.p).log1p())
            else:
                gain = row.p
            negative.append(gain.masked_fill(diagonal, 0).sum(dim=0))
        positive.append(torch.cat(own))
    return Roles(_sum(positive), _sum(negative))


def role_tangents(
    embeddings: Embeddings,
    tangents: Embeddings,
    *,
    form: RoleForm = "exact",
    same: Tensor | None = None,
) -> Roles:
    """Directional derivatives ``d Pos_n`` and ``d Neg_n`` along each tangent; ``(K, B)``.

    With a tangent the push-forward of ``s = H^-1 grad F``, their sum over ``2N`` is the predicted
    change of the query ``F`` when pair ``n`` is removed.

    With ``S'`` the tangent of the logits and ``m_k`` its mean under row ``k``'s softmax,
    ``d p_kn = p_kn (S'_kn - m_k)``. The exact form divides by ``1 - p_kn``, which loses all digits
    for the largest entry of a row; there ``p_kn (S'_kn - m_k,-n)``, the mean taken without column
    ``n``, is the same number and never blows up. Either way the derivatives are averages of ``S'``
    with weights that no tangent changes, so ``S'`` itself, ``(K, B, B)``, is never built.

    Args:
        embeddings: the batch.
        tangents: with a common leading dimension: ``(K, B, d)`` and ``(K,)``.
        form: of the negative role.
        same: as in :func:`loss`.
    """
    count = len(embeddings.text)
    positive, negative = [], []
    for direction, moved in zip(_directions(embeddings), _directions(tangents), strict=True):
        own = []
        for rows in _blocks(count):
            row = _Row.of(_logits(direction, rows, same))
            diagonal = _diagonal(rows, count, row.logits)
            mean = _row_means(direction, moved, rows, row.p)
            own.append(mean - _row_means(direction, moved, rows, diagonal))
            others = row.p * (1 - diagonal)
            if form == "exact":
                top = others * row.is_top
                # Where p exceeds one half the entry is the largest, so this never divides by zero.
                rest = (others - top) / torch.where(row.is_top, 1.0, 1 - row.p)
                rest_mean = _row_means(direction, moved, rows, row.rest_p)
                averages = mean @ rest + rest_mean @ top
                weights = rest + top
            else:
                averages, weights = mean @ others, others
            negative.append(_column_sums(direction, moved, rows, weights) - averages)
        positive.append(torch.cat(own, dim=-1))
    return Roles(_sum(positive), _sum(negative))


def group_roles(
    embeddings: Embeddings, members: Tensor, same: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(Pos_E, Neg_E)`` of a set of pairs that leave the batch together; scalars, in nats.

    The members lose their own terms, so the negative role runs over the others alone:
    ``Neg_E = -sum_{k not in E} [log(1 - sum_{n in E} p_kn) + log(1 - sum_{n in E} q_nk)]``. The sum
    of single-pair roles is only its first-order approximation.

    Args:
        embeddings: the batch.
        members: ``(B,)`` booleans, true for pairs in ``E``; at least one pair must stay.
        same: as in :func:`loss`.
    """
    count = len(embeddings.text)
    positive, negative = [], []
    for direction in _directions(embeddings):
        for rows in _blocks(count):
            logits = _logits(direction, rows, same)
            total = logits.logsumexp(dim=1)
            own = logits[_diagonal(rows, count, logits).bool()]
            without = logits.masked_fill(members, -torch.inf).logsumexp(dim=1)
            inside = members[rows]
            positive.append(torch.where(inside, total - own, 0).sum())
            negative.append(torch.where(inside, 0, total - without).sum())
    return _sum(positive), _sum(negative)


# ------------------------------------------------------------- one direction, a block of rows


class _Direction(NamedTuple):
    """One of the two classifications: each row of `anchors` picks among the rows of `keys`."""

    anchors: Tensor
    keys: Tensor
    scale: Tensor


class _Row(NamedTuple):
    """Softmax of a block of rows, with the largest entry of each row set apart.

    Only the largest entry can exceed one half, so only there does ``1 - p`` lose digits.
    """

    logits: Tensor
    total: Tensor  # (r, 1) logsumexp
    p: Tensor
    is_top: Tensor
    rest_total: Tensor  # (r, 1) logsumexp without the largest entry
    rest_p: Tensor  # softmax without the largest entry

    @classmethod
    def of(cls, logits: Tensor) -> _Row:
        total = logits.logsumexp(dim=1, keepdim=True)
        top = logits.argmax(dim=1, keepdim=True)
        is_top = torch.zeros_like(logits).scatter(1, top, 1.0).bool()
        rest = logits.masked_fill(is_top, -torch.inf)
        rest_total = rest.logsumexp(dim=1, keepdim=True)
        # A row whose other entries are all masked has no rest; its softmax there is zero, not NaN.
        rest_p = (rest - rest_total).exp().nan_to_num(0.0)
        return cls(
            logits=logits,
            total=total,
            p=(logits - total).exp(),
            is_top=is_top,
            rest_total=rest_total,
            rest_p=rest_p,
        )


def _directions(embeddings: Embeddings) -> tuple[_Direction, _Direction]:
    text, image, scale = embeddings
    return _Direction(text, image, scale), _Direction(image, text, scale)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _logits(direction: _Direction, rows: slice, same: Tensor | None) -> Tensor:
    logits = direction.scale * direction.anchors[rows] @ direction.keys.T
    if same is None:
        return logits
    repeated = same[rows, None] == same[None, :]
    diagonal = _diagonal(rows, len(direction.keys), logits).bool()
    return logits.masked_fill(repeated & ~diagonal, -torch.inf)


def _logits_tangent(direction: _Direction, moved: _Direction, rows: slice) -> Tensor:
    """``S'`` of a block, ``(K, r, B)``."""
    anchors, keys, scale = direction
    cosine_tangent = moved.anchors[..., rows, :] @ keys.T + (moved.keys @ anchors[rows].T).mT
    return scale * cosine_tangent + moved.scale[..., None, None] * (anchors[rows] @ keys.T)


def _row_means(direction: _Direction, moved: _Direction, rows: slice, weights: Tensor) -> Tensor:
    """``sum_j weights_kj S'_kj`` of every row of a block, ``(K, r)``."""
    anchors, keys, scale = direction
    mixed, mixed_moved = weights @ keys, _mix(weights, moved.keys)
    cosine_tangent = (moved.anchors[..., rows, :] * mixed + anchors[rows] * mixed_moved).sum(dim=-1)
    return scale * cosine_tangent + moved.scale[..., None] * (anchors[rows] * mixed).sum(dim=-1)


def _column_sums(direction: _Direction, moved: _Direction, rows: slice, weights: Tensor) -> Tensor:
    """``sum_k weights_kn S'_kn`` over the rows of a block, ``(K, B)``."""
    anchors, keys, scale = direction
    mixed, mixed_moved = weights.T @ anchors[rows], _mix(weights.T, moved.anchors[..., rows, :])
    cosine_tangent = (mixed_moved * keys + mixed * moved.keys).sum(dim=-1)
    return scale * cosine_tangent + moved.scale[..., None] * (mixed * keys).sum(dim=-1)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` for every leading index of ``(K, B, d)``, as one matrix product."""
    columns = values.movedim(-2, 0)
    mixed = weights @ columns.reshape(len(columns), -1)
    return mixed.view(len(weights), *columns.shape[1:]).movedim(0, -2)


def _diagonal(rows: slice, count: int, like: Tensor) -> Tensor:
    """Ones where a row of the block meets its own column; ``(r, B)``."""
    column = torch.arange(count, device=like.device)
    return (column[rows, None] == column[None, :]).to(like.dtype)


def _pull_logits(
    direction: _Direction, rows: slice, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A cotangent of the block's logits as cotangents of its anchors, of all keys and the scale."""
    anchors, keys, scale = direction
    through_keys = cotangent @ keys
    return (
        scale * through_keys,
        scale * cotangent.mT @ anchors[rows],
        (through_keys * anchors[rows]).sum(dim=(-2, -1)),
    )


def _gather(blocks: list[tuple[Tensor, Tensor, Tensor]]) -> _Direction:
    anchors, keys, scales = zip(*blocks, strict=True)
    return _Direction(torch.cat(anchors, dim=-2), _sum(keys), _sum(scales))


def _combine(to_image: _Direction, to_text: _Direction) -> Embeddings:
    return Embeddings(
        text=to_image.anchors + to_text.keys,
        image=to_image.keys + to_text.anchors,
        scale=to_image.scale + to_text.scale,
    )


def _sum(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)
