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
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import stream

Ints = NDArray[np.int64]
TRIES = 32  # donors drawn at a time; if none fits, all are looked through


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

    A donor is drawn at random until one fits, since nearly all do: a search among all rows for
    every exchange would take the square of their number.

    Attributes:
        donors: as in `Injection`, so far.
        whole: likewise.
    """

    def __init__(
        self, rows: Rows, clusters: Tensor, among: Tensor | None, generator: torch.Generator
    ) -> None:
        allowed = torch.ones(len(rows), dtype=torch.bool) if among is None else among
        keys, self._generator = rows.siblings, generator
        self._captions, self._images = (firsts(column)[1].numpy() for column in keys.unbind(1))
        self._clusters, self._free = clusters.numpy(), allowed.numpy().copy()
        self._families = _grouped(self._images, self._free)
        self._sizes = np.bincount(self._images[self._free], minlength=len(self._families))
        self._left = self._sizes.copy()
        several = self._free & (self._sizes[self._images] > 1)
        self._pools = _Pools.of(self._clusters, self._free)
        self._pools_of_several = _Pools.of(self._clusters, several)
        self._donors = np.arange(len(rows))
        self._whole = np.zeros(len(rows), dtype=bool)

    @property
    def donors(self) -> Tensor:
        return torch.from_numpy(self._donors)

    @property
    def whole(self) -> Tensor:
        return torch.from_numpy(self._whole)

    def run(self, order: Tensor, count: int) -> None:
        """Exchange ``count`` captions or a few more, of the rows that come first in the order."""
        turn, done = 0, 0
        for row in order.tolist():
            if done >= count:
                break
            if not self._free[row]:
                continue
            family, alike = self._families[self._images[row]], turn % 2 == 1
            if len(family) > 1 and turn // 2 % 2 == 1:
                done += self._swap(row, family, alike)
            else:
                done += self._copy(row, family, alike)
            turn += 1

    def _copy(self, row: int, family: Ints, alike: bool) -> int:
        """Returns how many rows have had their turn by it, as `_swap` does."""
        donor = self._draw(row, family, self._pools, alike)
        self._donors[row] = row if donor is None else donor
        return self._take(np.array([row]))

    def _swap(self, row: int, family: Ints, alike: bool) -> int:
        donor = self._draw(row, family, self._pools_of_several, alike, whole=True)
        other = family if donor is None else self._families[self._images[donor]]
        for members, given in ((family, other), (other, family)):
            self._donors[members] = given[np.arange(len(members)) % len(given)]
            self._whole[members] = donor is not None
        return self._take(np.union1d(family, other))

    def _take(self, rows: Ints) -> int:
        """Rows that are exchanged no more; returns the number of those that were free."""
        rows = rows[self._free[rows]]
        self._free[rows] = False
        np.subtract.at(self._left, self._images[rows], 1)
        return len(rows)

    def _draw(
        self, row: int, family: Ints, pools: _Pools, alike: bool, *, whole: bool = False
    ) -> int | None:
        """A row that has no caption and no image in common with a family.

        Args:
            row: of the family.
            family: rows of an image.
            pools: from which.
            alike: whether from an image like it, if there is one.
            whole: whether none of the other image's captions may have been exchanged.
        """
        near = [pools.by_cluster[self._clusters[row]]] if alike else []
        for pool in (*near, pools.all):
            tried = pool[self._random(len(pool), TRIES)] if len(pool) else pool
            for candidates in (tried, pool):
                fitting = candidates[self._fit(candidates, family, whole)]
                if len(fitting):
                    return int(fitting[self._random(len(fitting))][0])
        return None

    def _fit(self, rows: Ints, family: Ints, whole: bool) -> NDArray[np.bool_]:
        captions, images = self._captions[rows], self._images[rows]
        fit = ~np.isin(captions, self._captions[family]) & (images != self._images[family[0]])
        return fit & (self._left[images] == self._sizes[images]) if whole else fit

    def _random(self, most: int, count: int = 1) -> Ints:
        return torch.randint(most, (count,), generator=self._generator).numpy()


class _Pools(NamedTuple):
    """Rows from which a donor is drawn: all, and those of each cluster."""

    all: Ints
    by_cluster: list[Ints]

    @classmethod
    def of(cls, clusters: Ints, allowed: NDArray[np.bool_]) -> _Pools:
        return cls(np.flatnonzero(allowed), _grouped(clusters, allowed))


def _grouped(labels: Ints, allowed: NDArray[np.bool_]) -> list[Ints]:
    """Allowed rows of every label, in their order."""
    rows = np.flatnonzero(allowed)
    rows = rows[labels[rows].argsort(kind="stable")]
    sizes = np.bincount(labels[rows], minlength=labels.max(initial=-1) + 1)
    return np.split(rows, sizes.cumsum()[:-1])


class Injected(NamedTuple):
    """Signals from runs in which some captions were exchanged on purpose; see `find_signals`.

    Attributes:
        reference: ``(R, S)`` of the rows that stayed as they are, run by run.
        kinds: ``(M, S)`` of every kind of those exchanged: for the caption of an image unlike their
            own, and of one like it. Those that the exchange made no worse are left out.
        rows: ``(R,)``, row numbers of the reference.
        exchanged: ``(E, S)`` of all those exchanged, by which it is judged what the model can tell:
            to one that knows nothing, those that fit worse do so by chance.
    """

    reference: Floats
    kinds: list[Floats]
    rows: NDArray[np.int64]
    exchanged: Floats


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
    heard = torch.ones(len(train), dtype=torch.bool) if mute is None else ~mute
    runs = config.runs(int(heard.sum()))
    advance = progress("Inject mismatches", runs)
    reference, exchanged, kept, all_exchanged = [], [], [], []
    for number in range(runs):
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
        found = find_signals(scores, as_given, embedded, injection.rows.siblings, ~heard).stack()
        stayed = (heard & ~injection.injected).numpy()
        reference.append(found[stayed])
        kept.append(np.flatnonzero(stayed))
        worse = _fits_worse(injection, given, embedded)
        exchanged.append([found[(kind & worse).numpy()] for kind in injection.kinds])
        all_exchanged.append(found[injection.injected.numpy()])
        advance(1)
    kinds = [kind for kind in map(np.concatenate, zip(*exchanged, strict=True)) if len(kind)]
    return Injected(
        np.concatenate(reference), kinds, np.concatenate(kept), np.concatenate(all_exchanged)
    )


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
