"""The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343).

``L = -(1/B) sum_ij log sigmoid(y_ij S_ij)`` with ``S = scale * U V^T + bias``, ``y = 1`` on the
diagonal and ``-1`` elsewhere. Every cell of ``S`` is a separate term, without normalisation across
cells, so the roles of pair ``n`` are exact for a deletion without any expansion:

- positive: ``Pos_n``, the cell ``(n, n)``;
- negative: ``Neg_n``, the other cells of row ``n`` and of column ``n``.

Both values of `RoleForm` therefore give equal results here. Cells of other pairs with equal numbers
in ``same`` are left out of the sum.

The functions implement `hf_ecif.engine.objectives.Contrastive`, which states their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hf_ecif.engine.objectives import joining, linearised, similarity
from hf_ecif.engine.objectives.linearised import Derivatives, LinearisedLoss
from hf_ecif.engine.objectives.similarity import (
    Direction,
    Embeddings,
    FactorTangents,
    RoleForm,
    Roles,
)

TERMS = 1
FULL_LENGTH = True
joining_tangents = joining.join_sigmoid
joining_losses = joining.sigmoid_losses


def loss(embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None) -> Tensor:
    """``L``, as ``SiglipModel(..., return_loss=True)`` returns it; scalar, in nats."""
    direction, count = similarity.one_way(embeddings), len(embeddings.text)
    sums = [_terms(direction, block, same).sum() for block in similarity.blocks(count, rows)]
    return similarity.total(sums) / count


def pair_losses(
    embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
) -> Tensor:
    """``Pos_n``: the term of every pair as a positive, ``(B,)``, or of those in ``rows``."""
    direction, count = similarity.one_way(embeddings), len(embeddings.text)
    blocks = similarity.blocks(count, rows)
    return torch.cat([similarity.own_cells(_terms(direction, b, same), b) for b in blocks])


def linearise(
    embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
) -> LinearisedLoss:
    """`loss` linearised at a batch; ``d2L/dS2`` is diagonal, ``sigmoid(S) sigmoid(-S) / B``."""
    derivatives = partial(_derivatives, same=same)
    return linearised.linearise(embeddings, _only_way, derivatives, rows)


def roles(embeddings: Embeddings, *, form: RoleForm = "exact", same: Tensor | None = None) -> Roles:
    """Both roles of every pair; ``form`` makes no difference.

    Deleting pair ``n`` from the batch changes ``B L`` by exactly ``-(Pos_n + Neg_n)`` when the mean
    keeps its denominator.
    """
    direction = similarity.one_way(embeddings)
    positive, in_row, in_column = [], [], []
    for rows in similarity.blocks(len(embeddings.text)):
        terms = _terms(direction, rows, same)
        own = similarity.own_cells(terms, rows)
        positive.append(own.clone())
        own.zero_()
        in_row.append(terms.sum(dim=1))
        in_column.append(terms.sum(dim=0))
    return Roles(torch.cat(positive), torch.cat(in_row) + similarity.total(in_column))


def role_tangents(
    embeddings: Embeddings,
    tangents: Embeddings,
    *,
    form: RoleForm = "exact",
    same: Tensor | None = None,
) -> Roles:
    """Directional derivatives of `roles` along every tangent; ``form`` makes no difference.

    They are sums of ``S'``, the tangent of the logits, with weights that do not depend on it.
    """
    direction = similarity.one_way(embeddings)
    moved = FactorTangents(direction, similarity.one_way(tangents))
    positive, in_row, in_column = [], [], []
    for rows in similarity.blocks(len(embeddings.text)):
        slopes = _slopes(_margins(direction, rows, same), rows)
        own = similarity.own_cells(slopes, rows)
        positive.append(own * moved.picked(rows, rows))
        own.zero_()
        in_row.append(moved.row_sums(rows, slopes))
        in_column.append(moved.column_sums(rows, slopes))
    return Roles(
        torch.cat(positive, dim=-1), torch.cat(in_row, dim=-1) + similarity.total(in_column)
    )


def partner_tangents(
    embeddings: Embeddings,
    tangents: Embeddings,
    pairs: Tensor,
    *,
    form: RoleForm = "exact",
    same: Tensor | None = None,
) -> Tensor:
    """Derivatives of the negative role of some pairs by partner, ``(K, B, n)``.

    For partner ``k`` of pair ``n`` it is the sum over the cells ``(k, n)`` and ``(n, k)``. ``form``
    makes no difference.
    """
    direction, moved = similarity.one_way(embeddings), similarity.one_way(tangents)
    flipped = direction._replace(anchors=direction.keys, keys=direction.anchors)
    moved_flipped = moved._replace(anchors=moved.keys, keys=moved.anchors)
    ways = ((direction, moved), (flipped, moved_flipped))
    return similarity.total(
        torch.cat(
            [
                _partner_tangents(way, pushed, rows, pairs, same)
                for rows in similarity.blocks(len(embeddings.text))
            ],
            dim=1,
        )
        for way, pushed in ways
    )


def group_roles(
    embeddings: Embeddings, members: Tensor, same: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(Pos_E, Neg_E)`` of a set ``E`` of pairs that leave the batch together.

    ``Pos_E`` is the sum of the members' own cells, ``Neg_E`` of all other cells in a row or column
    of ``E``, each counted once. A sum of single-pair roles counts cells between members twice.
    """
    direction = similarity.one_way(embeddings)
    positive, negative = [], []
    for rows in similarity.blocks(len(embeddings.text)):
        terms = _terms(direction, rows, same)
        own = similarity.own_cells(terms, rows)
        positive.append((own * members[rows]).sum())
        own.zero_()
        negative.append((terms * _touched(members, rows)).sum())
    return similarity.total(positive), similarity.total(negative)


def group_role_tangents(
    embeddings: Embeddings, tangents: Embeddings, members: Tensor, same: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Directional derivatives of `group_roles` along every tangent."""
    direction = similarity.one_way(embeddings)
    moved = FactorTangents(direction, similarity.one_way(tangents))
    positive, negative = [], []
    for rows in similarity.blocks(len(embeddings.text)):
        slopes = _slopes(_margins(direction, rows, same), rows)
        own = similarity.own_cells(slopes, rows)
        change = own * members[rows] * moved.picked(rows, rows)
        positive.append(change.sum(dim=-1))
        own.zero_()
        weights = slopes * _touched(members, rows)
        negative.append(moved.row_sums(rows, weights).sum(dim=-1))
    return similarity.total(positive), similarity.total(negative)


def leaving_curvature(
    embeddings: Embeddings, tangents: Embeddings, same: Tensor | None = None
) -> Tensor:
    """Gauss-Newton curvature of ``B L`` that leaves with each pair: that of its cells."""
    direction, rows = similarity.one_way(embeddings), slice(0, len(embeddings.text))
    moved = similarity.logits_tangent(direction, similarity.one_way(tangents), rows)
    margins = _margins(direction, rows, same)
    weights = margins.sigmoid() * (-margins).sigmoid()
    in_row = torch.einsum("nj,anj,bnj->nab", weights, moved, moved)
    similarity.own_cells(weights, rows).zero_()  # counted once
    return in_row + torch.einsum("kn,akn,bkn->nab", weights, moved, moved)


# ------------------------------------------------------------------------- a block of rows


def _margins(direction: Direction, rows: slice, same: Tensor | None) -> Tensor:
    """``y_ij S_ij`` of a block, ``(r, B)``; infinite, so that its term is zero, if left out."""
    margins = -similarity.logits(direction, rows)
    similarity.own_cells(margins, rows).neg_()
    if same is None:
        return margins
    return margins.masked_fill(similarity.repeated(same, rows), torch.inf)


def _terms(direction: Direction, rows: slice, same: Tensor | None) -> Tensor:
    """``-log sigmoid(y_ij S_ij)`` of a block, ``(r, B)``."""
    return -logsigmoid(_margins(direction, rows, same))


def _slopes(margins: Tensor, rows: slice) -> Tensor:
    """Derivatives of the terms, ``-y_ij sigmoid(-y_ij S_ij)``, ``(r, B)``."""
    slopes = (-margins).sigmoid()
    similarity.own_cells(slopes, rows).neg_()
    return slopes


def _partner_tangents(
    direction: Direction, moved: Direction, rows: slice, pairs: Tensor, same: Tensor | None
) -> Tensor:
    """Derivatives of the cells in the pairs' columns and a block of rows, ``(K, r, n)``."""
    slopes = _slopes(_margins(direction, rows, same), rows)
    similarity.own_cells(slopes, rows).zero_()
    columns = direction._replace(keys=direction.keys[pairs])
    change = similarity.logits_tangent(columns, moved._replace(keys=moved.keys[:, pairs]), rows)
    return slopes[:, pairs] * change


def _only_way(embeddings: Embeddings) -> Sequence[Direction]:
    return [similarity.one_way(embeddings)]


def _derivatives(direction: Direction, rows: slice, same: Tensor | None) -> Derivatives:
    """Derivatives of ``L`` with respect to the logits of a block."""
    count = len(direction.anchors)
    margins = _margins(direction, rows, same)
    curvature = margins.sigmoid() * (-margins).sigmoid() / count
    return Derivatives(lambda: _slopes(margins, rows) / count, lambda tangent: curvature * tangent)


def _touched(members: Tensor, rows: slice) -> Tensor:
    """Booleans ``(r, B)``: cells that leave with the members."""
    return members[rows, None] | members[None, :]
