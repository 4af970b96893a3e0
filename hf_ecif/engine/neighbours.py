"""Nearest neighbours among embeddings, in blocks, so that no ``N x N`` table is ever held.

All vectors are normalised, so a product is a cosine. The time is that of one product of all
``anchors`` with all ``keys``; `BLOCK` bounds the memory. Of many rows, an index finds nearly the
same neighbours in a small part of that, see `hf_ecif.engine.approximate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from torch import Tensor

from hf_ecif.engine.approximate import Index, is_worthwhile
from hf_ecif.engine.objectives.similarity import agree

BLOCK = 2**24  # cosines held at a time
INDEXED = 2**14  # anchors that are looked up in an index at a time
# Two products of the same vectors differ by this much in float32.
ROUNDING = 1e-6
# For `distance_from`: few and near ones, since wrong pairs hide among similar ones. On the
# training rows of the demo, 3, 10 and 20 neighbours rank wrong captions as well as 5 do. Equal
# weights rank worse, by up to 0.04 in AUPRC, and so do weights that fall faster.
NEIGHBOURS = 5
SPARE = 11  # further rows that an index is asked for, since some are siblings; about as many
LINKED = 16  # nearest rows by which an index links: copies beyond these are linked through them
DECAY = 5.0  # rate at which a neighbour's weight falls with its distance and its own mismatch


class Best(NamedTuple):
    """Best key of every anchor, ``(A,)`` each.

    Attributes:
        key: number of the best key.
        cosine: its cosine with the anchor.
        runner_up: cosine of the second best key; -1 if there is none.
    """

    key: Tensor
    cosine: Tensor
    runner_up: Tensor


class Neighbourhood(NamedTuple):
    """Rows among which neighbours are looked for.

    Attributes:
        anchors: ``(N, d)``, embeddings of the side on which neighbours are found.
        others: ``(N, d)``, embeddings of the other side.
        mismatch: ``(N,)``, cosine distance between the two sides of a row.
        same: ``(N, L)``; rows that agree in a column do not count as neighbours of each other.
        mute: ``(N,)`` booleans, true for rows that are nobody's neighbours; none if absent.
    """

    anchors: Tensor
    others: Tensor
    mismatch: Tensor
    same: Tensor
    mute: Tensor | None = None


def count_better(anchors: Tensor, keys: Tensor, own: Tensor) -> Tensor:
    """Rank of every anchor's own key, ``(A,)``: the number of keys that fit the anchor better.

    Args:
        anchors: ``(A, d)``.
        keys: ``(K, d)``.
        own: ``(A,)``, cosine of every anchor with its own key. Equal cosines do not count.
    """
    counts = [
        (cosines > own[rows, None] + ROUNDING).sum(dim=1)
        for rows, cosines in _cosines(anchors, keys)
    ]
    return torch.cat(counts) if counts else anchors.new_zeros(0, dtype=torch.long)


def find_best(anchors: Tensor, keys: Tensor, excluded: Tensor) -> Best:
    """Key that fits every anchor best, and how well the second best fits.

    Args:
        anchors: ``(A, d)``.
        keys: ``(K, d)``, at least one that is not excluded.
        excluded: ``(A,)``, number of a key that is ignored, or -1.
    """
    if is_worthwhile(anchors, keys):
        return _best_by_index(Index.build(keys, anchors, 3), anchors, excluded)
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
    """`distance_from` of rows among themselves, ``(N,)``; a row is not its own neighbour.

    Args:
        anchors: as in `Neighbourhood`, as all others.
        others: likewise.
        mismatch: likewise.
        same: likewise; all rows are different if absent.
        mute: likewise.
    """
    same = torch.arange(len(anchors)) if same is None else same
    return distance_from(
        Neighbourhood(anchors, others, mismatch, same, mute), anchors, others, same
    )


def distance_from(among: Neighbourhood, anchors: Tensor, others: Tensor, same: Tensor) -> Tensor:
    """Distance of rows on one side from their neighbours on the other; ``(M,)``, at least zero.

    The mean of ``exp(-DECAY (d + m)) a`` over the `NEIGHBOURS` rows with the nearest ``anchors``,
    where ``d`` is the cosine distance of the anchors, ``a`` that of ``others``, and ``m`` the
    neighbour's own mismatch.

    Args:
        among: the rows that can be neighbours.
        anchors: ``(M, d)``, of the rows that are asked about.
        others: ``(M, d)``, likewise.
        same: ``(M, L)``, likewise; rows of the neighbourhood that agree in a column do not count.
    """
    own, parts = same.to(anchors.device), []
    for rows, near in _nearest(among, anchors, own):
        weight = (-DECAY * (1 - near.cosines + among.mismatch[near.rows])).exp()
        apart = 1 - (others[rows, None] * among.others[near.rows]).sum(dim=2)
        parts.append((weight * apart).sum(dim=1) / NEIGHBOURS)
    return torch.cat(parts) if parts else anchors.new_zeros(0)


def group_near(
    embeddings: Tensor, threshold: float, advance: Callable[[int], None] = lambda rows: None
) -> Tensor:
    """Number of the first row of every row's group, ``(N,)``; its own number if it is alone.

    Rows with a cosine of at least ``threshold`` are linked; linked rows, also through others, form
    a group.

    Args:
        embeddings: ``(N, d)``.
        threshold: smallest cosine of a link.
        advance: called with the number of rows done, for a progress bar.
    """

    def links() -> Iterator[tuple[Tensor, Tensor]]:
        if is_worthwhile(embeddings, embeddings):
            yield from _links_by_index(embeddings, threshold, advance)
            return
        for start, cosines in _upper(embeddings):
            yield _near(start, cosines, threshold)
            advance(len(cosines))

    return link(len(embeddings), links())


def link(count: int, links: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Number of the first row to which every row is linked, ``(N,)``, also through others.

    Args:
        count: number of rows, ``N``.
        links: blocks of links, each as two tensors ``(L,)`` of row numbers.

    >>> link(4, iter([(torch.tensor([0]), torch.tensor([2]))]))
    tensor([0, 1, 0, 3])
    """
    groups = torch.arange(count)
    for first, second in links:
        if len(first):
            groups = _merge(groups, groups[first.cpu()], groups[second.cpu()])
    return _first_members(groups)


def cluster(embeddings: Tensor, clusters: int, seed: int) -> Tensor:
    """Number of every row's k-means cluster, ``(n,)``."""
    means = KMeans(min(clusters, len(embeddings)), n_init=1, random_state=seed % 2**32)
    return torch.from_numpy(means.fit_predict(embeddings.double().cpu().numpy())).long()


class _Near(NamedTuple):
    """Nearest rows of some anchors, ``(n, k)`` each; where there are fewer, the cosine is -inf."""

    cosines: Tensor
    rows: Tensor


def _nearest(among: Neighbourhood, anchors: Tensor, own: Tensor) -> Iterator[tuple[slice, _Near]]:
    """The `NEIGHBOURS` nearest of the heard rows that do not agree with a row, in blocks."""
    keys, device = among.anchors, anchors.device
    same = among.same.to(device)
    heard = torch.ones(len(keys), dtype=torch.bool) if among.mute is None else ~among.mute.cpu()
    heard = heard.to(device)
    if anchors is not keys or not is_worthwhile(keys, keys):
        for rows, cosines in _cosines(anchors, keys):
            yield rows, _among(cosines, own[rows], same, heard)
        return
    # Of equal anchors a few are enough, and all would crowd out what is not a sibling of them.
    first = same if same.dim() == 1 else same[:, 0]
    some = _some_of_each(first, heard).nonzero()[:, 0]
    index = Index.build(keys[some], keys, NEIGHBOURS + SPARE)
    for rows in _slices(len(keys), INDEXED):
        yield rows, _by_index(index, some, keys, rows, same, heard)


def _among(cosines: Tensor, own: Tensor, same: Tensor, heard: Tensor) -> _Near:
    barred = agree(own, same) | ~heard
    near = cosines.masked_fill_(barred, -torch.inf).topk(min(NEIGHBOURS, len(same)), dim=1)
    return _Near(near.values, near.indices)


def _by_index(
    index: Index, keys: Tensor, anchors: Tensor, rows: slice, same: Tensor, heard: Tensor
) -> _Near:
    """Nearest rows by an index of ``keys``; of a row with too many siblings, among all."""
    cosines, numbers = index.nearest(anchors[rows], NEIGHBOURS + SPARE)
    found, own = keys[numbers.clamp_min(0)], same[rows]
    barred = _are_equal(own, same[found]) | (numbers < 0)
    near = cosines.masked_fill_(barred, -torch.inf).topk(NEIGHBOURS, dim=1)
    result = _Near(near.values, found.gather(1, near.indices))
    few = max(1, BLOCK // len(anchors))
    for short in result.cosines[:, -1].isneginf().nonzero()[:, 0].split(few):
        exact = _among(anchors[rows][short] @ anchors.T, own[short], same, heard)
        result.cosines[short], result.rows[short] = exact
    return result


def _are_equal(own: Tensor, others: Tensor) -> Tensor:
    """Booleans ``(n, k)``, which of ``(n, k)`` or ``(n, k, L)`` agree with ``(n,)``, ``(n, L)``."""
    if own.dim() == 1:
        return own[:, None] == others
    return (own[:, None] == others).any(dim=2)


def _some_of_each(labels: Tensor, allowed: Tensor) -> Tensor:
    """Booleans ``(n,)``, the first `NEIGHBOURS` allowed rows of every label."""
    rows = allowed.nonzero()[:, 0]
    order = rows[labels[rows].argsort(stable=True)]
    sorted_labels = labels[order]
    is_late = torch.zeros(len(order), dtype=torch.bool, device=labels.device)
    is_late[NEIGHBOURS:] = sorted_labels[NEIGHBOURS:] == sorted_labels[:-NEIGHBOURS]
    chosen = torch.zeros_like(allowed)
    chosen[order[~is_late]] = True
    return chosen


def _best_by_index(index: Index, anchors: Tensor, excluded: Tensor) -> Best:
    parts = []
    for rows in _slices(len(anchors), INDEXED):
        cosines, numbers = index.nearest(anchors[rows], 3)
        barred = (numbers == excluded[rows, None]) | (numbers < 0)
        top = cosines.masked_fill_(barred, -1.0).topk(2, dim=1)
        parts.append((numbers.gather(1, top.indices)[:, 0], top.values[:, 0], top.values[:, 1]))
    return Best(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _links_by_index(
    embeddings: Tensor, threshold: float, advance: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    index = Index.build(embeddings, embeddings, LINKED)
    for rows in _slices(len(embeddings), INDEXED):
        cosines, numbers = index.nearest(embeddings[rows], LINKED)
        near = (cosines >= threshold) & (numbers >= 0)
        first, place = near.nonzero(as_tuple=True)
        yield first + rows.start, numbers[first, place]
        advance(len(cosines))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


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
    """Blocks that hold every pair of rows once: first row, and products with all later rows."""
    size = max(1, BLOCK // max(1, len(embeddings)))
    for start in range(0, len(embeddings), size):
        yield start, embeddings[start : start + size] @ embeddings[start:].T


def _near(start: int, cosines: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    first, second = (cosines >= threshold).nonzero(as_tuple=True)
    later = second > first
    return first[later] + start, second[later] + start


def _second(top: Tensor) -> Tensor:
    return top[:, 1] if top.shape[1] > 1 else torch.full_like(top[:, 0], -1.0)
