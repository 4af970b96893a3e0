"""The query set: chosen from the data where none is given, and checked against it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ecif.encoders import DualEncoder
from hf_ecif.features import Rows
from hf_ecif.planting import cluster


def choose_query(rows: Rows, encoder: DualEncoder, *, share: float = 0.1, seed: int = 0) -> Rows:
    """The pairs best aligned under the model itself, balanced over clusters of images.

    Without the balance the query would be what the model knows best already, and say nothing of the
    rest of the data.

    Args:
        rows: the data.
        encoder: embeds them, with the model's own parameters.
        share: of every cluster that is taken; two pairs at least in all.
        seed: of the clustering.
    """
    embeddings = encoder.embed(encoder.theta, rows.features)
    aligned = (embeddings.text * embeddings.image).sum(dim=1)
    count = max(1, round(len(rows) ** 0.5 / 4))
    clusters = cluster(embeddings.image, count, seed)
    chosen = [_best(aligned, (clusters == c).nonzero()[:, 0], share) for c in range(count)]
    return rows.select(torch.cat(chosen))


def _best(aligned: Tensor, members: Tensor, share: float) -> Tensor:
    order = aligned[members].argsort(descending=True)
    return members[order[: max(2, round(share * len(members)))]]
