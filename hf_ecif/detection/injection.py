"""Wrong pairs made on purpose, so that a detector can learn what wrong looks like here.

Half of them get the caption of any other row, half that of a row whose image looks alike: in real
data, captions are mixed up among like things, too, and such pairs are harder to find. Where images
have several captions, half of the exchanges take a single caption and half all of an image, as when
a list of files and one of captions got out of step: such captions agree with each other.
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
from hf_ecif.detection.signals import find_signals
from hf_ecif.engine.neighbours import cluster
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.engine.objectives.similarity import agree
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import stream


@dataclass(frozen=True)
class Injection:
    """Rows of which some have another row's caption.

    Attributes:
        rows: all rows, with the exchanged captions.
        donors: ``(n,)``, the row that each caption was taken from; its own where it stayed.
        clusters: ``(n,)``, of the images.
        whole: ``(n,)`` booleans, true where all captions of the image were exchanged together, and
            there are several.
    """

    rows: Rows
    donors: Tensor
    clusters: Tensor
    whole: Tensor

    @property
    def injected(self) -> Tensor:
        """``(n,)`` booleans, true where the caption was exchanged."""
        return self.donors != torch.arange(len(self.donors))

    @property
    def alike(self) -> Tensor:
        """``(n,)`` booleans, true where it was exchanged with that of an image of its cluster."""
        return self.injected & (self.clusters == self.clusters[self.donors])

    @property
    def kinds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(n,)`` booleans each: single captions of unlike and of like images, then whole ones."""
        near, single = self.alike, self.injected & ~self.whole
        return single & ~near, single & near, self.whole & ~near, self.whole & near


def inject(
    rows: Rows,
    image_embeddings: Tensor,
    *,
    share: float,
    clusters: int,
    generator: torch.Generator,
    among: Tensor | None = None,
) -> Injection:
    """Exchange the captions of a random ``share`` of the rows.

    Args:
        rows: the data.
        image_embeddings: ``(n, d)``, tell which images look alike.
        share: of the rows, in (0, 1).
        clusters: into which the images are grouped for the harder half.
        generator: of the choice.
        among: ``(n,)`` booleans, true for rows that may get or give a caption; all if absent.
    """
    labels = cluster(image_embeddings, clusters, int(generator.initial_seed()))
    exchange = _Exchange(rows, labels, among, generator)
    order = torch.randperm(len(rows), generator=generator)
    order = order if among is None else order[among[order]]
    exchange.run(order, max(2, round(share * len(order))))
    donors, whole = exchange.donors, exchange.whole
    return Injection(rows.with_texts_of(donors), donors, labels, whole)


class _Exchange:
    """Captions that are exchanged one after the other.

    A single caption is copied from its donor. Two images swap all of theirs: with the captions
    still under the other image, its own captions, which say the like, would give them away.

    Attributes:
        donors: as in `Injection`, so far.
        whole: likewise.
    """

    def __init__(
        self, rows: Rows, clusters: Tensor, among: Tensor | None, generator: torch.Generator
    ) -> None:
        self._siblings, self._clusters, self._generator = rows.siblings, clusters, generator
        self._free = torch.ones(len(rows), dtype=torch.bool) if among is None else among.clone()
        self._among = self._free.clone()
        self.donors = torch.arange(len(rows))
        self.whole = torch.zeros(len(rows), dtype=torch.bool)

    def run(self, order: Tensor, count: int) -> None:
        """Exchange ``count`` captions or a few more, of the rows that come first in the order."""
        turn, start = 0, int(self._free.sum())
        for row in order.tolist():
            if start - self._free.sum() >= count:
                break
            if not self._free[row]:
                continue
            family, alike = self._family(row), turn % 2 == 1
            if len(family) > 1 and turn // 2 % 2 == 1:
                self._swap(row, family, alike)
            else:
                self._copy(row, family, alike)
            turn += 1

    def _family(self, row: int) -> Tensor:
        """Rows that have the image of this one, itself among them."""
        images = self._siblings[:, 1]
        return ((images == images[row]) & self._among).nonzero()[:, 0]

    def _copy(self, row: int, family: Tensor, alike: bool) -> None:
        donor = self._draw(row, family, self._among, alike)
        self.donors[row] = row if donor is None else donor
        self._free[row] = False

    def _swap(self, row: int, family: Tensor, alike: bool) -> None:
        several = self._of_several()
        donor = self._draw(row, family, several & self._free, alike)
        families = [family, family if donor is None else self._family(donor)]
        for members, given in zip(families, reversed(families), strict=True):
            self.donors[members] = given[torch.arange(len(members)) % len(given)]
            self.whole[members] = donor is not None
            self._free[members] = False

    def _of_several(self) -> Tensor:
        """``(n,)`` booleans, true for rows whose image has several, none of them exchanged yet."""
        _, image = firsts(self._siblings[:, 1])
        rows, free = (
            torch.zeros(len(image)).index_add_(0, image, some.float())[image]
            for some in (self._among, self._free & self._among)
        )
        return (rows > 1) & (rows == free)

    def _draw(self, row: int, family: Tensor, among: Tensor, alike: bool) -> int | None:
        """A row that has no caption and no image in common with a family."""
        other = ~agree(self._siblings, self._siblings[family]).any(dim=1) & among
        near = other & (self._clusters == self._clusters[row])
        pool = (near if alike and near.any() else other).nonzero()[:, 0]
        if not len(pool):
            return None
        return int(pool[torch.randint(len(pool), (1,), generator=self._generator)])


class Injected(NamedTuple):
    """Signals from runs in which some captions were exchanged on purpose; see `find_signals`.

    Attributes:
        reference: ``(R, S)`` of the rows that stayed as they are, run by run.
        kinds: ``(M, S)`` of every kind of those exchanged: for the caption of an image unlike their
            own, and of one like it. Those that the exchange made no worse are left out.
        rows: ``(R,)``, row numbers of the reference.
    """

    reference: Floats
    kinds: list[Floats]
    rows: NDArray[np.int64]


def inject_mismatches(
    model: InfluenceModel,
    influence: Influence,
    query: Rows,
    progress: ProgressFactory = silent,
    checkpoints: Checkpoints | None = None,
    detection: DetectionConfig | None = None,
    rows: Rows | None = None,
    mute: Tensor | None = None,
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
        mute: ``(n,)`` booleans, true for rows that are no evidence: they get and give no captions,
            are nobody's neighbours, and not among those that stayed; none if absent.
    """
    train, config = rows or influence.rows, detection or DetectionConfig()
    known = checkpoints or Checkpoints()
    generator = stream(model.config.seed, "injection")
    given = model.embed_as_given(train)
    advance = progress("Inject mismatches", config.injections)
    heard = torch.ones(len(train), dtype=torch.bool) if mute is None else ~mute
    reference, exchanged, kept = [], [], []
    for number in range(config.injections):
        injection = inject(
            train,
            given.image,
            share=config.injected_share,
            clusters=10,
            generator=generator,
            among=heard,
        )
        within = known.within(f"{number:02d}")
        # Their curvature differs little; it is damped alike.
        spectrum = influence.fitted.spectrum
        other = model.fit(injection.rows, query, checkpoints=within, spectrum=spectrum)
        scores = other.scores(checkpoints=within)
        embedded = given._replace(text=given.text[injection.donors.to(given.text.device)])
        as_given = model.score_as_given(injection.rows, embedded)
        found = find_signals(
            scores, as_given, embedded, injection.rows.siblings, ~heard
        ).stack()
        stayed = (heard & ~injection.injected).numpy()
        reference.append(found[stayed])
        kept.append(np.flatnonzero(stayed))
        worse = _fits_worse(injection, given, embedded)
        exchanged.append([found[(kind & worse).numpy()] for kind in injection.kinds])
        advance(1)
    kinds = [kind for kind in map(np.concatenate, zip(*exchanged, strict=True)) if len(kind)]
    return Injected(np.concatenate(reference), kinds, np.concatenate(kept))


def _fits_worse(injection: Injection, given: Embeddings, exchanged: Embeddings) -> Tensor:
    """``(n,)`` booleans, true where the image fits the new caption worse than its own.

    Not every exchange makes a wrong pair: captions that say little ("face") are true of many
    images, and of one like their own the more so. An exchange that fits no worse to the model as
    given says nothing of what wrong pairs look like. If no other was made, all count.

    Args:
        injection: the exchange.
        given: embeddings of the rows as they were, by the model as given.
        exchanged: those of the rows with the exchanged captions.
    """
    before, after = ((one.text * one.image).sum(dim=1).cpu() for one in (given, exchanged))
    worse = after < before
    return worse if (worse & injection.injected).any() else torch.ones_like(worse)
