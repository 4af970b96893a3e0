"""Wrong pairs made on purpose, so that a detector can learn what wrong looks like here.

Half of them get the caption of any other row, half that of a row whose image looks alike: in real
data, captions are mixed up among like things, too, and such pairs are harder to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif.config import DetectionConfig
from hf_ecif.detection.mixture import Floats
from hf_ecif.detection.signals import find_witnesses
from hf_ecif.engine.neighbours import cluster
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import stream


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


class Injected(NamedTuple):
    """Signals from runs in which some captions were exchanged on purpose; see `find_witnesses`.

    Attributes:
        reference: ``(R, S)`` of the rows that stayed as they are, run by run.
        kinds: ``(M, S)`` of every kind of those exchanged: for the caption of an image unlike their
            own, and of one like it.
        rows: ``(R,)``, row numbers of the reference.
    """

    reference: Floats
    kinds: list[Floats]
    rows: NDArray[np.int64]


def plant_pairs(
    model: InfluenceModel,
    influence: Influence,
    query: Rows,
    progress: ProgressFactory = silent,
    checkpoints: Checkpoints | None = None,
    detection: DetectionConfig | None = None,
    rows: Rows | None = None,
) -> Injected:
    """What tells misaligned rows, learned from mismatches that are injected on purpose.

    Args:
        model: not fitted.
        influence: a fit to the rows.
        query: of the fits to rows with mismatches.
        progress: makes a progress bar.
        checkpoints: keep what was done.
        detection: how many runs, and how much is exchanged in each.
        rows: into which mismatches are injected, verified rows after those of the fit; the latter
            alone if absent.
    """
    train, config = rows or influence.rows, detection or DetectionConfig()
    known = checkpoints or Checkpoints()
    generator = stream(model.config.seed, "injection")
    given = model.embed_as_given(train)
    advance = progress("Plant wrong pairs", config.injections)
    reference, unlike, alike, kept = [], [], [], []
    for number in range(config.injections):
        planting = plant(
            train, given.image, share=config.injected_share, clusters=10, generator=generator
        )
        within = known.within(f"{number:02d}")
        # Their curvature differs little; it is damped alike.
        spectrum = influence.fitted.spectrum
        other = model.fit(planting.rows, query, checkpoints=within, spectrum=spectrum)
        scores = other.scores(checkpoints=within)
        embedded = given._replace(text=given.text[planting.donors.to(given.text.device)])
        found = find_witnesses(scores, embedded, planting.rows.same_text).stack()
        planted, near = planting.planted.numpy(), planting.alike.numpy()
        reference.append(found[~planted])
        kept.append(np.flatnonzero(~planted))
        unlike.append(found[planted & ~near])
        alike.append(found[near])
        advance(1)
    kinds = [np.concatenate(unlike), np.concatenate(alike)]
    return Injected(np.concatenate(reference), kinds, np.concatenate(kept))
