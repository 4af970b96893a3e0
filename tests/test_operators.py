"""The objective against autograd and dense matrices of `CLIPModel`'s own loss."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from curvlinops import GGNLinearOperator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPModel

from hf_ecif.encoders import DualEncoder, Features
from hf_ecif.operators import Objective, random_batches

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
MakeClip = Callable[..., CLIPModel]
BATCHES = [torch.tensor(rows) for rows in ([0, 3, 5, 7], [9, 1, 2, 4], [8, 6, 0, 1])]
L2 = 0.3
WITH_SCALE = r"projection\.|logit_scale"


def clip_output(
    model: CLIPModel, names: list[str], theta: Tensor, features: Features, **options: bool
):
    """`CLIPModel.forward` with ``theta`` in place of the named parameters."""
    shapes = [model.get_parameter(name).shape for name in names]
    pieces = theta.split([shape.numel() for shape in shapes])
    weights = {n: x.view(s) for n, x, s in zip(names, pieces, shapes, strict=True)}
    inputs = {**features.text, **features.image, **options}
    with sdpa_kernel(SDPBackend.MATH):  # eager attention rounds its softmax to float32
        return functional_call(model, weights, kwargs=inputs)


def dense_objective(
    model: CLIPModel, names: list[str], features: Features, theta: Tensor
) -> Tensor:
    """``mean over batches of CLIPModel(return_loss=True) + l2/2 |theta|^2``."""
    losses = [
        clip_output(model, names, theta, features[batch], return_loss=True).loss
        for batch in BATCHES
    ]
    return torch.stack(losses).mean() + L2 / 2 * (theta**2).sum()


def cross_entropies(logits: Tensor) -> Tensor:
    """Mean over the ``2B`` classifications, from flat logits ``(B * B,)``."""
    square = logits.view(4, 4)
    return -(square.log_softmax(0).diagonal() + square.log_softmax(1).diagonal()).sum() / 8


def dense_ggn(model: CLIPModel, names: list[str], features: Features, theta: Tensor) -> Tensor:
    """``mean of J_S^T (d2L/dS2) J_S + l2 I`` from dense factors."""
    total = L2 * torch.eye(len(theta), dtype=theta.dtype)
    for batch in BATCHES:

        def logits(t: Tensor, batch: Tensor = batch) -> Tensor:
            return clip_output(model, names, t, features[batch]).logits_per_text.flatten()

        jacobian = jacrev(logits)(theta)
        fisher = hessian(cross_entropies)(logits(theta).detach())
        total = total + jacobian.T @ fisher @ jacobian / len(BATCHES)
    return total


def gaussian(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_objective(model: CLIPModel, features: Features, parameters: str) -> Objective:
    encoder = DualEncoder(model, parameters, micro_batch_size=3)
    return Objective(encoder, encoder.freeze(features), BATCHES, l2=L2)


@pytest.mark.parametrize("parameters", ["projections", "last_block", WITH_SCALE])
def test_value_and_gradient(make_clip: MakeClip, tiny_features: Features, parameters: str) -> None:
    objective = make_objective(make_clip(), tiny_features, parameters)
    theta = objective.encoder.theta.clone().requires_grad_()
    oracle = dense_objective(make_clip(), objective.encoder.names, tiny_features, theta)
    close(objective.value(theta.detach()), oracle.detach())
    close(objective.gradient(theta.detach()), torch.autograd.grad(oracle, theta)[0])


@pytest.mark.parametrize("parameters", [WITH_SCALE, r"text_model\..*layers.1.*layer_norm"])
def test_ggn_is_the_dense_one(
    make_clip: MakeClip, tiny_features: Features, parameters: str
) -> None:
    objective = make_objective(make_clip(), tiny_features, parameters)
    theta = objective.encoder.theta
    oracle = dense_ggn(make_clip(), objective.encoder.names, tiny_features, theta)
    actual = objective.ggn(theta, torch.eye(len(theta), dtype=theta.dtype))
    close(actual, oracle)
    close(actual, actual.T)
    assert torch.linalg.eigvalsh(actual).min() > L2 * (1 - 1e-9)


@pytest.mark.parametrize("parameters", ["last_block", "all"])
def test_ggn_is_symmetric_and_linear(
    tiny_clip: CLIPModel, tiny_features: Features, parameters: str
) -> None:
    objective = make_objective(tiny_clip, tiny_features, parameters)
    theta = objective.encoder.theta
    left, right = gaussian(2, len(theta))
    products = objective.ggn(theta, torch.stack([left, right, left - 2 * right]))
    close(left @ products[1], right @ products[0])
    close(products[2], products[0] - 2 * products[1])
    assert left @ products[0] > L2 * left @ left


class BothDirections(nn.Module):
    """Row numbers to ``(2B, B)`` logits: those of the texts over those of the images.

    With ``CrossEntropyLoss`` averaged over these ``2B`` rows, and ``n`` as the class of text ``n``
    and of image ``n``, this is InfoNCE as a plain classification.
    """

    def __init__(self, model: CLIPModel, features: Features) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, rows: Tensor) -> Tensor:
        part = self.features[rows]
        with sdpa_kernel(SDPBackend.MATH):
            logits = self.model(**part.text, **part.image).logits_per_text
        return torch.cat([logits, logits.T])


@pytest.mark.parametrize("parameters", [WITH_SCALE, "last_block"])
def test_ggn_is_that_of_curvlinops(
    make_clip: MakeClip, tiny_features: Features, parameters: str
) -> None:
    objective = make_objective(make_clip(), tiny_features, parameters)
    theta = objective.encoder.theta
    model = make_clip()
    oracle = GGNLinearOperator(
        BothDirections(model, tiny_features),
        nn.CrossEntropyLoss(reduction="mean"),
        [model.get_parameter(name) for name in objective.encoder.names],
        [(batch, torch.arange(4).repeat(2)) for batch in BATCHES],
        check_deterministic=False,
    )
    vectors = gaussian(3, len(theta))
    expected = torch.stack([oracle @ vector for vector in vectors]).detach()
    close(objective.ggn(theta, vectors), expected + L2 * vectors)


def test_l2_is_added_once(tiny_clip: CLIPModel, tiny_features: Features) -> None:
    with_l2 = make_objective(tiny_clip, tiny_features, "projections")
    plain = Objective(with_l2.encoder, with_l2.features, BATCHES)
    theta = with_l2.encoder.theta
    vectors = gaussian(2, len(theta))
    close(with_l2.value(theta) - plain.value(theta), L2 / 2 * theta @ theta)
    close(with_l2.gradient(theta) - plain.gradient(theta), L2 * theta)
    close(with_l2.ggn(theta, vectors) - plain.ggn(theta, vectors), L2 * vectors)


def test_over_changes_the_batches_alone(tiny_clip: CLIPModel, tiny_features: Features) -> None:
    same = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 8, 9])
    encoder = DualEncoder(tiny_clip)
    objective = Objective(encoder, encoder.freeze(tiny_features), BATCHES, same, L2)
    values = [objective.over([batch]).value(encoder.theta) for batch in BATCHES]
    close(torch.stack(values).mean(), objective.value(encoder.theta))


def test_repeated_captions_are_told_by_row(tiny_clip: CLIPModel, tiny_features: Features) -> None:
    """Rows 0 and 3 have equal captions; both are in the first batch and in no other."""
    same = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 8, 9])
    encoder = DualEncoder(tiny_clip, WITH_SCALE)
    features = encoder.freeze(tiny_features)
    masked = Objective(encoder, features, BATCHES, same)
    plain = Objective(encoder, features, BATCHES)
    theta = encoder.theta.clone().requires_grad_()
    out = clip_output(tiny_clip, encoder.names, theta, tiny_features[BATCHES[0]])
    logits = out.logits_per_text.clone()
    logits[0, 1] = logits[1, 0] = -1e4
    change = (cross_entropies(logits) - cross_entropies(out.logits_per_text)) / 3
    close(masked.value(theta.detach()) - plain.value(theta.detach()), change.detach())
    close(
        masked.gradient(theta.detach()) - plain.gradient(theta.detach()),
        torch.autograd.grad(change, theta)[0],
    )
    vectors = gaussian(1, len(theta))
    assert not torch.allclose(
        masked.ggn(theta.detach(), vectors), plain.ggn(theta.detach(), vectors)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_random_batches(count: int, batch_size: int, seed: int) -> None:
    batches = random_batches(count, batch_size, torch.Generator().manual_seed(seed))
    size = min(count, batch_size)
    assert {len(batch) for batch in batches} == {size}
    assert len(batches) == -(-count // size)
    assert torch.cat(batches).unique().tolist() == list(range(count))
    for batch in batches:
        assert len(batch.unique()) == size


def test_random_batches_are_random_and_repeatable() -> None:
    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [batch.tolist() for batch in random_batches(20, 5, generator)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
