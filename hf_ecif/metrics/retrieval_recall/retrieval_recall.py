"""How often captions retrieve their image, and images their caption."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_DESCRIPTION = """
Recall@k of text-to-image and image-to-text retrieval by the cosine of embeddings: the share of
queries with a right answer among the k nearest candidates.
"""

_INPUTS = """
Args:
    text_embeddings: a list of numbers per pair, of any length but zero.
    image_embeddings: a list of numbers per pair, for the image of the text in the same place.
    groups: a comparable value per pair; pairs of one group are right answers for each other. Equal
        embeddings in a group are one text or image, which several rows repeat. Without it, every
        pair is a group.
    text_ids, image_ids: a comparable value per pair each, in place of groups: equal values are of
        one text, or of one image, and a text and an image are right for each other if some pair has
        both. So an image with five captions, a row each, is right with any of them. The embedding
        is that of the first pair.
    k: numbers of nearest candidates; 1, 5 and 10 by default.
    block_size: number of queries whose similarities are held at a time; 1024 by default. It affects
        only memory.

Returns:
    text_to_image_recall@k, image_to_text_recall@k: for every k, in [0, 1]; higher is better.
    texts, images: numbers of distinct texts and images.

Raises:
    ValueError: there are no pairs, embeddings are zero, not finite or of different lengths, or the
        number of groups or ids is not that of the pairs; or there are ids of one side alone, or
        ids and groups.
"""

_CITATION = """
@inproceedings{radford2021learning,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and
            Goh, Gabriel and Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and
            Mishkin, Pamela and Clark, Jack and Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}
"""

# Equal embeddings can differ by the rounding of a sum in float32.
_TIE = 1e-9


class RetrievalRecall(evaluate.Metric):
    """Recall in both directions, computed block by block."""

    def _info(self) -> evaluate.MetricInfo:
        embedding = List(Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features(text_embeddings=embedding, image_embeddings=embedding),
        )

    def _compute(  # type: ignore[override]  # evaluate calls it with the names of the features
        self,
        text_embeddings: Sequence[Sequence[float | None] | None],
        image_embeddings: Sequence[Sequence[float | None] | None],
        groups: Sequence[Hashable] | None = None,
        text_ids: Sequence[Hashable] | None = None,
        image_ids: Sequence[Hashable] | None = None,
        k: Sequence[int] = (1, 5, 10),
        block_size: int = 1024,
    ) -> dict[str, float | int]:
        if block_size < 1 or not k or min(k) < 1:
            raise ValueError(f"k = {k} and block_size = {block_size}: must be at least 1.")
        vectors = {
            "text": _unit_vectors("text_embeddings", text_embeddings),
            "image": _unit_vectors("image_embeddings", image_embeddings),
        }
        widths = {name: values.shape[1] for name, values in vectors.items()}
        if len({*widths.values()}) > 1:
            raise ValueError(
                f"Text embeddings have {widths['text']} numbers each and image embeddings "
                f"{widths['image']}: they must lie in one space."
            )
        sides = _sides(vectors, groups, text_ids, image_ids)
        right = _right(sides["text"], sides["image"])
        results: dict[str, float | int] = {f"{name}s": len(s.vectors) for name, s in sides.items()}
        for query, candidate, answers in (("text", "image", right), ("image", "text", right.T)):
            recalls = _recalls(sides[query], sides[candidate], answers.tocsr(), k, block_size)
            for count, recall in zip(k, recalls, strict=True):
                results[f"{query}_to_{candidate}_recall@{count}"] = float(recall)
        return results


@dataclass(frozen=True)
class _Side:
    """Distinct texts or images.

    Attributes:
        vectors: ``(n, d)``, of unit length.
        own: ``(pairs,)``, number of the text or image of every pair.
        groups: ``(pairs,)``; what is in one group is right for each other.
    """

    vectors: Floats
    own: Integers
    groups: Integers

    @classmethod
    def distinct(cls, vectors: Floats, keys: NDArray[Any], groups: Integers) -> _Side:
        """By keys ``(pairs, m)``, in order of appearance."""
        _, first, own = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        return cls(vectors[first[order]], np.argsort(order)[own.ravel()], groups)


def _sides(
    vectors: dict[str, Floats],
    groups: Sequence[Hashable] | None,
    text_ids: Sequence[Hashable] | None,
    image_ids: Sequence[Hashable] | None,
) -> dict[str, _Side]:
    count = len(vectors["text"])
    if text_ids is None and image_ids is None:
        numbers = _numbers("groups", groups, count)
        keys = {n: np.concatenate([numbers[:, None], v], axis=1) for n, v in vectors.items()}
    elif text_ids is None or image_ids is None or groups is not None:
        raise ValueError("Give both text_ids and image_ids, or groups in place of them.")
    else:
        numbers = np.arange(count)  # a pair is right for itself
        ids = {"text": text_ids, "image": image_ids}
        keys = {n: _numbers(f"{n}_ids", i, count)[:, None] for n, i in ids.items()}
    return {name: _Side.distinct(vectors[name], keys[name], numbers) for name in vectors}


def _right(texts: _Side, images: _Side) -> csr_matrix:
    """``(texts, images)`` booleans, which are right for each other."""
    ones = np.ones(len(texts.own), dtype=np.int64)
    of_texts, of_images = (
        csr_matrix((ones, (side.own, side.groups)), shape=(len(side.vectors), len(ones)))
        for side in (texts, images)
    )
    return (of_texts @ of_images.T).astype(bool)


def _recalls(
    queries: _Side, candidates: _Side, right: csr_matrix, k: Sequence[int], block_size: int
) -> Floats:
    """For every ``k``, the mean over the queries of the probability of a hit."""
    hits = np.zeros(len(k))
    for higher, tied, own in _standings(queries, candidates, right, block_size):
        hits += [_hit_probability(count - higher, tied, own).sum() for count in k]
    return hits / len(queries.vectors)


def _standings(
    queries: _Side, candidates: _Side, right: csr_matrix, block_size: int
) -> Iterator[tuple[Integers, Integers, Integers]]:
    """Where the nearest right answer stands, for blocks of queries.

    Yields:
        Numbers of candidates above it, of wrong ones that tie with it, and of right ones that do,
        itself included; ``(b,)`` each.
    """
    for start in range(0, len(queries.vectors), block_size):
        block = slice(start, start + block_size)
        similarity = queries.vectors[block] @ candidates.vectors.T
        answers = right[block].toarray()
        best = np.where(answers, similarity, -np.inf).max(axis=1, keepdims=True)
        higher = (similarity > best + _TIE).sum(axis=1)
        tied = np.abs(similarity - best) <= _TIE
        yield higher, (tied & ~answers).sum(axis=1), (tied & answers).sum(axis=1)


def _hit_probability(places: Integers, wrong: Integers, right: Integers) -> Floats:
    """Probability that, in random order, a right candidate among tied ones gets a place.

    All of them miss with probability ``C(wrong, places) / C(wrong + right, places)``.
    """
    miss = np.ones(len(places))
    for n in range(1, int(right.max()) + 1):
        factor = np.maximum(wrong - np.maximum(places, 0) + n, 0) / (wrong + n)
        miss *= np.where(n <= right, factor, 1)
    return 1 - miss


def _unit_vectors(name: str, rows: Sequence[Sequence[float | None] | None]) -> Floats:
    if not rows:
        raise ValueError(f"{name} are empty: give at least one pair.")
    lengths = [len(values or ()) for values in rows]
    for row, length in enumerate(lengths):
        if length != lengths[0] or not length:
            raise ValueError(
                f"{name}[{row}] has {length} numbers, and {name}[0] has {lengths[0]}: all must "
                "have equally many, at least one."
            )
    vectors = np.array(rows, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in np.flatnonzero(~np.isfinite(norms) | (norms == 0))[:1]:
        raise ValueError(
            f"{name}[{row}] is zero, or holds a value that is missing or not finite, so it has no "
            "direction. Leave the pair out."
        )
    return vectors / norms


def _numbers(name: str, values: Sequence[Hashable] | None, count: int) -> Integers:
    """Values as consecutive integers, ``(n,)``."""
    if values is None:
        return np.arange(count)
    if len(values) != count:
        raise ValueError(f"{len(values)} {name} for {count} pairs: give one for each pair.")
    plain = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in plain])
