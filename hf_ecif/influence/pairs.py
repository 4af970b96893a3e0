"""A data set as a graph: distinct images and captions, and distinct pairs as edges between them.

Copies of a pair would vouch for each other, whether it is right or wrong: a model that has seen the
copy knows the pair. So a pair is judged once, and its copies share the verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_ecif.engine.neighbours import group_near
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.rows import Rows

Record = TypeVar("Record", bound=Any)

# A JPEG of quality 75 or a copy of half the size is this near to its image in 99 of 100 cases of
# the demo. Of different pictures, 5 pairs in 1,492 rows are, and look it. Captions have no such
# cosine: different words can have the very same embedding.
SAME_IMAGE = 0.995
# To a model that has learned nothing, most images are as near as that. So they must also be so many
# times nearer than two images are as a rule; for the demo's model, that is no more to ask.
NEARER = 200
SAMPLED = 2000  # pairs of images that tell the rule


@dataclass(frozen=True)
class Pairs:
    """The distinct pairs of a data set.

    Attributes:
        rows: ``m``, the first row of every pair, in an order that is that of the data in no way:
            neither copies nor another order of the data change what is found.
        first: ``(m,)``, their numbers among the readable rows of the data.
        number: ``(n,)``, the pair of every readable row of the data.
    """

    rows: Rows
    first: Tensor
    number: Tensor

    @property
    def copies(self) -> Tensor:
        """``(m,)``, as how many rows every pair is there."""
        return torch.bincount(self.number, minlength=len(self.rows))

    def spread(self, record: Record) -> Record:
        """What is known of the pairs, for every row of the data: copies share it.

        Args:
            record: a dataclass; its tensors, arrays and lists whose last dimension is ``m`` are
                spread, everything else stays.
        """
        values = {field.name: getattr(record, field.name) for field in fields(record)}
        spread = {name: self._spread(value) for name, value in values.items()}
        return replace(record, **spread)

    def _spread(self, value: Any) -> Any:
        if isinstance(value, list) and len(value) == len(self.rows):
            return [value[number] for number in self.number.tolist()]
        if not isinstance(value, Tensor | np.ndarray) or value.shape[-1:] != (len(self.rows),):
            return value
        return value[..., self.number if isinstance(value, Tensor) else self.number.numpy()]


def distinct_pairs(rows: Rows) -> Pairs:
    """Every pair of an image and a caption once."""
    distinct, number = torch.unique(rows.siblings, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(rows))
    first.scatter_reduce_(0, number, torch.arange(len(rows)), "amin")
    return Pairs(rows.select(first), first, number)


def join_near_images(
    rows: Rows, images: Tensor, advance: Callable[[int], None] = lambda rows: None
) -> Rows:
    """Rows in which those with nearly equal images count as having one image.

    Time grows with the square of the number of rows: one product of all images with all.

    Args:
        rows: the data.
        images: ``(n, d)``, their embeddings by the model as given.
        advance: called with the number of rows done, for a progress bar.
    """
    group = group_near(images, least_cosine(rows, images), advance)
    # The least of a group's keys, wherever its row is.
    keys = torch.full_like(rows.keys.images, torch.iinfo(torch.int64).max)
    keys.scatter_reduce_(0, group, rows.keys.images, "amin")
    return rows.with_images(keys[group])


def least_cosine(rows: Rows, images: Tensor) -> float:
    """Cosine from which on two images of these data count as one.

    Args:
        rows: the data.
        images: ``(n, d)``, their embeddings by the model as given.
    """
    first, _ = firsts(rows.keys.images)
    return 1 - min(1 - SAME_IMAGE, _usual_distance(images[first.to(images.device)]) / NEARER)


def _usual_distance(images: Tensor) -> float:
    """Median cosine distance of two images."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(images), (2, SAMPLED), generator=generator)
    first, second = drawn[:, drawn[0] != drawn[1]].to(images.device)
    return float((1 - (images[first] * images[second]).sum(dim=1)).median()) if len(first) else 0.0
