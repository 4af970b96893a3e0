"""InfoNCE, the loss of CLIP: ``L = (1/2B) sum_n [-log p_nn - log q_nn]``.

The loss is the mean of two classification losses, *text to image* (softmax ``p`` over the rows of
``S``) and *image to text* (softmax ``q`` over its columns). So every function below is written for
one direction and summed over both. The bias of a batch shifts all logits alike, which leaves a
softmax unchanged: it is ignored, and its cotangents are zero.

Pair ``n`` acts in two roles (Hu et al., ECIF, arXiv 2411.11667):

- positive: ``Pos_n = -log p_nn - log q_nn``, its own two cross-entropy terms;
- negative: what its presence adds to the terms of all other pairs,
  ``Neg_n = -sum_{k != n} [log(1 - p_kn) + log(1 - q_nk)]``, exact for a deletion, or
  ``sum_{k != n} [p_kn + q_nk]``, the paper's first-order expansion of it.

The functions implement `hf_ecif.engine.objectives.Contrastive`, which states their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ecif.engine.objectives import joining, linearised, similarity
from hf_ecif.engine.objectives.linearised import Derivatives, LinearisedLoss
from hf_ecif.engine.objectives.similarity import (
    Direction,
    Embeddings,
    FactorTangents,
    RoleForm,
    Roles,
)

TERMS = 2
FULL_LENGTH = False
joining_tangents = joining.join_softmax
joining_losses = joining.softmax_losses


def loss(embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None) -> Tensor:
    """``L``, as ``CLIPModel(..., return_loss=True)`` returns it; scalar, in nats."""
    return pair_losses(embeddings, same, rows).sum() / (TERMS * len(embeddings.text))


def pair_losses(
    embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
) -> Tensor:
    """``Pos_n``: the two terms of every pair, ``(B,)``, or of those in ``rows``."""
    ways = []
    for direction in similarity.two_ways(embeddings):
        own = []
        for block in similarity.blocks(len(embeddings.text), rows):
            logits = _logits(direction, block, same)
            own.append(logits.logsumexp(dim=1) - similarity.own_cells(logits, block))
        ways.append(torch.cat(own))
    return similarity.total(ways)


def linearise(
    embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
) -> LinearisedLoss:
    """`loss` linearised at a batch; ``d2L/dS2`` is the Fisher matrix of each softmax."""
    if rows is None and len(embeddings.text) <= similarity.BLOCK:
        joint = partial(_joint_derivatives, same=same)
        return linearised.linearise(embeddings, _first_way, joint)
    single = partial(_derivatives, same=same)
    return linearised.linearise(embeddings, similarity.two_ways, single, rows)


def roles(embeddings: Embeddings, *, form: RoleForm = "exact", same: Tensor | None = None) -> Roles:
    """Both roles of every pair.

    Deleting pair ``n`` from the batch changes ``2 B L`` by exactly ``-(Pos_n + Neg_n)`` when
    ``form`` is ``"exact"`` and the mean keeps its denominator.
    """
    positive, negative = [], []
    for direction in similarity.two_ways(embeddings):
        own = []
        for rows in similarity.blocks(len(embeddings.text)):
            row = _Row.of(_logits(direction, rows, same))
            own.append(row.total[:, 0] - similarity.own_cells(row.logits, rows))
            gain = row.p if form == "first_order" else _gain(row.p, row.total - row.rest_total)
            negative.append(_without_own(gain, rows).sum(dim=0))
        positive.append(torch.cat(own))
    return Roles(similarity.total(positive), similarity.total(negative))


def role_tangents(
    embeddings: Embeddings,
    tangents: Embeddings,
    *,
    form: RoleForm = "exact",
    same: Tensor | None = None,
) -> Roles:
    """Directional derivatives of `roles` along every tangent.

    With ``S'`` the tangent of the logits and ``m_k`` its mean under row ``k``'s softmax,
    ``d p_kn = p_kn (S'_kn - m_k)``. The exact form divides by ``1 - p_kn``, which loses all digits
    for ``p_kn`` near one; there the equal ``p_kn (S'_kn - m_k,-n)``, with the mean over all columns
    but ``n``, is used, which stays bounded. Either way the derivatives are sums of ``S'`` with
    weights that do not depend on the tangent: see
    `hf_ecif.engine.objectives.similarity.FactorTangents`.
    """
    ways, moved = similarity.two_ways(embeddings), similarity.two_ways(tangents)
    positive, in_row, in_column = [], [], []
    for way, moved_way, back in zip(ways, moved, reversed(ways), strict=True):
        pushed, back_total = FactorTangents(way, moved_way), _totals(back, same)
        parts = [
            _role_tangents(pushed, back_total, rows, form, same)
            for rows in similarity.blocks(len(embeddings.text))
        ]
        positive.append(torch.cat([part[0] for part in parts], dim=-1))
        in_row.append(torch.cat([part[1] for part in parts], dim=-1))
        in_column.append(similarity.total(part[2] for part in parts))
    return Roles(similarity.total(positive), similarity.total(in_row + in_column))


def partner_tangents(
    embeddings: Embeddings,
    tangents: Embeddings,
    pairs: Tensor,
    *,
    form: RoleForm = "exact",
    same: Tensor | None = None,
) -> Tensor:
    """Derivatives of the negative role of some pairs by partner, ``(K, B, n)``.

    For partner ``k`` of pair ``n`` it is ``d p_kn / (1 - p_kn) + d q_nk / (1 - q_nk)``, without the
    denominators in the first-order form.
    """
    ways = zip(similarity.two_ways(embeddings), similarity.two_ways(tangents), strict=True)
    return similarity.total(
        torch.cat(
            [
                _partner_tangents(direction, moved, rows, pairs, form, same)
                for rows in similarity.blocks(len(embeddings.text))
            ],
            dim=1,
        )
        for direction, moved in ways
    )


def group_roles(
    embeddings: Embeddings, members: Tensor, same: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(Pos_E, Neg_E)`` of a set ``E`` of pairs that leave the batch together.

    The members lose their own terms, so the negative role is a sum over the others only:
    ``Neg_E = -sum_{k not in E} [log(1 - sum_{n in E} p_kn) + log(1 - sum_{n in E} q_nk)]``, zero if
    no pair stays. The sum of single-pair roles is its first-order approximation.
    """
    positive, negative = [], []
    for direction in similarity.two_ways(embeddings):
        for rows in similarity.blocks(len(embeddings.text)):
            row = _GroupRow.of(_logits(direction, rows, same), members)
            own = row.total[:, 0] - similarity.own_cells(row.logits, rows)
            gain = _gain(row.share, row.total - row.rest_total)[:, 0]
            positive.append(torch.where(members[rows], own, 0).sum())
            negative.append(torch.where(members[rows], 0, gain).sum())
    return similarity.total(positive), similarity.total(negative)


def group_role_tangents(
    embeddings: Embeddings, tangents: Embeddings, members: Tensor, same: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Directional derivatives of `group_roles` along every tangent.

    As in `role_tangents`, both are weighted sums of ``S'``. A member's term changes by the mean
    under its softmax minus its own cell; another pair's term by the mean with the group minus the
    mean without it. So one table of weights serves both kinds of rows.
    """
    positive, negative = [], []
    ways = zip(similarity.two_ways(embeddings), similarity.two_ways(tangents), strict=True)
    for direction, moved in ways:
        for rows in similarity.blocks(len(embeddings.text)):
            row = _GroupRow.of(_logits(direction, rows, same), members)
            own = row.p.clone()
            similarity.own_cells(own, rows).sub_(1)
            # p minus the softmax without the group, free of cancellation.
            others = torch.where(members, row.p, -row.share * row.rest_p)
            weights = torch.where(members[rows, None], own, others)
            change = FactorTangents(direction, moved).row_sums(rows, weights)
            positive.append((change * members[rows]).sum(dim=-1))
            negative.append((change * ~members[rows]).sum(dim=-1))
    return similarity.total(positive), similarity.total(negative)


def leaving_curvature(
    embeddings: Embeddings, tangents: Embeddings, same: Tensor | None = None
) -> Tensor:
    """Gauss-Newton curvature of ``2 B L`` that leaves with each pair.

    A pair takes the Fisher matrices of its own two softmaxes with it. It also changes the others:
    that of row ``k`` is ``F(p) = (1 - a) F(r) + a (1 - a) d d^T``, with ``a = p_kn``, ``r`` the
    softmax without ``n``, and ``d = e_n - r``. The difference ``F(p) - F(r)`` is indefinite: some
    of the curvature was the pair's, but the other columns gain weight.
    """
    rows = slice(0, len(embeddings.text))
    directions, moved = similarity.two_ways(embeddings), similarity.two_ways(tangents)[0]
    values = similarity.logits_tangent(directions[0], moved, rows)
    return similarity.total(
        _leaving_curvature(_logits(direction, rows, same), pushed)
        for direction, pushed in zip(directions, (values, values.mT), strict=True)
    )


# ------------------------------------------------------------- one direction, a block of rows


class _Row(NamedTuple):
    """Softmax of a block of rows, with the largest entry of each row kept separately.

    Only the largest entry can exceed one half, so ``1 - p`` loses digits only there.
    """

    logits: Tensor
    total: Tensor  # (r, 1) logsumexp
    p: Tensor
    top: Tensor  # (r, 1) column of the largest entry
    rest_total: Tensor  # (r, 1) logsumexp without the largest entry
    rest_p: Tensor  # softmax without the largest entry

    @classmethod
    def of(cls, logits: Tensor) -> _Row:
        total = logits.logsumexp(dim=1, keepdim=True)
        top = logits.argmax(dim=1, keepdim=True)
        rest = logits.scatter(1, top, -torch.inf)
        rest_total, rest_p = _softmax(rest)
        return cls(logits, total, (logits - total).exp(), top, rest_total, rest_p)

    def minus_own(self, rows: slice) -> Tensor:
        """``p``, minus one in the pair's own cell, precise also if ``p`` is near one there."""
        weights = self.p.clone()
        own = similarity.own_cells(weights, rows)
        is_top = self.top[:, 0] == similarity.own_columns(self.top, rows)
        own.copy_(torch.where(is_top, -(self.rest_total - self.total).exp()[:, 0], own - 1))
        return weights


class _GroupRow(NamedTuple):
    """Softmax of a block of rows, with and without the members of a group."""

    logits: Tensor
    total: Tensor  # (r, 1) logsumexp
    p: Tensor
    share: Tensor  # (r, 1) probability of all members
    rest_total: Tensor  # (r, 1) logsumexp without the members
    rest_p: Tensor  # softmax without the members

    @classmethod
    def of(cls, logits: Tensor, members: Tensor) -> _GroupRow:
        total, p = _softmax(logits)
        rest_total, rest_p = _softmax(logits.masked_fill(members, -torch.inf))
        share = (p * members).sum(dim=1, keepdim=True)
        return cls(logits, total, p, share, rest_total, rest_p)


class _Means(NamedTuple):
    """Averages of ``S'`` over the rows of a block, ``(K, r)``."""

    all: Tensor  # under the softmax
    rest: Tensor  # under the softmax without the row's largest entry
    minus_own: Tensor  # `all` minus the pair's own cell: the derivative of its own term


def _means(
    row: _Row, moved: FactorTangents, rows: slice, further: Tensor | None = None
) -> tuple[_Means, Tensor]:
    """Averages of a block, and sums ``(m, K, r)`` with further weights ``(m, r, B)``."""
    weights = torch.stack([row.minus_own(rows), row.rest_p])
    sums = moved.row_sums(rows, weights if further is None else torch.cat([weights, further]))
    own = moved.picked(rows, rows)
    return _Means(all=sums[0] + own, rest=sums[1], minus_own=sums[0]), sums[2:]


def _role_tangents(
    moved: FactorTangents,
    back_total: Tensor,
    rows: slice,
    form: RoleForm,
    same: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives in one direction and a block: of the positive role and two parts of the negative.

    ``(K, r)``, ``(K, r)`` and ``(K, B)``. The second belongs to the other direction, whose softmax
    has the logsumexps ``back_total``: its weighted sums over a column are sums over a row here.
    """
    row = _Row.of(_logits(moved.direction, rows, same))
    rest, top = _negative_weights(row.p, rows, form)
    back = torch.add(*_negative_weights((row.logits - back_total).exp(), rows, form))
    means, (gained,) = _means(row, moved, rows, back[None])
    return means.minus_own, gained, -(means.all @ rest + means.rest @ top)


def _negative_weights(p: Tensor, rows: slice, form: RoleForm) -> tuple[Tensor, Tensor]:
    """Weights of ``d p_kn`` in ``d Neg_n``, ``(r, B)``: in general, and for large ``p_kn``."""
    others = _without_own(p, rows)
    if form == "first_order":
        return others, torch.zeros_like(others)
    # Only the largest entry of a row can exceed one half, the one that `_Means.rest` leaves out.
    large = p > 0.5
    return torch.where(large, 0, others / (1 - p)), others * large


def _totals(direction: Direction, same: Tensor | None) -> Tensor:
    """Logsumexp of every row, ``(B,)``."""
    return torch.cat(
        [
            _logits(direction, rows, same).logsumexp(dim=1)
            for rows in similarity.blocks(len(direction.anchors))
        ]
    )


def _partner_tangents(
    direction: Direction,
    moved: Direction,
    rows: slice,
    pairs: Tensor,
    form: RoleForm,
    same: Tensor | None,
) -> Tensor:
    """Derivatives in one direction for the partners of a block, ``(K, r, n)``."""
    row = _Row.of(_logits(direction, rows, same))
    means, _ = _means(row, FactorTangents(direction, moved), rows)
    columns = direction._replace(keys=direction.keys[pairs])
    change = similarity.logits_tangent(columns, moved._replace(keys=moved.keys[:, pairs]), rows)
    p, all_mean, rest_mean = row.p[:, pairs], means.all[..., None], means.rest[..., None]
    own = similarity.own_columns(pairs, rows)[:, None] == pairs
    if form == "first_order":
        return torch.where(own, 0, p * (change - all_mean))
    # Only the largest entry of a row can exceed one half, the one that `rest_mean` leaves out.
    small = p / (1 - p).clamp_min(0.5) * (change - all_mean)
    return torch.where(own, 0, torch.where(p > 0.5, p * (change - rest_mean), small))


def _leaving_curvature(logits: Tensor, values: Tensor) -> Tensor:
    """Leaving curvature in one direction, ``(B, K, K)``, from logits tangents ``(K, B, B)``."""
    row, count = _Row.of(logits), len(logits)
    moved = values.permute(1, 2, 0)  # (B, B, K)
    here = torch.arange(count, device=logits.device)
    top = row.top[:, 0]
    top_mass = row.p.gather(1, row.top)
    rest_mass = (row.rest_total - row.total).exp()
    rest_mean = (row.rest_p[:, None] @ moved)[:, 0]
    step = moved[here, top] - rest_mean
    rest = _weighted_squares(row.rest_p, moved - rest_mean[:, None])
    apart = (top_mass * rest_mass * step)[:, :, None] * step[:, None]
    fisher = rest_mass[..., None] * rest + apart

    # Computed from F(p) alone, F(p) - F(r) loses digits where p_kn is near one. Only the largest
    # entry of a row can exceed one half; it is computed separately.
    left = (1 - row.p).clamp_min(0.5)
    ratio = _without_own(row.p / left, slice(0, count))
    ratio = ratio.scatter(1, row.top, 0.0)
    of_rows = torch.eye(count, dtype=ratio.dtype, device=ratio.device) - ratio
    leaving = torch.einsum("kn,kab->nab", of_rows, fisher)
    centred = (moved - (rest_mean + top_mass * step)[:, None]).transpose(0, 1)
    leaving += _weighted_squares((ratio / left).T, centred)
    others = (top != here)[:, None, None]
    return leaving.index_add(0, top, others * (apart - top_mass[..., None] * rest))


def _weighted_squares(weights: Tensor, vectors: Tensor) -> Tensor:
    """``sum_j weights_ij v_ij v_ij^T``, ``(n, K, K)``, from ``(n, B)`` and ``(n, B, K)``."""
    return (weights[..., None] * vectors).mT @ vectors


def _logits(direction: Direction, rows: slice, same: Tensor | None) -> Tensor:
    """``S`` of a block, ``(r, B)``; minus infinity where a pair is not a negative."""
    logits = similarity.logits(direction, rows)
    if same is None:
        return logits
    return logits.masked_fill(similarity.repeated(same, rows), -torch.inf)


def _first_way(embeddings: Embeddings) -> Sequence[Direction]:
    return similarity.two_ways(embeddings)[:1]


def _derivatives(direction: Direction, rows: slice, same: Tensor | None) -> Derivatives:
    """Derivatives of ``L`` in one direction: ``p`` minus the identity, and the softmax's Fisher."""
    terms = TERMS * len(direction.anchors)
    weights = _logits(direction, rows, same).softmax(dim=1) / terms

    def cotangent() -> Tensor:
        return _less_own(weights, rows, 1 / terms)

    def curvature(logits_tangent: Tensor) -> Tensor:
        mean = (weights * logits_tangent).sum(dim=-1, keepdim=True) * terms
        return weights * (logits_tangent - mean)

    return Derivatives(cotangent, curvature)


def _joint_derivatives(direction: Direction, rows: slice, same: Tensor | None) -> Derivatives:
    """Derivatives of ``L`` in both directions at once, if one block holds the whole batch.

    The logits and their tangents are then computed once for both directions.
    """
    terms = TERMS * len(direction.anchors)
    logits = _logits(direction, rows, same)
    by_row, by_column = logits.softmax(dim=1) / terms, logits.softmax(dim=0) / terms
    weights = by_row + by_column

    def cotangent() -> Tensor:
        return _less_own(weights, rows, 2 / terms)

    def curvature(logits_tangent: Tensor) -> Tensor:
        row_means = terms * (by_row * logits_tangent).sum(dim=-1, keepdim=True)
        column_means = terms * (by_column * logits_tangent).sum(dim=-2, keepdim=True)
        # In place: passes over the cells dominate the time of a product with a single tangent.
        changes = weights * logits_tangent
        changes.addcmul_(by_row, row_means, value=-1)
        return changes.addcmul_(by_column, column_means, value=-1)

    return Derivatives(cotangent, curvature)


def _less_own(weights: Tensor, rows: slice, amount: float) -> Tensor:
    """A copy, with ``amount`` subtracted where a row of the block meets its own column."""
    lessened = weights.clone()
    similarity.own_cells(lessened, rows).sub_(amount)
    return lessened


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp ``(r, 1)`` and softmax ``(r, B)``; zero weights in a row without any logit."""
    total = logits.logsumexp(dim=1, keepdim=True)
    return total, (logits - total).exp().masked_fill(total == -torch.inf, 0.0)


def _gain(share: Tensor, log_ratio: Tensor) -> Tensor:
    """``-log(1 - share)``, by which a deletion lowers a term; precise for any share.

    Args:
        share: probability of what is deleted.
        log_ratio: the result as a difference of logsumexps, which is precise for large shares only.
    """
    return torch.where(share > 0.5, log_ratio, -(-share).log1p())


def _without_own(values: Tensor, rows: slice) -> Tensor:
    """A copy, with zero where a row of the block meets its own column."""
    values = values.clone()
    similarity.own_cells(values, rows).zero_()
    return values
