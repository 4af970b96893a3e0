"""Roles of a pair that joins a batch: its loss there, and derivatives along the parameters.

This is the closed form of a removal from the enlarged batch, for many newcomers at once, none of
which meets another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hf_ecif.engine.objectives import similarity
from hf_ecif.engine.objectives.similarity import (
    Direction,
    Embeddings,
    FactorTangents,
    RoleForm,
    Roles,
)

EVERY = slice(None)


class Pushed(NamedTuple):
    """Embeddings of ``n`` rows, with ``K`` tangents."""

    here: Embeddings
    moved: Embeddings


Alike = tuple[Tensor, Tensor]


def join_softmax(
    context: Pushed, new: Pushed, *, form: RoleForm = "exact", same: Alike | None = None
) -> Roles:
    """Directional derivatives ``(K, C)`` of the roles of newcomers under InfoNCE.

    Each joins the ``B`` rows of the context without the others. With ``Z_k`` the normaliser of row
    ``k`` of the context, newcomer ``c`` has the probability ``p_kc = exp(S_kc) / (Z_k + exp(S_kc))
    = sigmoid(S_kc - log Z_k)`` in that row. Its negative role, ``-sum_k log(1 - p_kc)``, changes by
    ``sum_k p_kc (S'_kc - m_k)``, with ``m_k`` the mean of ``S'`` under the softmax of the context
    alone; to first order each term has a factor ``1 - p_kc``. Its own term changes by
    ``(1 - p_cc) (m_c - S'_cc)``. Both are free of cancellation.

    Args:
        context: rows of a training batch with one place free.
        new: ``C`` newcomers.
        form: form of the negative role.
        same: ``(B,)`` for the context and ``(C,)`` for the newcomers, equal for rows that are not
            negatives of each other.
    """
    hidden = None if same is None else similarity.agree(*same)
    positive, negative = [], []
    for of_context, of_new in zip(_two_ways(context), _two_ways(new), strict=True):
        (there, there_moved), (own, own_moved) = of_context, of_new
        totals, means = _context_rows(there, there_moved, None if same is None else same[0])

        row, row_moved = _across(own, there), _across(own_moved, there_moved)
        logits = _masked(similarity.logits(row, EVERY), None if hidden is None else hidden.T)
        mean = FactorTangents(row, row_moved).row_sums(EVERY, logits.softmax(1).nan_to_num())
        cell, cell_moved = _own_cells(own, own_moved)
        positive.append((logits.logsumexp(dim=1) - cell).sigmoid() * (mean - cell_moved))

        column, column_moved = _across(there, own), _across(there_moved, own_moved)
        weights = (_masked(similarity.logits(column, EVERY), hidden) - totals[:, None]).sigmoid()
        if form == "first_order":
            weights = weights * (1 - weights)
        change = FactorTangents(column, column_moved).column_sums(EVERY, weights)
        negative.append(change - means @ weights)
    return Roles(similarity.total(positive), similarity.total(negative))


def join_sigmoid(
    context: Pushed, new: Pushed, *, form: RoleForm = "exact", same: Alike | None = None
) -> Roles:
    """Directional derivatives ``(K, C)`` of the roles of newcomers under the sigmoid loss.

    Every cell is a term, so ``form`` makes no difference.
    """
    hidden = None if same is None else similarity.agree(*same)
    (there, there_moved), (own, own_moved) = map(_one_way, (context, new))
    column, row = _across(there, own), _across(own, there)
    column_moved, row_moved = _across(there_moved, own_moved), _across(own_moved, there_moved)
    down = _masked(similarity.logits(column, EVERY), hidden).sigmoid()
    along = _masked(similarity.logits(row, EVERY), None if hidden is None else hidden.T).sigmoid()
    cell, cell_moved = _own_cells(own, own_moved)
    return Roles(
        -(-cell).sigmoid() * cell_moved,
        FactorTangents(column, column_moved).column_sums(EVERY, down)
        + FactorTangents(row, row_moved).row_sums(EVERY, along),
    )


def softmax_losses(context: Embeddings, new: Embeddings, same: Alike | None = None) -> Tensor:
    """Losses ``(C,)`` of newcomers in all of their terms under InfoNCE, each without the others.

    Args:
        context: ``B`` rows of a batch with one place free.
        new: ``C`` newcomers.
        same: as for `join_softmax`.
    """
    hidden = None if same is None else similarity.agree(*same).T
    losses = []
    for there, own in zip(similarity.two_ways(context), similarity.two_ways(new), strict=True):
        others = _masked(similarity.logits(_across(own, there), EVERY), hidden)
        losses.append(softplus(others.logsumexp(dim=1) - _cells(own)))
    return similarity.total(losses)


def sigmoid_losses(context: Embeddings, new: Embeddings, same: Alike | None = None) -> Tensor:
    """Losses ``(C,)`` of newcomers under the sigmoid loss: a pair's own term has no negatives."""
    return softplus(-_cells(similarity.one_way(new)))


def _two_ways(pushed: Pushed) -> list[tuple[Direction, Direction]]:
    """Text to image and image to text, each with its tangents."""
    return list(zip(*map(similarity.two_ways, pushed), strict=True))


def _one_way(pushed: Pushed) -> tuple[Direction, Direction]:
    return similarity.one_way(pushed.here), similarity.one_way(pushed.moved)


def _across(anchors: Direction, keys: Direction) -> Direction:
    """Anchors of one direction with the keys of the other."""
    return anchors._replace(keys=keys.keys)


def _own_cells(own: Direction, moved: Direction) -> tuple[Tensor, Tensor]:
    """Logits ``(C,)`` of each row with itself, and their tangents ``(K, C)``."""
    cells = _cells(own)
    columns = torch.arange(len(cells), device=cells.device)
    return cells, FactorTangents(own, moved).picked(EVERY, columns)


def _cells(own: Direction) -> Tensor:
    """Logits ``(C,)`` of each row with itself."""
    cells = own.scale * (own.anchors * own.keys).sum(dim=1)
    return cells if own.bias is None else cells + own.bias


def _context_rows(there: Direction, moved: Direction, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """``log Z_k``, ``(B,)``, and the mean of ``S'`` under each row's softmax, ``(K, B)``."""
    totals, means = [], []
    for rows in similarity.blocks(len(there.anchors)):
        hidden = None if same is None else similarity.repeated(same, rows)
        logits = _masked(similarity.logits(there, rows), hidden)
        totals.append(logits.logsumexp(dim=1))
        means.append(FactorTangents(there, moved).row_sums(rows, logits.softmax(dim=1)))
    return torch.cat(totals), torch.cat(means, dim=-1)


def _masked(logits: Tensor, hidden: Tensor | None) -> Tensor:
    return logits if hidden is None else logits.masked_fill(hidden, -torch.inf)
