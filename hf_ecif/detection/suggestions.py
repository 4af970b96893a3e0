"""What the other rows say of a flagged one: better captions, better images, and duplicates.

Everything is judged by the embeddings of the model as given. A caption is suggested only where it
is probably the right one, and fits the image better than the row's own caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif.config import SUGGEST_PROBABILITY
from hf_ecif.data.captions import plain
from hf_ecif.detection.captions import embed_captions
from hf_ecif.detection.detect import Detection
from hf_ecif.detection.mixture import Floats
from hf_ecif.detection.replacements import (
    Candidates,
    Pairs,
    Rightness,
    find_winners,
    learn_rightness,
)
from hf_ecif.detection.words import Word, wrong_words
from hf_ecif.engine.neighbours import count_better, link
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.errors import UserError
from hf_ecif.influence.keys import Keys, firsts
from hf_ecif.influence.rows import Rows

if TYPE_CHECKING:
    from hf_ecif.influence.loaded import LoadedModel

Numbers = NDArray[np.int64]
Cell = TypeVar("Cell")
# Share of the rows beyond those that were learned from whose words are looked at, the most
# suspicious ones: a caption of ten words takes twenty passes of the text tower.
LOOKED_AT = 0.02


@dataclass(frozen=True)
class Evidence:
    """Evidence on the readable rows, ``(n,)`` each. Row numbers are those of the data set.

    Attributes:
        better_images: how many other images the caption fits better than its own; -1 where the row
            is not flagged.
        better_text: the candidate caption that fits the image best, where it is better than the
            row's own; None elsewhere, and where the row is not flagged.
        better_row: a row with that caption; -1 where it is of a vocabulary or there is none.
        margin: by how much its logit is above those of the row's own caption and of the next best
            one, in nats; NaN where there is none.
        probability: that it is the row's right caption; NaN where there is none, or too few rows
            to learn that from.
        least_margin: from which on it is suggested; likewise `least_probability`.
        wrong_words: those that the image contradicts, the worst first; None where the row was not
            looked at.
        same_image: first row with nearly the same image; the row itself where it is alone.
        same_caption: first row with the same caption but for case, spacing and punctuation.
        duplicate: first row that is linked to this one by equal images or captions.
        suggester: what finds captions for other rows in the same way.
    """

    better_images: Numbers
    better_text: list[str | None]
    better_row: Numbers
    margin: Floats
    probability: Floats
    least_margin: float
    least_probability: float
    wrong_words: list[list[Word] | None]
    same_image: Numbers
    same_caption: Numbers
    duplicate: Numbers
    suggester: Suggester | None = None

    @property
    def suggested(self) -> NDArray[np.bool_]:
        """Where the better caption is suggested."""
        likely = np.nan_to_num(self.probability) >= self.least_probability
        return (self.margin >= self.least_margin) & likely

    @property
    def suggested_text(self) -> list[str | None]:
        """The suggested captions, None elsewhere."""
        return self._if_suggested(self.better_text)

    @property
    def suggested_margin(self) -> list[float | None]:
        """Their margins, in nats."""
        return self._if_suggested(self.margin.tolist())

    @property
    def suggested_probability(self) -> list[float | None]:
        """Their probabilities of being right; None, too, where that is not known."""
        known = [None if math.isnan(value) else value for value in self.probability.tolist()]
        return self._if_suggested(known)

    @property
    def expected_right(self) -> float:
        """How many of the suggested captions are right, by their probabilities."""
        return float(np.nansum(self.probability[self.suggested]))

    def _if_suggested(self, values: Sequence[Cell | None]) -> list[Cell | None]:
        pairs = zip(values, self.suggested.tolist(), strict=True)
        return [value if good else None for value, good in pairs]

    @property
    def duplicate_group(self) -> list[int | None]:
        """`duplicate` of the rows that have others like them, None for the rest."""
        first, inverse, sizes = np.unique(self.duplicate, return_inverse=True, return_counts=True)
        shared = (sizes > 1)[inverse].tolist()
        pairs = zip(first[inverse].tolist(), shared, strict=True)
        return [group if many else None for group, many in pairs]

    def describe_duplicates(self) -> dict[str, dict[str, int]]:
        """Groups of more than one row, and rows in them, by what is alike."""
        kinds = {"image": self.same_image, "caption": self.same_caption, "either": self.duplicate}
        return {kind: describe_groups(first) for kind, first in kinds.items()}


@dataclass(frozen=True)
class Suggester:
    """Captions to suggest, the images that they are compared on, and how far they are trusted.

    Attributes:
        candidates: the captions.
        texts: ``K``, in the order of `Candidates.key`.
        rows: ``(K,)``, a row with each; -1 where it is of a vocabulary.
        plain: ``(K,)``, what each is known by in any data set; see `caption_key`.
        images: ``(n, d)``, of the data that they were learned from.
        scale: of the model's logits.
        rightness: tells whether a caption is right; None where too few rows tell it.
        least_margin: from which on it is suggested; likewise ``least_probability``.
        least_suspicion: from which on the words of a flagged row are looked at.
    """

    candidates: Candidates
    texts: list[str]
    rows: Numbers
    plain: Tensor
    images: Tensor
    scale: float
    rightness: Rightness | None
    least_margin: float
    least_probability: float
    least_suspicion: float

    def evidence(
        self, model: LoadedModel, rows: Rows, given: Embeddings, detection: Detection
    ) -> Evidence:
        """Evidence on rows beyond these data; duplicates are not looked for.

        Args:
            model: as for `find_evidence`.
            rows: the rows, which were not learned from.
            given: their embeddings by the model as given.
            detection: of them.
        """
        found = self.better(rows.texts, given, detection.flag)
        own, suspicion = rows.positions.numpy(), detection.suspicion
        looked = detection.flag & (suspicion >= self.least_suspicion)
        return Evidence(
            better_images=_count_better_images(given, detection, self.images),
            better_text=found.text,
            better_row=found.row,
            margin=found.margin,
            probability=found.probability,
            least_margin=self.least_margin,
            least_probability=self.least_probability,
            wrong_words=wrong_words(model, rows, given.image, suspicion, looked),
            same_image=own,
            same_caption=own,
            duplicate=own,
        )

    def better(self, texts: list[str], given: Embeddings, flag: NDArray[np.bool_]) -> Better:
        """Captions that fit flagged rows better than their own.

        Args:
            texts: captions of rows that were not learned from.
            given: embeddings of the rows.
            flag: ``(m,)``, which of them are flagged.
        """
        flagged, better = np.flatnonzero(flag), Better.none(len(texts))
        if not len(flagged) or not len(self.texts):
            return better
        here = torch.from_numpy(flagged)
        new = Pairs(given.image, given.text, self._keys(texts), self.scale)
        winners = find_winners(new, here, self.candidates, images=self.images)
        chance = np.full(len(flagged), np.nan)
        if self.rightness is not None:
            chance = self.rightness(winners.features)
        better.fill(flagged, winners.number, winners.margin, chance, self.texts, self.rows)
        return better

    def _keys(self, texts: list[str]) -> Tensor:
        """Key of the candidate that says the same as each caption, -1 where none does."""
        order = self.plain.argsort()
        known, own = self.plain[order], Keys.of_texts(texts).captions
        place = torch.searchsorted(known, own).clamp(max=len(known) - 1)
        return torch.where(known[place] == own, self.candidates.key[order[place]], -1)


def find_evidence(
    model: LoadedModel,
    rows: Rows,
    detection: Detection,
    *,
    vocabulary: list[str] | None = None,
    margin: float = 0.0,
    probability: float = SUGGEST_PROBABILITY,
    mute: Tensor | None = None,
    seed: int = 0,
) -> Evidence:
    """Compare the flagged rows with all others, and look for duplicates.

    Args:
        model: its own parameters count, not the fitted ones.
        rows: the readable rows; which have nearly the same image, `join_near_images` finds.
        detection: of these rows.
        vocabulary: captions to suggest; those of all rows, if absent.
        margin: from which on a caption is suggested, in nats.
        probability: of being right, from which on a caption is suggested.
        mute: ``(n,)`` booleans, true for rows whose captions are not suggested.
        seed: of the exchanges that this probability is learnt from.
    """
    embeddings = model.embed_as_given(rows)
    better, suggester = _find_better(
        model, rows, embeddings, detection, vocabulary, mute, seed, (margin, probability)
    )
    positions = rows.positions.cpu()
    same_image, same_caption = map(first_like, (rows.keys.images, rows.keys.captions))
    own = torch.arange(len(rows))
    duplicate = link(len(rows), iter([(own, same_image), (own, same_caption)]))
    return Evidence(
        better_images=_count_better_images(embeddings, detection, embeddings.image),
        better_text=better.text,
        better_row=better.row,
        margin=better.margin,
        probability=better.probability,
        least_margin=margin,
        least_probability=probability,
        wrong_words=wrong_words(model, rows, embeddings.image, detection.suspicion, detection.flag),
        same_image=positions[same_image].numpy(),
        same_caption=positions[same_caption].numpy(),
        duplicate=positions[duplicate].numpy(),
        suggester=suggester,
    )


def read_vocabulary(path: Path) -> list[str]:
    """Captions of a text file, one a line.

    Raises:
        UserError: the file cannot be read, or has no captions.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`vocabulary={path}` cannot be read as UTF-8 text: {error}. Give a text file with one "
            "caption a line."
        ) from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"`vocabulary={path}` has no captions. Write one on every line.")
    return captions


@dataclass(frozen=True)
class Better:
    """The fields of `Evidence` of captions that fit better, ``(n,)`` each."""

    text: list[str | None]
    row: Numbers
    margin: Floats
    probability: Floats

    @classmethod
    def none(cls, count: int) -> Better:
        """For so many rows, none."""
        return cls(
            [None] * count, np.full(count, -1), np.full(count, np.nan), np.full(count, np.nan)
        )

    def fill(
        self,
        rows: Numbers,
        number: Tensor,
        margin: Floats,
        probability: Floats,
        texts: Sequence[str],
        sources: Numbers,
    ) -> None:
        """Enter the candidates of some rows, ``(m,)`` each, where these fit better than their own.

        Args:
            rows: numbers of the rows.
            number: of the candidate of each.
            margin: likewise, as in `Evidence`.
            probability: likewise.
            texts: of all candidates.
            sources: ``(K,)``, a row with each.
        """
        for place in np.flatnonzero(margin > 0).tolist():
            row, candidate = int(rows[place]), int(number[place])
            self.text[row], self.row[row] = texts[candidate], sources[candidate]
            self.margin[row], self.probability[row] = margin[place], probability[place]


def _find_better(
    model: LoadedModel,
    rows: Rows,
    embeddings: Embeddings,
    detection: Detection,
    vocabulary: list[str] | None,
    mute: Tensor | None,
    seed: int,
    least: tuple[float, float],
) -> tuple[Better, Suggester]:
    """Captions that fit flagged rows better than their own, and what finds them for others."""
    count, flagged = len(rows), np.flatnonzero(detection.flag)
    better = Better.none(count)
    # Captions of the rows come first, so that each is known by the first row that has it.
    texts = [*rows.texts, *(vocabulary or [])]
    key = _group_equal([plain(text) for text in texts])
    pairs = Pairs(embeddings.image, embeddings.text, key[:count], float(embeddings.scale))
    listed = _listed(model, vocabulary, key[count:]) if vocabulary is not None else None
    speaks = torch.ones(count, dtype=torch.bool) if mute is None else ~mute
    speaking = pairs.select(speaks.nonzero()[:, 0])
    candidates = Candidates.of(speaking) if listed is None else listed
    known, positions = [texts[number] for number in candidates.key.tolist()], rows.positions
    sources = np.full(len(known), -1)
    if vocabulary is None:
        sources = positions[candidates.key].numpy()
    suggester = Suggester(
        candidates=candidates,
        texts=known,
        rows=sources,
        plain=Keys.of_texts(known).captions,
        images=embeddings.image,
        scale=pairs.scale,
        rightness=None,
        least_margin=least[0],
        least_probability=least[1],
        least_suspicion=float(np.quantile(detection.suspicion, 1 - LOOKED_AT)),
    )
    if not len(flagged) or not len(known):
        return better, suggester
    winners = find_winners(pairs, torch.from_numpy(flagged), candidates)
    flag, suspicion = detection.flag[speaks.numpy()], detection.probability[speaks.numpy()]
    rightness = learn_rightness(speaking, winners, flag, suspicion, vocabulary=listed, seed=seed)
    chance = np.full(len(flagged), np.nan) if rightness is None else rightness(winners.features)
    better.fill(flagged, winners.number, winners.margin, chance, known, sources)
    return better, replace(suggester, rightness=rightness)


def _listed(model: LoadedModel, vocabulary: list[str], key: Tensor) -> Candidates:
    """The captions of a vocabulary, each once."""
    unique, which = torch.unique(key, return_inverse=True)
    first = torch.full_like(unique, len(key))
    first.scatter_reduce_(0, which, torch.arange(len(which)), "amin")
    return Candidates(unique, embed_captions(model, [vocabulary[i] for i in first.tolist()]))


def _count_better_images(embeddings: Embeddings, detection: Detection, images: Tensor) -> Numbers:
    """`Evidence.better_images`, among these images."""
    flagged = torch.from_numpy(np.flatnonzero(detection.flag)).to(embeddings.image.device)
    image, text = embeddings.image[flagged], embeddings.text[flagged]
    counts = np.full(len(detection.flag), -1)
    better = count_better(text, images, (image * text).sum(dim=1))
    counts[detection.flag] = better.cpu().numpy()
    return counts


def _group_equal(keys: list[str]) -> Tensor:
    firsts: dict[str, int] = {}
    return torch.tensor([firsts.setdefault(key, row) for row, key in enumerate(keys)])


def first_like(keys: Tensor) -> Tensor:
    """``(n,)``, the first row with the key of each."""
    first, number = firsts(keys)
    return first[number]


def describe_groups(first: Numbers) -> dict[str, int]:
    """Groups of more than one row, the rows in them, and the rows of the largest.

    Args:
        first: ``(n,)``, number of the first row of every row's group.
    """
    sizes = np.unique(first, return_counts=True)[1]
    shared = sizes[sizes > 1]
    return {"groups": len(shared), "rows": int(shared.sum()), "largest": int(sizes.max())}
