"""Nearest neighbours among many embeddings by faiss, in less than the square of their number.

Keys are divided into cells around centroids, and a search looks through those nearest to the anchor
(an inverted file, `IndexIVFFlat`). How many is not a setting: they are doubled until a sample of
anchors finds nearly all of its true neighbours.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows up to which all are compared. On 12,000 images of the demo with noise, an index takes a
# fourth of the time and moves their distance to the neighbours' captions by 0.2 % of its spread.
MANY = 20_000
SAMPLED = 256  # anchors by which the recall is measured
LEAST_RECALL = 0.98
ROWS_PER_CENTROID = 64  # that the centroids are learned from
TOOL = 'pip install "hf_ecif[knn]"'

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """Keys by their cells; made by `build`.

    Attributes:
        keys: ``(K, d)``.
        recall: share of the true neighbours of sampled anchors that it finds.
    """

    keys: Tensor
    recall: float
    _cells: Any

    @classmethod
    def build(cls, keys: Tensor, anchors: Tensor, count: int) -> Index:
        """An index in which anchors like these find their ``count`` nearest keys.

        Args:
            keys: ``(K, d)``, unit rows.
            anchors: ``(A, d)``, some of them tell the recall.
            count: neighbours that are looked for.
        """
        import faiss

        width = keys.shape[1]
        vectors = _as_array(keys)
        centroids = max(1, int(len(keys) ** 0.5))
        quantizer = faiss.IndexFlatIP(width)
        cells = faiss.IndexIVFFlat(quantizer, width, centroids, faiss.METRIC_INNER_PRODUCT)
        cells.cp.max_points_per_centroid = ROWS_PER_CENTROID
        cells.train(vectors)
        cells.add(vectors)
        chosen = torch.linspace(0, len(anchors) - 1, min(SAMPLED, len(anchors))).long()
        sample = anchors[chosen.to(anchors.device)]
        recall = _widen(cells, sample, sample @ keys.T, count, centroids)
        _log.info(
            "faiss: %d keys in %d cells, %d searched, recall %.3f",
            len(keys),
            centroids,
            cells.nprobe,
            recall,
        )
        return cls(keys, recall, cells)

    def nearest(self, anchors: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines ``(A, count)``, descending, and numbers of the nearest keys; -1 for none."""
        cosines, numbers = self._cells.search(_as_array(anchors), count)
        return torch.from_numpy(cosines).to(anchors), torch.from_numpy(numbers).to(anchors.device)


def is_worthwhile(anchors: Tensor, keys: Tensor) -> bool:
    """Whether an index saves time, and can be made: on a GPU, all comparisons are fast enough.

    Where faiss is not installed, a warning says so, and how long it takes without.
    """
    if keys.device.type != "cpu" or len(anchors) * len(keys) <= MANY**2:
        return False
    try:
        import faiss  # noqa: F401
    except ImportError:
        _log.warning(
            "%d embeddings are compared with %d, which takes about %s. An index makes it a small "
            "part of that: %s.",
            len(anchors),
            len(keys),
            _estimate(anchors, keys),
            TOOL,
        )
        return False
    return True


def _widen(cells: Any, sample: Tensor, cosines: Tensor, count: int, most: int) -> float:
    """Search ever more cells until the recall is high; returns it."""
    least = cosines.topk(min(count, cosines.shape[1]), dim=1).values[:, -1:]
    cells.nprobe = min(8, most)
    while True:
        # By cosines: of keys that are equally near, any is as good.
        found = torch.from_numpy(cells.search(_as_array(sample), count)[0])
        recall = float((found.to(least) >= least - 1e-6).double().mean())
        if recall >= LEAST_RECALL or cells.nprobe >= most:
            return recall
        cells.nprobe = min(2 * cells.nprobe, most)


def _estimate(anchors: Tensor, keys: Tensor) -> str:
    """How long it takes to compare all anchors with all keys, from a few of them."""
    few = anchors[:64]
    start = time.perf_counter()
    (few @ keys.T).topk(min(2, len(keys)), dim=1)
    minutes = (time.perf_counter() - start) * len(anchors) / len(few) / 60
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, round(minutes))} minutes"


def _as_array(vectors: Tensor) -> Any:
    return vectors.detach().float().cpu().contiguous().numpy()
