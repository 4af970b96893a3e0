"""Both losses written out on the whole matrix of logits, and derivatives by brute force."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_ecif.engine.objectives import Contrastive, Embeddings, Roles, infonce, sigmoid

# Captions 0 and 3 and captions 1, 6 and 7 are repeated.
SAME = torch.tensor([0, 1, 2, 0, 4, 5, 1, 1])
# And images 0 and 5 are one, as are 1 and 3: neither relation is part of the other.
SIBLINGS = torch.stack([SAME, torch.tensor([0, 1, 2, 1, 4, 0, 6, 7])], dim=1)
MASKS = pytest.mark.parametrize(
    "same", [None, SAME, SIBLINGS], ids=["all negatives", "by caption", "by caption or image"]
)


class Dense(NamedTuple):
    """A loss under test, and the same in its plainest form, as functions of ``(logits, same)``."""

    loss: Contrastive
    total: Callable[[Tensor, Tensor | None], Tensor]  # TERMS * B * L
    own: Callable[[Tensor, Tensor | None], Tensor]  # the terms of the pairs themselves, (B,)


def infonce_own(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """``-log p_nn - log q_nn`` of every pair."""
    if same is not None:  # a large finite number stands for infinity: exp(-1e4) is zero
        logits = logits.masked_fill(repeated(same), -1e4)
    return -logits.log_softmax(1).diagonal() - logits.log_softmax(0).diagonal()


def sigmoid_terms(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """``log(1 + exp(-y_ij S_ij))`` of every cell."""
    signed = logits * (2 * torch.eye(len(logits)) - 1)
    terms = torch.logaddexp(torch.zeros_like(signed), -signed)
    return terms if same is None else terms * ~repeated(same)


def repeated(same: Tensor) -> Tensor:
    keys = (same[:, None] if same.dim() == 1 else same).tolist()
    equal = [[any(a == b for a, b in zip(x, y, strict=True)) for y in keys] for x in keys]
    table = torch.tensor(equal, dtype=torch.bool).view(len(keys), len(keys))
    return table & ~torch.eye(len(keys), dtype=torch.bool)


INFONCE = Dense(infonce, lambda logits, same: infonce_own(logits, same).sum(), infonce_own)
SIGMOID = Dense(
    sigmoid,
    lambda logits, same: sigmoid_terms(logits, same).sum(),
    lambda logits, same: sigmoid_terms(logits, same).diagonal(),
)
LOSSES = pytest.mark.parametrize("dense", [INFONCE, SIGMOID], ids=["infonce", "sigmoid"])


def dense_logits(batch: Embeddings) -> Tensor:
    """``S_ij = scale * u_i . v_j + bias``."""
    return batch.scale * batch.text @ batch.image.T + batch.bias


def with_bias(batch: Embeddings, bias: float = -2.0) -> Embeddings:
    return batch._replace(bias=torch.tensor(bias).to(batch.text))


def removal(dense: Dense, logits: Tensor, same: Tensor | None, members: list[int]) -> Tensor:
    """What the sum of all terms loses when these pairs were never in the batch."""
    stay = [n for n in range(len(logits)) if n not in members]
    rest = dense.total(logits[stay][:, stay], None if same is None else same[stay])
    return dense.total(logits, same) - rest


def dense_roles(dense: Dense, logits: Tensor, same: Tensor | None = None) -> Roles:
    """The exact roles: a pair's own terms, and the rest of what its deletion takes away."""
    own = dense.own(logits, same)
    whole = torch.stack([removal(dense, logits, same, [n]) for n in range(len(logits))])
    return Roles(own, whole - own)


# ---------------------------------------------------------------- a batch as a vector, and back


def flat(batch: Embeddings) -> Tensor:
    """``(..., P)``, with ``P = 2 B d + 2``."""
    text, image, scale, bias = batch
    return torch.cat([text.flatten(-2), image.flatten(-2), scale[..., None], bias[..., None]], -1)


def unflat(vectors: Tensor, like: Embeddings) -> Embeddings:
    size = like.text.numel()
    text, image, scale, bias = vectors.split([size, size, 1, 1], dim=-1)
    shape = (*vectors.shape[:-1], *like.text.shape)
    return Embeddings(text.reshape(shape), image.reshape(shape), scale[..., 0], bias[..., 0])


def random_tangents(batch: Embeddings, seed: int = 1, count: int = 3) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    size = 2 * batch.text.numel() + 2
    return unflat(torch.randn(count, size, generator=generator, dtype=torch.float64), batch)


def every_direction(batch: Embeddings) -> Embeddings:
    return unflat(torch.eye(2 * batch.text.numel() + 2, dtype=torch.float64), batch)


def central_difference(
    function: Callable[[Embeddings], Tensor], batch: Embeddings, tangents: Embeddings
) -> Tensor:
    """``(f(x + h t) - f(x - h t)) / 2h`` for every tangent."""
    step, point = 1e-5, flat(batch)
    return torch.stack(
        [
            (function(unflat(point + step * t, batch)) - function(unflat(point - step * t, batch)))
            / (2 * step)
            for t in flat(tangents)
        ]
    )
