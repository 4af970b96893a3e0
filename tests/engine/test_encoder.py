"""Embeddings, push and pull of every family against the model's own forward, and plain autograd."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import Embeddings, infonce, sigmoid
from hf_ecif.errors import UserError
from tests.support.families import (
    FAMILIES,
    SIGMOID,
    build,
    build_inputs,
    forward,
    gaussian,
    random_cotangents,
)

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
MakeClip = Callable[..., CLIPModel]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# Of both towers: norms of the last layers, heads or parts of them, and the temperature.
FEW = r"(?i)layers?\.1\..*norm|projection|head\.(mlp\.fc1|weight|probe)|logit_"
DEEP = r"(?i)embeddings?\.(position|layernorm)|layers?\.0\..*norm|logit_"
# SigLIP 2 interpolates the positions of patches in float32: too coarse for a finite difference.
DEEP_OF = {"siglip2": r"(?i)text_model.*position|patch_embedding.bias|layers?\.0\..*norm|logit_"}
WITH_SCALE = r"projection\.|logit_scale"
COUNT = 6


def inner(left: Embeddings, right: Embeddings) -> Tensor:
    return sum((x * y).sum() for x, y in zip(left, right, strict=True))


def one(batch: Embeddings, number: int) -> Embeddings:
    return Embeddings(*(part[number] for part in batch))


def close_all(actual: Embeddings, expected: Embeddings, **options: float) -> None:
    for left, right in zip(actual, expected, strict=True):
        close(left, right, **options)


@dataclass(frozen=True)
class Case:
    """An encoder, its cached rows, and the model's own forward as a function of ``theta``."""

    encoder: DualEncoder
    frozen: Features
    oracle: Callable[[Tensor], Embeddings]
    theta: Tensor


def case(family: str, parameters: str = FEW, micro_batch_size: int = 4) -> Case:
    encoder = DualEncoder(build(family), parameters, micro_batch_size)
    inputs = build_inputs(family, COUNT)
    oracle = forward(build(family), encoder.names, inputs)
    theta = encoder.theta + 0.05 * gaussian(encoder.count)
    return Case(encoder, encoder.freeze(inputs), oracle, theta)


# ------------------------------------------------------------------------------- derivatives


EVERY_CASE = pytest.mark.parametrize(
    ("family", "parameters"),
    [(family, FEW) for family in FAMILIES]
    + [(family, DEEP_OF.get(family, DEEP)) for family in FAMILIES]
    + [("clip", name) for name in ("projections", "last_block", "all", WITH_SCALE)]
    + [("siglip", name) for name in ("projections", "last_block", "logit_scale")],
)


@EVERY_CASE
def test_embed(family: str, parameters: str) -> None:
    given = case(family, parameters)
    with torch.no_grad():
        expected = given.oracle(given.theta)
    close_all(given.encoder.embed(given.theta, given.frozen), expected)


@EVERY_CASE
def test_push(family: str, parameters: str) -> None:
    """``(f(theta + h t) - f(theta - h t)) / 2h``."""
    given = case(family, parameters)
    tangents, step = gaussian(2, given.encoder.count), 1e-5
    primal, moved = given.encoder.push(given.theta, tangents, given.frozen)
    with torch.no_grad():
        close_all(primal, given.oracle(given.theta))
        for k, tangent in enumerate(tangents):
            ahead, behind = (given.oracle(given.theta + sign * tangent) for sign in (step, -step))
            for actual, plus, minus in zip(one(moved, k), ahead, behind, strict=True):
                oracle = (plus - minus) / (2 * step)
                assert (actual - oracle).norm() <= 2e-6 * oracle.norm() + 1e-9


@pytest.mark.parametrize("form", ["exact", "difference"])
def test_push_of_nothing_embeds(form: str) -> None:
    given = case("clip", "last_block")
    none = gaussian(0, given.encoder.count)
    embeddings, moved = given.encoder.push(given.theta, none, given.frozen, form)
    close_all(embeddings, given.encoder.embed(given.theta, given.frozen))
    assert [part.shape for part in moved] == [(0, *part.shape) for part in embeddings]


@EVERY_FAMILY
def test_linearise_is_push_and_pull(family: str) -> None:
    """Of heads, for which it is kept; also of whole layers, if somebody asks."""
    for parameters in ("projections", "last_block"):
        given = case(family, parameters)
        theta, frozen = given.theta, given.frozen
        near = given.encoder.linearise(theta, frozen)
        tangents = gaussian(2, given.encoder.count)
        embeddings, moved = given.encoder.push(theta, tangents, frozen)
        close_all(Embeddings(*near.value), embeddings)
        close_all(Embeddings(*near.push(tangents)), moved)
        cotangents = random_cotangents(2, embeddings)
        close(near.pull(cotangents), given.encoder.pull(theta, cotangents, frozen))


def autograd_pull(given: Case, theta: Tensor, cotangent: Embeddings) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(inner(cotangent, given.oracle(theta)), theta)[0]


@EVERY_CASE
def test_pull(family: str, parameters: str) -> None:
    """The gradient of ``<cotangent, embeddings>`` by autograd."""
    given = case(family, parameters)
    cotangents = random_cotangents(2, given.encoder.embed(given.theta, given.frozen))
    if family not in SIGMOID:
        cotangents = cotangents._replace(bias=0 * cotangents.bias)
    actual = given.encoder.pull(given.theta, cotangents, given.frozen)
    for k in range(2):
        close(actual[k], autograd_pull(given, given.theta, one(cotangents, k)), atol=1e-7)


@EVERY_CASE
def test_pull_tangent(family: str, parameters: str) -> None:
    """``(pull(theta + h t, c + h c') - pull(theta - h t, c - h c')) / 2h``."""
    given = case(family, parameters)
    like = given.encoder.embed(given.theta, given.frozen)
    tangents, step = gaussian(2, given.encoder.count), 1e-5
    cotangent, moved = one(random_cotangents(1, like), 0), random_cotangents(2, like)
    actual = given.encoder.pull_tangent(given.theta, tangents, cotangent, moved, given.frozen)
    for k, tangent in enumerate(tangents):
        ahead, behind = (
            autograd_pull(
                given,
                given.theta + sign * tangent,
                Embeddings(*(c + sign * m for c, m in zip(cotangent, one(moved, k), strict=True))),
            )
            for sign in (step, -step)
        )
        oracle = (ahead - behind) / (2 * step)
        assert (actual[k] - oracle).norm() <= 2e-5 * oracle.norm()


@EVERY_FAMILY
def test_pull_is_the_adjoint_of_push(family: str) -> None:
    """``<c, J t> = <J^T c, t>``, for all parameters at once."""
    given = case(family, ".")
    tangents = gaussian(2, given.encoder.count)
    primal, moved = given.encoder.push(given.theta, tangents, given.frozen)
    cotangents = random_cotangents(1, primal)
    pulled = given.encoder.pull(given.theta, cotangents, given.frozen)[0]
    for k, tangent in enumerate(tangents):
        close(inner(one(cotangents, 0), one(moved, k)), pulled @ tangent, rtol=1e-5)


@EVERY_FAMILY
def test_loss_that_the_model_is_trained_with(family: str) -> None:
    given = case(family)
    assert given.encoder.contrastive is (sigmoid if family in SIGMOID else infonce)
    embeddings = given.encoder.embed(given.theta, given.frozen)
    close(embeddings.scale, given.oracle(given.theta).scale)
    assert (embeddings.bias != 0) == (family in SIGMOID)
    assert given.encoder.scale == pytest.approx(float(torch.tensor(1.5).exp()))


# ------------------------------------------------------------------- differences, half precision


def cosine(left: Tensor, right: Tensor) -> float:
    pair = left.double().flatten(), right.double().flatten()
    return float(torch.cosine_similarity(*pair, dim=0))


def in_dtype(family: str, parameters: str, dtype: torch.dtype) -> tuple[DualEncoder, Features]:
    inputs = build_inputs(family, COUNT)
    image = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in inputs.image.items()
    }
    return DualEncoder(build(family).to(dtype), parameters), Features(inputs.text, image)


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float64, 0.99999), (torch.float32, 0.999)], ids=["64", "32"]
)
def test_finite_differences_are_close(family: str, dtype: torch.dtype, least: float) -> None:
    encoder, inputs = in_dtype(family, FEW, dtype)
    tangents = gaussian(3, encoder.count).to(dtype)
    frozen = encoder.freeze(inputs)
    primal, exact = encoder.push(encoder.theta, tangents, frozen)
    here, near = encoder.push(encoder.theta, tangents, frozen, "difference")
    close_all(here, primal, atol=1e-5)
    for left, right in zip(near[:3], exact[:3], strict=True):
        assert left.dtype == dtype
        assert cosine(left, right) > least
        assert (left - right).norm() < 0.02 * right.norm()
    close(near.bias, exact.bias, rtol=1e-3, atol=1e-3)


def test_difference_along_nothing_is_nothing() -> None:
    given = case("clip")
    moved = given.encoder.push(
        given.theta, torch.zeros(1, given.encoder.count).double(), given.frozen, "difference"
    )[1]
    assert all(torch.equal(part, torch.zeros_like(part)) for part in moved)


def test_difference_from_parameters_that_are_zero() -> None:
    """As one factor of a new adapter is: the step cannot be relative to their norm."""
    model = build("clip")
    nn.init.zeros_(model.text_model.final_layer_norm.bias)
    encoder = DualEncoder(model, r"text_model\.final_layer_norm\.bias")
    assert encoder.theta.norm() == 0
    frozen = encoder.freeze(build_inputs("clip", COUNT))
    tangents = gaussian(2, encoder.count)
    exact = encoder.push(encoder.theta, tangents, frozen)[1]
    near = encoder.push(encoder.theta, tangents, frozen, "difference")[1]
    assert cosine(near.text, exact.text) > 0.999


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_finite_differences_in_half_precision(family: str) -> None:
    """A small step of a parameter is lost when it is rounded to bfloat16."""
    encoder, inputs = in_dtype(family, "projections", torch.bfloat16)
    tangents = gaussian(2, encoder.count).float()
    frozen = encoder.freeze(inputs)
    exact = encoder.push(encoder.theta, tangents, frozen)[1]
    near = encoder.push(encoder.theta, tangents, frozen, "difference")[1]
    assert cosine(near.text, exact.text) > 0.99
    assert cosine(near.image, exact.image) > 0.99


@EVERY_FAMILY
@pytest.mark.parametrize("parameters", ["projections", FEW, "last_block"])
def test_half_precision(family: str, parameters: str) -> None:
    """Attributed parameters, embeddings and products of a bfloat16 model are in float32."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        encoder, inputs = in_dtype(family, parameters, dtype)
        frozen, tangents = encoder.freeze(inputs), gaussian(2, encoder.count).float()
        primal, moved = encoder.push(encoder.theta, tangents, frozen)
        cotangents = Embeddings(*(x.float() for x in random_cotangents(2, primal)))
        pulled = encoder.pull(encoder.theta, cotangents, frozen)
        embedded = encoder.embed(encoder.theta, frozen)
        results.append([encoder.theta, *embedded[:3], *primal[:2], *moved[:2], pulled])
    for half, single in zip(*results, strict=True):
        assert half.dtype == single.dtype == torch.float32
        assert cosine(half, single) > 0.99


# ------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("family", ["clip", "siglip2", "vision_text"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_micro_batches_do_not_matter(family: str, size: int) -> None:
    results = []
    for micro_batch_size in (64, size):
        given = case(family, FEW, micro_batch_size)
        encoder, frozen = given.encoder, given.frozen
        primal, moved = encoder.push(given.theta, gaussian(2, encoder.count), frozen)
        cotangents = random_cotangents(2, primal)
        pulled = encoder.pull(given.theta, cotangents, frozen)
        tangent = encoder.pull_tangent(
            given.theta, gaussian(2, encoder.count), one(cotangents, 0), cotangents, frozen
        )
        embedded = encoder.embed(given.theta, frozen)
        results.append([*primal, *moved, *embedded, pulled, tangent])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("parameters", ["projections", FEW])
def test_many_at_once_are_many_one_by_one(family: str, parameters: str) -> None:
    given = case(family, parameters)
    tangents = gaussian(3, given.encoder.count)
    primal, together = given.encoder.push(given.theta, tangents, given.frozen)
    cotangents = random_cotangents(3, primal)
    pulled = given.encoder.pull(given.theta, cotangents, given.frozen)
    for k in range(3):
        alone = given.encoder.push(given.theta, tangents[k : k + 1], given.frozen)[1]
        close_all(one(alone, 0), one(together, k))
        single = Embeddings(*(x[k : k + 1] for x in cotangents))
        close(given.encoder.pull(given.theta, single, given.frozen)[0], pulled[k])


@pytest.mark.parametrize("form", ["exact", "difference"])
@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip"])
def test_unequal_numbers_of_texts_and_images(family: str, form: str) -> None:
    """Class prompts and images: each side is what it is among pairs."""
    given = case(family)
    uneven = Features({key: x[:2] for key, x in given.frozen.text.items()}, given.frozen.image)
    tangents = gaussian(2, given.encoder.count)
    whole, moved = given.encoder.push(given.theta, tangents, given.frozen, form)
    part, part_moved = given.encoder.push(given.theta, tangents, uneven, form)
    close_all(part, whole._replace(text=whole.text[:2]))
    close_all(part_moved, moved._replace(text=moved.text[:, :2]))
    cotangents = random_cotangents(2, part)
    padded = torch.cat([cotangents.text, torch.zeros(2, COUNT - 2, part.text.shape[1])], dim=1)
    close(
        given.encoder.pull(given.theta, cotangents, uneven),
        given.encoder.pull(given.theta, cotangents._replace(text=padded), given.frozen),
    )


# ------------------------------------------------------------------------ the model stays


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_is_left_as_it_was(
    make_clip: MakeClip, tiny_features: Features, attention: str, dtype: torch.dtype
) -> None:
    model = make_clip(attention).to(dtype)
    image = {key: value.to(dtype) for key, value in tiny_features.image.items()}
    features = Features(tiny_features.text, image)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernels = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled)
    enabled = [kernel() for kernel in kernels]

    encoder = DualEncoder(model, "all", micro_batch_size=4)
    theta = encoder.theta + 1
    primal = encoder.push(theta, gaussian(2, encoder.count).to(dtype), features)[0]
    cotangents = random_cotangents(1, primal)
    encoder.pull(theta, Embeddings(*(x.to(dtype) for x in cotangents)), features)
    encoder.freeze(features)
    encoder.embed(theta, features)

    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name
    assert model.config._attn_implementation == attention
    assert model.vision_model.config._attn_implementation == attention
    assert [kernel() for kernel in kernels] == enabled


def test_default_attention_is_the_fused_one(tiny_clip: CLIPModel) -> None:
    """So the derivatives above were those of a model as `from_pretrained` gives it."""
    assert tiny_clip.config._attn_implementation == "sdpa"


@EVERY_FAMILY
def test_load(family: str) -> None:
    given = case(family)
    given.encoder.load(given.theta)
    close(given.encoder.theta, given.theta)
    inputs = build_inputs(family, COUNT)
    out = given.encoder.model(**inputs.text, **inputs.image)
    expected = given.oracle(given.theta)
    close(out.text_embeds, expected.text)
    close(out.image_embeds, expected.image)


def test_fingerprint_is_of_the_weights() -> None:
    first, again, other = build("clip"), build("clip"), build("clip")
    with torch.no_grad():
        other.text_model.final_layer_norm.bias[3] += 1e-9
    models = first, again, other, build("clip").float()
    prints = [DualEncoder(model).fingerprint() for model in models]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# --------------------------------------------------------------------------------- features


def test_features_are_rows(tiny_features: Features) -> None:
    assert len(tiny_features) == 10
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(tiny_features[rows].text["input_ids"][1], tiny_features.text["input_ids"][0])
    order = torch.arange(10).flip(0)
    swapped = tiny_features.with_texts_of(order)
    assert torch.equal(swapped.text["input_ids"], tiny_features.text["input_ids"].flip(0))
    assert torch.equal(swapped.image["pixel_values"], tiny_features.image["pixel_values"])
    twice = swapped[2:8][rows]  # rows of rows
    assert torch.equal(twice.text["input_ids"], tiny_features.text["input_ids"][[4, 7, 4]])
    assert torch.equal(twice.image["pixel_values"], tiny_features.image["pixel_values"][[5, 2, 5]])
    mixed = tiny_features[:2].paired_with(tiny_features)
    assert (len(mixed), mixed.count("text"), mixed.count("image")) == (2, 2, 10)
    positions, rows_at, count = twice.mine("text")
    assert (positions, count) == (slice(None), 3)
    part = rows_at(slice(1, 3))
    assert torch.equal(part["input_ids"], twice.text["input_ids"][1:])


def test_flat_vector_follows_the_names(tiny_clip: CLIPModel) -> None:
    encoder = DualEncoder(tiny_clip, WITH_SCALE)
    assert encoder.count == 2 * 8 * 16 + 1
    pieces = [tiny_clip.get_parameter(name).flatten() for name in encoder.names]
    assert torch.equal(encoder.theta, torch.cat(pieces))


@EVERY_FAMILY
def test_text_of_the_greatest_length(family: str) -> None:
    encoder = DualEncoder(build(family), "projections")
    tokens = torch.full((1, encoder.max_text_length), 7)
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    frozen = encoder.freeze(Features(text, build_inputs(family, 1).image))
    assert frozen.text["hidden"].isfinite().all()


# --------------------------------------------------------------------------------- refusals


class TextOnly(nn.Module):
    """Like a plain text encoder: it has no image side."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)

    def get_text_features(self, tokens: Tensor) -> Tensor:
        return self.embeddings(tokens)


@pytest.mark.parametrize(
    ("make", "lacking"),
    [
        (
            TextOnly,
            "TextOnly is not a contrastive dual encoder: it lacks get_image_features, logit",
        ),
        (lambda: build("clip").text_model, "CLIPTextModel .* it lacks get_text_features, get_im"),
    ],
)
def test_unsuitable_model(make: Callable[[], nn.Module], lacking: str) -> None:
    with pytest.raises(UserError, match=lacking) as caught:
        DualEncoder(make())
    assert "CLIPModel" in str(caught.value)
