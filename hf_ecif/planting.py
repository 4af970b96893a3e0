"""Wrong pairs made on purpose, so that a detector can learn what wrong looks like here.

Half of them get the caption of any other row, half that of a row whose image looks alike: in real
data, captions are mixed up among like things, too, and such pairs are harder to find.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from hf_ecif.features import Rows


@dataclass(frozen=True)
class Planting:
    """Rows of which some have another row's caption.

    Attributes:
        rows: all rows, with the exchanged captions.
        donors: ``(n,)``, the row that each caption was taken from; its own where it stayed.
        clusters: ``(n,)``, of the images.
    """

    rows: Rows
    donors: Tensor
    clusters: Tensor

    @property
    def planted(self) -> Tensor:
        """``(n,)`` booleans, true where the caption was exchanged."""
        return self.donors != torch.arange(len(self.donors))

    @property
    def alike(self) -> Tensor:
        """``(n,)`` booleans, true where it was exchanged with that of an image of its cluster."""
        return self.planted & (self.clusters == self.clusters[self.donors])


def plant(
    rows: Rows, image_embeddings: Tensor, *, share: float, clusters: int, generator: torch.Generator
) -> Planting:
    """Exchange the captions of a random ``share`` of the rows.

    Args:
        rows: the data.
        image_embeddings: ``(n, d)``, tell which images look alike.
        share: of the rows, in (0, 1).
        clusters: into which the images are grouped for the harder half.
        generator: of the choice.
    """
    count = len(rows)
    chosen = torch.randperm(count, generator=generator)[: max(2, round(share * count))]
    labels = cluster(image_embeddings, clusters, int(generator.initial_seed()))
    texts = rows.same_text
    donors = torch.arange(count)
    for position, row in enumerate(chosen.tolist()):
        other = texts != texts[row]
        alike = other & (labels == labels[row])
        pool = alike if position % 2 and alike.any() else other
        candidates = pool.nonzero()[:, 0]
        if len(candidates):
            pick = torch.randint(len(candidates), (1,), generator=generator)
            donors[row] = candidates[pick]
    return Planting(rows.with_texts_of(donors), donors, labels)


def cluster(embeddings: Tensor, clusters: int, seed: int) -> Tensor:
    """``(n,)``, the k-means cluster of every row."""
    means = KMeans(min(clusters, len(embeddings)), n_init=1, random_state=seed)
    return torch.from_numpy(means.fit_predict(embeddings.double().cpu().numpy())).long()
