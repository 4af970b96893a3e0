"""Which word of a caption its image contradicts.

Each word is left out in turn, and each is taken alone: a word is contradicted if the image fits the
rest of the caption better than the word. That is the mean of what the word takes from the fit when
it is the last to be added to the others and when it is the first, and so half-way between leaving
out, which misses a word that others repeat, and the word alone, which knows nothing of its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_ecif.detection.captions import Span, embed_captions, leave_out, split_words
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.formatting import Bools, Floats

if TYPE_CHECKING:
    from hf_ecif.influence.loaded import LoadedModel

# By how many nats the logit of a pair must rise without a word for the word to be named. Of the
# words so named in the demo's captions with one exchanged word, four fifths are that word.
LEAST_RISE = 0.5
MOST_ROWS = 2000  # to be looked at: of more flagged rows, the most probable


@dataclass(frozen=True)
class Word:
    """A word of a caption.

    Attributes:
        start: its first character.
        end: the one after its last.
        text: the word.
        conflict: how much better the image fits the rest of the caption than the word, in nats of
            the model's logits; higher is more contradicted.
        rise: of the pair's logit when the word is left out, in nats.
    """

    start: int
    end: int
    text: str
    conflict: float
    rise: float

    @property
    def is_wrong(self) -> bool:
        """Whether the image contradicts it."""
        return self.conflict > 0 and self.rise > LEAST_RISE


def wrong_words(
    model: LoadedModel, rows: Rows, image: Tensor, probability: Floats, flag: Bools
) -> list[list[Word] | None]:
    """Contradicted words of the flagged rows, the worst first; None of rows not looked at.

    Args:
        model: its own parameters count, not the fitted ones.
        rows: the readable rows.
        image: ``(n, d)``, normalised embeddings of their images.
        probability: ``(n,)``, of being misaligned.
        flag: ``(n,)``, which rows are flagged.
    """
    flagged = np.flatnonzero(flag)
    looked = flagged[np.argsort(-probability[flagged], kind="stable")][:MOST_ROWS].tolist()
    found: list[list[Word] | None] = [None] * len(rows)
    judged = judge_words(model, [rows.texts[row] for row in looked], image[looked])
    for row, words in zip(looked, judged, strict=True):
        found[row] = [word for word in words if word.is_wrong]
    return found


def judge_words(model: LoadedModel, captions: list[str], image: Tensor) -> list[list[Word]]:
    """Words of captions by how much their images contradict them, the worst first.

    A caption of a single word has none: nothing remains of it.

    Args:
        model: as given.
        captions: ``n`` of them.
        image: ``(n, d)``, normalised embeddings of their images.
    """
    spans = [_separable(split_words(text, model.processor.tokenizer)) for text in captions]
    texts = {
        text for one, words in zip(captions, spans, strict=True) for text in _parts(one, words)
    }
    ordered = sorted(texts)
    if not ordered:
        return [[] for _ in captions]
    number = {text: place for place, text in enumerate(ordered)}
    vectors = embed_captions(model, ordered)
    scale = float(model.encoder.scale)
    found = []
    for row, (caption, words) in enumerate(zip(captions, spans, strict=True)):
        fit = scale * (vectors[[number[text] for text in _parts(caption, words)]] @ image[row])
        found.append(_judge(caption, words, fit))
    return found


def _separable(words: list[Span]) -> list[Span]:
    return words if len(words) > 1 else []


def _parts(caption: str, words: list[Span]) -> list[str]:
    """The caption, then without each word, then each word."""
    if not words:
        return []
    rests = [leave_out(caption, span) for span in words]
    return [caption, *rests, *(caption[start:end] for start, end in words)]


def _judge(caption: str, words: list[Span], fit: Tensor) -> list[Word]:
    count = len(words)
    if not count:
        return []
    own, rest, alone = fit.double().cpu().split([1, count, count])
    values = torch.stack([rest - alone, rest - own], dim=1).tolist()
    judged = [
        Word(start, end, caption[start:end], conflict, rise)
        for (start, end), (conflict, rise) in zip(words, values, strict=True)
    ]
    return sorted(judged, key=lambda word: -word.conflict)
