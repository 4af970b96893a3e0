"""What rows are known by: numbers that are equal where images or captions are.

Rows are not independent. Those with the image of another row or with its caption are its
*siblings*, those with both are *copies* of it. Siblings are no negatives of each other, and no
evidence for each other; copies are one pair that is there several times, see
`hf_ecif.influence.pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import xxhash
from PIL import Image
from torch import Tensor

from hf_ecif.data.captions import plain


@dataclass(frozen=True)
class Keys:
    """What rows are known by, ``(n,)`` each. Equal numbers are of equal things, in any data set.

    Attributes:
        images: int64, of the pixels.
        captions: int64, of the caption without case, spacing and punctuation; of what the model
            reads of it where that is cut off.
        truncated: whether the caption is longer than the model reads.
        unknown_script: whether the tokenizer has no pieces for the caption's script, but breaks it
            into single bytes or unknowns.
    """

    images: Tensor
    captions: Tensor
    truncated: Tensor
    unknown_script: Tensor

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Keys:
        """Keys of captions alone: no image is known to be equal to another, nothing is cut off.

        They are the same in all processes.
        """
        none = torch.zeros(len(texts), dtype=torch.bool)
        captions = torch.tensor([caption_key(text) for text in texts], dtype=torch.int64)
        unequal = [content_key(f"{row} {text}".encode(), seed=1) for row, text in enumerate(texts)]
        return cls(torch.tensor(unequal, dtype=torch.int64), captions, none, none)

    @classmethod
    def join(cls, parts: Sequence[Keys]) -> Keys:
        """Keys of rows that follow one another."""
        if not parts:
            return cls.of_texts([])
        columns = zip(*(part.parts() for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def __getitem__(self, rows: Tensor) -> Keys:
        return Keys(*(part[rows] for part in self.parts()))

    def with_captions_of(self, donors: Tensor) -> Keys:
        """The images stay, each with the caption of another row."""
        return replace(self[donors], images=self.images)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the fields."""
        return self.images, self.captions, self.truncated, self.unknown_script

    @property
    def siblings(self) -> Tensor:
        """``(n, 2)``; rows that agree in a column are siblings: by caption, by image."""
        return torch.stack([self.captions, self.images], dim=1)


def caption_key(text: str) -> int:
    """A number of 64 bits with a sign, equal for captions that are `plain` alike."""
    return content_key(plain(text).encode())


def image_key(image: Image.Image) -> int:
    """Key of an image's pixels, whatever the format of its file."""
    return content_key(image.tobytes(), seed=image.width)


def content_key(content: bytes, seed: int = 0) -> int:
    """Key of any content."""
    return xxhash.xxh3_64_intdigest(content, seed=seed) - 2**63


def firsts(keys: Tensor) -> tuple[Tensor, Tensor]:
    """First row of every distinct key, in order, and the number of that key for every row.

    Args:
        keys: ``(n,)``, or ``(n, L)`` where a key has several parts.

    >>> firsts(torch.tensor([70, 20, 70]))
    (tensor([0, 1]), tensor([0, 1, 0]))
    """
    distinct, number = torch.unique(keys, dim=0, return_inverse=True)
    firsts = torch.full((len(distinct),), len(keys))
    firsts.scatter_reduce_(0, number, torch.arange(len(keys)), "amin")
    order = firsts.argsort()
    return firsts[order], order.argsort()[number]
