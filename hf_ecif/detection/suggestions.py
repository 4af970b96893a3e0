"""What the other rows say of a flagged one: better captions, better images, and duplicates.

Everything is judged by the embeddings of the model as given. A caption is suggested only where it
is probably the right one, and fits the image better than the row's own caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    find_winners,
    probability_right,
)
from hf_ecif.detection.words import Word, wrong_words
from hf_ecif.engine.neighbours import count_better, link
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.errors import UserError
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.rows import Rows

if TYPE_CHECKING:
    from hf_ecif.influence.loaded import LoadedModel

Numbers = NDArray[np.int64]
Cell = TypeVar("Cell")


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
        return {kind: _describe_groups(first) for kind, first in kinds.items()}


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
    better = _find_better(model, rows, embeddings, detection, vocabulary, mute, seed)
    positions = rows.positions.cpu()
    same_image, same_caption = map(_first_like, (rows.keys.images, rows.keys.captions))
    own = torch.arange(len(rows))
    duplicate = link(len(rows), iter([(own, same_image), (own, same_caption)]))
    return Evidence(
        better_images=_count_better_images(embeddings, detection),
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
class _Better:
    """The fields of `Evidence` of captions that fit better, ``(n,)`` each."""

    text: list[str | None]
    row: Numbers
    margin: Floats
    probability: Floats


def _find_better(
    model: LoadedModel,
    rows: Rows,
    embeddings: Embeddings,
    detection: Detection,
    vocabulary: list[str] | None,
    mute: Tensor | None,
    seed: int,
) -> _Better:
    """Captions that fit flagged rows better than their own."""
    count, flagged = len(rows), np.flatnonzero(detection.flag)
    nothing = np.full(count, np.nan)
    better = _Better([None] * count, np.full(count, -1), nothing, nothing.copy())
    # Captions of the rows come first, so that each is known by the first row that has it.
    texts = [*rows.texts, *(vocabulary or [])]
    key = _group_equal([plain(text) for text in texts])
    pairs = Pairs(embeddings.image, embeddings.text, key[:count], float(embeddings.scale))
    listed = _listed(model, vocabulary, key[count:]) if vocabulary is not None else None
    speaks = torch.ones(count, dtype=torch.bool) if mute is None else ~mute
    speaking = pairs.select(speaks.nonzero()[:, 0])
    candidates = Candidates.of(speaking) if listed is None else listed
    if not len(flagged) or not len(candidates.key):
        return better
    winners = find_winners(pairs, torch.from_numpy(flagged), candidates)
    flag, suspicion = detection.flag[speaks.numpy()], detection.probability[speaks.numpy()]
    chance = probability_right(speaking, winners, flag, suspicion, vocabulary=listed, seed=seed)
    positions = rows.positions.tolist()
    for number, row in enumerate(flagged.tolist()):
        if winners.margin[number] > 0:
            first = int(winners.key[number])
            better.text[row] = texts[first]
            better.row[row] = positions[first] if vocabulary is None else -1
            better.margin[row], better.probability[row] = winners.margin[number], chance[number]
    return better


def _listed(model: LoadedModel, vocabulary: list[str], key: Tensor) -> Candidates:
    """The captions of a vocabulary, each once."""
    unique, which = torch.unique(key, return_inverse=True)
    first = torch.full_like(unique, len(key))
    first.scatter_reduce_(0, which, torch.arange(len(which)), "amin")
    return Candidates(unique, embed_captions(model, [vocabulary[i] for i in first.tolist()]))


def _count_better_images(embeddings: Embeddings, detection: Detection) -> Numbers:
    """`Evidence.better_images`."""
    flagged = torch.from_numpy(np.flatnonzero(detection.flag)).to(embeddings.image.device)
    image, text = embeddings.image[flagged], embeddings.text[flagged]
    counts = np.full(len(detection.flag), -1)
    better = count_better(text, embeddings.image, (image * text).sum(dim=1))
    counts[detection.flag] = better.cpu().numpy()
    return counts


def _group_equal(keys: list[str]) -> Tensor:
    firsts: dict[str, int] = {}
    return torch.tensor([firsts.setdefault(key, row) for row, key in enumerate(keys)])


def _first_like(keys: Tensor) -> Tensor:
    """``(n,)``, the first row with the key of each."""
    first, number = firsts(keys)
    return first[number]


def _describe_groups(first: Numbers) -> dict[str, int]:
    sizes = np.unique(first, return_counts=True)[1]
    shared = sizes[sizes > 1]
    return {"groups": len(shared), "rows": int(shared.sum()), "largest": int(sizes.max())}
