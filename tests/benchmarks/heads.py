"""The two projections of a fitted CLIP as plain layers, and its loss over them written out.

What other tools need of the `Problem` of `tests.benchmarks.lds`; none of our own engine is in it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from hf_ecif.engine.objective import random_batches
from hf_ecif.influence.rows import Rows
from tests.benchmarks.lds import CONFIG, Problem


class Heads(nn.Module):
    """The two projections as layers; as the other tools look for them."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        for name, weight in zip(("visual", "text"), heads_of(problem.theta, problem), strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data.copy_(weight)
            self.add_module(f"{name}_projection", layer)

    def forward(self, text: dict[str, Tensor], image: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised embeddings."""
        embedded = self.text_projection(text["hidden"]), self.visual_projection(image["hidden"])
        return normalize(embedded[0], dim=1), normalize(embedded[1], dim=1)


def logits_of(text: Tensor, image: Tensor, scale: float, same: Tensor) -> Tensor:
    """Pairs of a batch with equal captions are not told apart, as in ours."""
    repeated = (same[:, None] == same) & ~torch.eye(len(same), dtype=torch.bool)
    return (scale * text @ image.T).masked_fill(repeated, -torch.inf)


def pair_losses(logits: Tensor, labels: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """``(B,)``, whose mean is CLIP's loss; the labels of both ways are the pairs' own if absent."""
    images, texts = labels or (torch.arange(len(logits)),) * 2
    to_image = cross_entropy(logits, images, reduction="none")
    to_text = cross_entropy(logits.T, texts, reduction="none")
    return (to_image + to_text) / 2


def heads_of(theta: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Matrices of the visual and the textual projection."""
    model = problem.model
    shapes = [model.visual_projection.weight.shape, model.text_projection.weight.shape]
    visual, textual = theta.split([shape.numel() for shape in shapes])
    return visual.view(shapes[0]), textual.view(shapes[1])


def losses_at(theta: Tensor, batch: Tensor, rows: Rows, problem: Problem, scale: float) -> Tensor:
    """`pair_losses` of a contrastive batch as a function of the flat parameters."""
    visual, textual = heads_of(theta, problem)
    text = normalize(rows.features.text["hidden"][batch] @ textual.T, dim=1)
    image = normalize(rows.features.image["hidden"][batch] @ visual.T, dim=1)
    return pair_losses(logits_of(text, image, scale, rows.same_text[batch]))


def partitions(problem: Problem, count: int) -> list[Tensor]:
    """The training batches, and those of as many random partitions as ours averages over."""
    generator = torch.Generator().manual_seed(CONFIG.seed + 1)
    more = [
        batch
        for _ in range(count - 1)
        for batch in random_batches(len(problem.train), CONFIG.batch_size, generator)
    ]
    return [*problem.batches, *more]


def average_visits(batches: list[Tensor], values: Tensor, count: int) -> Tensor:
    """Mean over the visits of each row, from values in the order of the batches."""
    rows = torch.cat(batches)
    total = torch.zeros(count).index_add_(0, rows, values.float())
    return total / torch.bincount(rows, minlength=count)
