"""Captions by themselves: their words, and their embeddings by a model as given."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ecif.errors import UserError
from hf_ecif.influence.classification import freeze_captions

if TYPE_CHECKING:
    from hf_ecif.influence.loaded import LoadedModel

Span = tuple[int, int]  # of characters: from the first to the one after the last

# Scripts that leave no space between words, by the beginning of their characters' Unicode names.
SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
JOINERS = "'’-"  # within a word


def split_words(text: str, tokenizer: Any = None) -> list[Span]:
    """Words of a caption; where a script has no spaces between them, tokens in their place.

    >>> text = "a dog's well-worn toy, no. 3"
    >>> [text[start:end] for start, end in split_words(text)]
    ['a', "dog's", 'well-worn', 'toy', 'no', '3']

    Args:
        text: the caption.
        tokenizer: of the model; without one that knows where its tokens are, each character of a
            script without spaces counts as a word.
    """
    kinds = "".join(map(_kind, text))
    tokens: list[Span] | None = None
    words: list[Span] = []
    for match in re.finditer(r"w[wm]*(?:jw[wm]*)*|s[sm]*", kinds):
        if match.group().startswith("s"):
            tokens = _tokens(text, tokenizer) if tokens is None else tokens
            words += _cut(match.span(), tokens)
        else:
            words.append(match.span())
    return words


def leave_out(text: str, span: Span) -> str:
    """A caption without one of its words, and without the separators that this leaves over.

    >>> leave_out("lion, safari, animal", (6, 12)), leave_out("a red ball", (2, 5))
    ('lion, animal', 'a ball')
    """
    rest = " ".join(f"{text[: span[0]]} {text[span[1] :]}".split())
    rest = re.sub(r"\s+([,;:.、，。])", r"\1", rest)
    return re.sub(r"([,;:、，])[,;:、，\s]*\1", r"\1", rest).strip(" ,;:、，")


def embed_captions(model: LoadedModel, captions: list[str]) -> Tensor:
    """Normalised text embeddings ``(V, d)`` of the model as given.

    Raises:
        UserError: the model is one of embeddings, which reads no captions.
    """
    if not model.reads_captions:
        raise UserError(
            "New captions cannot be compared with embeddings alone, since the model that made them "
            "is not here: leave out `vocabulary`, or audit the pictures with the model."
        )
    encoder, parts = model.encoder, freeze_captions(model, captions)
    return torch.cat([encoder.embed(encoder.theta, part).text for part in parts])


def _kind(character: str) -> str:
    """Whether it is of a word, of a script without spaces, a mark on these, a joiner, or none."""
    if character in JOINERS:
        return "j"
    category = unicodedata.category(character)[0]
    if category not in "LNM":
        return " "
    if unicodedata.name(character, "").startswith(SPACELESS):
        return "s"
    return "m" if category == "M" else "w"


def _tokens(text: str, tokenizer: Any) -> list[Span]:
    """Where the tokens of a caption are."""
    if not getattr(tokenizer, "is_fast", False):
        return [(place, place + 1) for place in range(len(text))]
    return list(tokenizer(text, return_offsets_mapping=True)["offset_mapping"])


def _cut(run: Span, tokens: list[Span]) -> list[Span]:
    """A run of characters at where tokens begin; several tokens of one character are one word."""
    start, end = run
    starts = sorted({start, *(token[0] for token in tokens if start < token[0] < end)})
    return list(zip(starts, [*starts[1:], end], strict=True))
