"""Partners of a hard negative: the pairs whose terms it affects most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import RoleForm
from hf_ecif.influence.response import Checkpoint, share_partitions
from hf_ecif.influence.scoring import Batch, Pass, pushed_batches, row_chunks
from hf_ecif.utils import distributed

CELLS = 2**24  # derivatives by query, partner and pair held at a time


class Partners(NamedTuple):
    """Strongest partner of each pair among those it meets in the partitions; ``(Q, k)`` each.

    Attributes:
        rows: number of the partner; -1 if a pair affects no other's terms.
        parts: effect of the pair in the partner's terms, which is a part of the negative part of
            its score, with equal sign and unit.
    """

    rows: Tensor
    parts: Tensor


def strongest_partners(
    encoder: DualEncoder,
    checkpoints: Sequence[Checkpoint],
    features: Features,
    pairs: Tensor,
    how: Pass,
    *,
    train_count: int,
) -> Partners:
    """Partners whose terms some pairs affect most as negatives.

    By the absolute value in one meeting at one checkpoint, since two pairs seldom meet twice.

    Args:
        encoder: encoder with the attributed parameters.
        checkpoints: checkpoints of several queries, ``(Q, P)`` each.
        features: ``N`` rows.
        pairs: ``(Q, k)``, numbers of rows for each query.
        how: how rows are pushed and batched, in the same batches as in `score_through`.
        train_count: rows of the training set, the ``N`` of ``1 / 2N``.
    """
    dtype = checkpoints[0].theta.dtype
    found = Partners(torch.full(pairs.shape, -1), torch.zeros(pairs.shape, dtype=dtype))
    for (theta, directions), own in share_partitions(how, checkpoints):
        for rows in row_chunks(features, len(directions), own, encoder):
            for batch in pushed_batches(encoder, theta, features[rows], directions, own.of(rows)):
                met = _meet(encoder, batch, rows[batch.rows], pairs, how.form)
                found = _stronger(found, met)
    for other in distributed.collect(found):
        found = _stronger(found, other)
    return found._replace(parts=found.parts / (encoder.contrastive.TERMS * train_count))


def _meet(
    encoder: DualEncoder, batch: Batch, numbers: Tensor, pairs: Tensor, form: RoleForm
) -> Partners:
    """Strongest partners within a batch with these row numbers, unnormalised."""
    here = pairs[..., None] == numbers
    present, places = here.any(dim=-1), here.int().argmax(dim=-1)
    rows, parts = torch.full(pairs.shape, -1), torch.zeros(pairs.shape).to(batch.moved.text.cpu())
    if not present.any():
        return Partners(rows, parts)
    queries, count = batch.moved.text.shape[:2]
    device = batch.embeddings.text.device
    for some in places[present].unique().split(max(1, CELLS // (queries * count))):
        by_partner = encoder.contrastive.partner_tangents(
            batch.embeddings, batch.moved, some.to(device), form=form, same=batch.same
        ).cpu()
        strongest = by_partner.abs().argmax(dim=1)
        values = by_partner.gather(1, strongest[:, None])[:, 0]
        column = torch.searchsorted(some, places).clamp_max(len(some) - 1)
        ours = present & (some[column] == places)
        rows = torch.where(ours, numbers[strongest.gather(1, column)], rows)
        parts = torch.where(ours, values.gather(1, column), parts)
    return Partners(torch.where(parts == 0, -1, rows), parts)


def _stronger(first: Partners, second: Partners) -> Partners:
    wins = second.parts.abs() > first.parts.abs()
    return Partners(*(torch.where(wins, b, a) for a, b in zip(first, second, strict=True)))
