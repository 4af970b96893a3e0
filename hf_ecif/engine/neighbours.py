"""Who is near whom among embeddings, in blocks: no table of all rows by all rows is ever held.

All vectors are normalised, so that a product is a cosine. The time is that of one product of all
``anchors`` with all ``keys``; the memory is bounded by `BLOCK`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from torch import Tensor

from hf_ecif.engine.objectives.similarity import agree

BLOCK = 2**24  # cosines that are held at a time
# Two products of the same vectors differ by this much in float32.
ROUNDING = 1e-6
# Of `average_distance`: few and near ones, as wrong pairs hide among their like. On the training
# rows of the demo, 3, 10 and 20 neighbours rank wrong captions as well as 5 do. Equal weights rank
# worse, by up to 0.04 in AUPRC, and so do weights that fall faster.
NEIGHBOURS = 5
DECAY = 5.0  # of a neighbour's weight with its distance, and with its own mismatch


class Best(NamedTuple):
    """The best key of every anchor, ``(A,)`` each.

    Attributes:
        key: its number.
        cosine: with the anchor.
        runner_up: cosine of the second best; -1 where there is none.
    """

    key: Tensor
    cosine: Tensor
    runner_up: Tensor


def count_better(anchors: Tensor, keys: Tensor, own: Tensor) -> Tensor:
    """Keys that fit an anchor better than its own does, ``(A,)``: its rank, counted from 0.

    Args:
        anchors: ``(A, d)``.
        keys: ``(K, d)``.
        own: ``(A,)``, cosine of every anchor with its own key. Equal ones do not count.
    """
    counts = [
        (cosines > own[rows, None] + ROUNDING).sum(dim=1)
        for rows, cosines in _cosines(anchors, keys)
    ]
    return torch.cat(counts) if counts else anchors.new_zeros(0, dtype=torch.long)


def find_best(anchors: Tensor, keys: Tensor, excluded: Tensor) -> Best:
    """The key that fits an anchor best, and how well the second best fits.

    Args:
        anchors: ``(A, d)``.
        keys: ``(K, d)``, at least one that is not excluded.
        excluded: ``(A,)``, number of a key that is not to be found, or -1.
    """
    parts = []
    for rows, cosines in _cosines(anchors, keys):
        barred = (excluded[rows] >= 0).nonzero()[:, 0]
        cosines[barred, excluded[rows][barred]] = -1.0
        top = cosines.topk(min(2, len(keys)), dim=1)
        parts.append((top.indices[:, 0], top.values[:, 0], _second(top.values)))
    if not parts:
        empty = anchors.new_zeros(0)
        return Best(empty.long(), empty, empty)
    return Best(*(torch.cat(column) for column in zip(*parts, strict=True)))


def average_distance(
    anchors: Tensor,
    others: Tensor,
    mismatch: Tensor,
    same: Tensor | None = None,
    mute: Tensor | None = None,
) -> Tensor:
    """How far rows are from their nearest neighbours on the other side; ``(N,)``, at least zero.

    The mean of ``exp(-DECAY (d + m)) a`` over the `NEIGHBOURS` with the nearest ``anchors``: ``d``
    the cosine distance of the anchors, ``a`` that of the other sides, and ``m`` the neighbour's own
    mismatch. A row is no neighbour of its own.

    Args:
        anchors: ``(N, d)``, embeddings of the side that neighbours are sought on.
        others: ``(N, d)``, embeddings of the other side.
        mismatch: ``(N,)``, cosine distance of the two sides of a row.
        same: ``(N, L)``; rows that agree in a column are no neighbours of each other either.
        mute: ``(N,)`` booleans, true for rows that are nobody's neighbours.
    """
    count = min(NEIGHBOURS, len(anchors))
    same = (torch.arange(len(anchors)) if same is None else same).to(anchors.device)
    parts = []
    for rows, cosines in _cosines(anchors, anchors):
        barred = agree(same[rows], same)
        if mute is not None:
            barred |= mute.to(barred.device)
        nearest = cosines.masked_fill_(barred, -torch.inf).topk(count, dim=1)
        weight = (-DECAY * (1 - nearest.values + mismatch[nearest.indices])).exp()
        apart = 1 - (others[rows, None] * others[nearest.indices]).sum(dim=2)
        parts.append((weight * apart).sum(dim=1) / NEIGHBOURS)
    return torch.cat(parts) if parts else anchors.new_zeros(0)


def group_near(
    embeddings: Tensor, threshold: float, advance: Callable[[int], None] = lambda rows: None
) -> Tensor:
    """Number of the first row that every row is linked to, ``(N,)``; its own where it is alone.

    Rows are linked where their cosine is ``threshold`` or more, and through others.

    Args:
        embeddings: ``(N, d)``.
        threshold: of the cosine.
        advance: called with the number of rows done, for a progress bar.
    """

    def links() -> Iterator[tuple[Tensor, Tensor]]:
        for start, cosines in _upper(embeddings):
            yield _near(start, cosines, threshold)
            advance(len(cosines))

    return link(len(embeddings), links())


def link(count: int, links: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Number of the first row that every row is linked to, ``(N,)``, directly or through others.

    Args:
        count: rows, ``N``.
        links: pairs of row numbers ``(L,)``, block by block.

    >>> link(4, iter([(torch.tensor([0]), torch.tensor([2]))]))
    tensor([0, 1, 0, 3])
    """
    groups = torch.arange(count)
    for first, second in links:
        if len(first):
            groups = _merge(groups, groups[first.cpu()], groups[second.cpu()])
    return _first_members(groups)


def cluster(embeddings: Tensor, clusters: int, seed: int) -> Tensor:
    """``(n,)``, the k-means cluster of every row."""
    means = KMeans(min(clusters, len(embeddings)), n_init=1, random_state=seed)
    return torch.from_numpy(means.fit_predict(embeddings.double().cpu().numpy())).long()


def _merge(groups: Tensor, first: Tensor, second: Tensor) -> Tensor:
    graph = coo_matrix((torch.ones(len(first)), (first, second)), shape=(len(groups), len(groups)))
    _, merged = connected_components(graph, directed=False)
    return torch.from_numpy(merged).long()[groups]


def _first_members(groups: Tensor) -> Tensor:
    firsts = torch.full((len(groups),), len(groups))
    firsts.scatter_reduce_(0, groups, torch.arange(len(groups)), "amin")
    return firsts[groups]


def _cosines(anchors: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = max(1, BLOCK // max(1, len(keys)))
    for start in range(0, len(anchors), size):
        rows = slice(start, start + size)
        yield rows, anchors[rows] @ keys.T


def _upper(embeddings: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every pair of rows once: some rows by themselves and all later ones."""
    size = max(1, BLOCK // max(1, len(embeddings)))
    for start in range(0, len(embeddings), size):
        yield start, embeddings[start : start + size] @ embeddings[start:].T


def _near(start: int, cosines: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    first, second = (cosines >= threshold).nonzero(as_tuple=True)
    later = second > first
    return first[later] + start, second[later] + start


def _second(top: Tensor) -> Tensor:
    return top[:, 1] if top.shape[1] > 1 else torch.full_like(top[:, 0], -1.0)
