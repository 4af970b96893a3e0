"""Which word of a caption its image contradicts.

Each word is left out in turn: a word is contradicted if the image fits the caption better without
it. How much that changes depends on where the word stands and on what the others repeat, and so
each word is taken alone, too: what it is worth as the last that is added to the others, and as the
first of all.
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
# Weight of a word's fit alone. On captions as written and with their tags in random order together,
# 67 % of the exchanged words are ranked first; 63 % without it, and 66 % where both weigh the same.
ALONE = 0.25
MOST_ROWS = 2000  # to be looked at: of more flagged rows, the most suspicious


@dataclass(frozen=True)
class Word:
    """A word of a caption.

    Attributes:
        start: its first character.
        end: the one after its last.
        text: the word.
        rise: of the pair's logit when the word is left out, in nats.
        lack: by how much the logit of the word alone is below that of the caption, in nats.
    """

    start: int
    end: int
    text: str
    rise: float
    lack: float

    @property
    def conflict(self) -> float:
        """How much the image contradicts it, to rank words by."""
        return self.rise + ALONE * self.lack

    @property
    def is_wrong(self) -> bool:
        """Whether the image contradicts it: it fits the rest better than the whole and the word."""
        return self.rise > LEAST_RISE and self.rise + self.lack > 0


def wrong_words(
    model: LoadedModel, rows: Rows, image: Tensor, suspicion: Floats, flag: Bools
) -> list[list[Word] | None]:
    """Contradicted words of the flagged rows, the worst first; None of rows not looked at.

    Args:
        model: its own parameters count, not the fitted ones.
        rows: the readable rows.
        image: ``(n, d)``, normalised embeddings of their images.
        suspicion: ``(n,)``, higher of pairs that are likelier to be misaligned.
        flag: ``(n,)``, which rows are flagged.
    """
    flagged = np.flatnonzero(flag)
    looked = flagged[np.argsort(-suspicion[flagged], kind="stable")][:MOST_ROWS].tolist()
    found: list[list[Word] | None] = [None] * len(rows)
    if not model.reads_captions:  # of embeddings alone, none of a part of a caption can be made
        return found
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
    values = torch.stack([rest - own, own - alone], dim=1).tolist()
    judged = [
        Word(start, end, caption[start:end], rise, lack)
        for (start, end), (rise, lack) in zip(words, values, strict=True)
    ]
    return sorted(judged, key=lambda word: -word.conflict)
