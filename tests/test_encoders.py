"""Embeddings, push and pull against `CLIPModel` itself, differentiated by plain means."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPModel, SiglipConfig, SiglipModel

from hf_ecif.encoders import DualEncoder, Features, select_parameters
from hf_ecif.errors import UserError
from hf_ecif.objectives import Embeddings

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
MakeClip = Callable[..., CLIPModel]
WITH_SCALE = r"projection\.|logit_scale"
SELECTIONS = ["projections", "last_block", "all", WITH_SCALE, r"text_model\..*layer_norm1|^logit"]
SELECTED = pytest.mark.parametrize("parameters", SELECTIONS)


def reference(
    model: CLIPModel, names: list[str], features: Features
) -> Callable[[Tensor], Embeddings]:
    """``theta -> (text_embeds, image_embeds, exp(logit_scale))`` by `CLIPModel.forward`."""
    shapes = [model.get_parameter(name).shape for name in names]

    def embed(theta: Tensor) -> Embeddings:
        pieces = theta.split([shape.numel() for shape in shapes])
        weights = {n: x.view(s) for n, x, s in zip(names, pieces, shapes, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):  # eager attention rounds its softmax to float32
            out = functional_call(model, weights, kwargs={**features.text, **features.image})
        scale = weights.get("logit_scale", model.logit_scale).exp()
        return Embeddings(out.text_embeds, out.image_embeds, scale)

    return embed


def gaussian(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_cotangents(count: int, rows: int, dim: int = 8) -> Embeddings:
    return Embeddings(
        gaussian(count, rows, dim), gaussian(count, rows, dim, seed=6), gaussian(count, seed=7)
    )


def inner(left: Embeddings, right: Embeddings) -> Tensor:
    return sum((x * y).sum() for x, y in zip(left, right, strict=True))


def close_all(actual: Embeddings, expected: Embeddings) -> None:
    for left, right in zip(actual, expected, strict=True):
        close(left, right)


# ------------------------------------------------------------------------------- derivatives


@SELECTED
def test_embed(tiny_clip: CLIPModel, tiny_features: Features, parameters: str) -> None:
    encoder = DualEncoder(tiny_clip, parameters, micro_batch_size=4)
    theta = encoder.theta + 0.1 * gaussian(encoder.count)
    expected = reference(tiny_clip, encoder.names, tiny_features)(theta)
    close_all(encoder.embed(theta, encoder.freeze(tiny_features)), expected)


@SELECTED
def test_push(make_clip: MakeClip, tiny_features: Features, parameters: str) -> None:
    """``(f(theta + h t) - f(theta - h t)) / 2h``."""
    encoder = DualEncoder(make_clip(), parameters, micro_batch_size=4)
    theta, step = encoder.theta, 1e-5
    tangents = gaussian(2, encoder.count)
    embed = reference(make_clip(), encoder.names, tiny_features)
    with torch.no_grad():
        primal, moved = encoder.push(theta, tangents, encoder.freeze(tiny_features))
        close_all(primal, embed(theta))
        for k, tangent in enumerate(tangents):
            ahead, behind = embed(theta + step * tangent), embed(theta - step * tangent)
            for name, actual in moved._asdict().items():
                oracle = (getattr(ahead, name) - getattr(behind, name)) / (2 * step)
                assert (actual[k] - oracle).norm() <= 1e-6 * oracle.norm()


@SELECTED
def test_pull(make_clip: MakeClip, tiny_features: Features, parameters: str) -> None:
    """The gradient of ``<cotangent, embeddings>`` by autograd."""
    encoder = DualEncoder(make_clip(), parameters, micro_batch_size=4)
    theta = encoder.theta.clone().requires_grad_()
    cotangents = random_cotangents(2, len(tiny_features))
    actual = encoder.pull(theta.detach(), cotangents, encoder.freeze(tiny_features))
    embeddings = reference(make_clip(), encoder.names, tiny_features)(theta)
    for k in range(2):
        value = inner(Embeddings(*(part[k] for part in cotangents)), embeddings)
        close(actual[k], torch.autograd.grad(value, theta, retain_graph=True)[0])


@SELECTED
def test_pull_is_the_adjoint_of_push(
    tiny_clip: CLIPModel, tiny_features: Features, parameters: str
) -> None:
    """``<c, J t> = <J^T c, t>``."""
    encoder = DualEncoder(tiny_clip, parameters, micro_batch_size=4)
    features = encoder.freeze(tiny_features)
    tangents = gaussian(3, encoder.count)
    cotangents = random_cotangents(1, len(features))
    moved = encoder.push(encoder.theta, tangents, features)[1]
    pulled = encoder.pull(encoder.theta, cotangents, features)[0]
    for k, tangent in enumerate(tangents):
        pushed = inner(Embeddings(*(x[0] for x in cotangents)), Embeddings(*(x[k] for x in moved)))
        close(pushed, pulled @ tangent)


# ------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("parameters", [WITH_SCALE, "last_block"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_micro_batches_do_not_matter(
    tiny_clip: CLIPModel, tiny_features: Features, parameters: str, size: int
) -> None:
    results = []
    for micro_batch_size in (64, size):
        encoder = DualEncoder(tiny_clip, parameters, micro_batch_size)
        features = encoder.freeze(tiny_features)
        primal, moved = encoder.push(encoder.theta, gaussian(2, encoder.count), features)
        pulled = encoder.pull(encoder.theta, random_cotangents(2, len(features)), features)
        embedded = encoder.embed(encoder.theta, features)
        results.append([*primal, *moved, *embedded, pulled])
    for small, whole in zip(*results, strict=True):
        torch.testing.assert_close(small, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parameters", ["projections", WITH_SCALE, "logit_scale"])
def test_frozen_boundary_does_not_matter(
    tiny_clip: CLIPModel, tiny_features: Features, parameters: str
) -> None:
    encoder = DualEncoder(tiny_clip, parameters, micro_batch_size=4)
    pooled = encoder.freeze(tiny_features)
    assert encoder.frozen
    assert set(pooled.text) == set(pooled.image) == {"pooled"}
    tangents, cotangents = gaussian(2, encoder.count), random_cotangents(2, len(pooled))
    for features in (pooled, tiny_features):
        primal, moved = encoder.push(encoder.theta, tangents, features)
        close_all(primal, encoder.embed(encoder.theta, pooled))
        close_all(moved, encoder.push(encoder.theta, tangents, pooled)[1])
        pulled = encoder.pull(encoder.theta, cotangents, features)
        close(pulled, encoder.pull(encoder.theta, cotangents, pooled))


def test_nothing_is_frozen_above_deeper_parameters(
    tiny_clip: CLIPModel, tiny_features: Features
) -> None:
    encoder = DualEncoder(tiny_clip, "last_block")
    assert not encoder.frozen
    assert encoder.freeze(tiny_features) is tiny_features


@pytest.mark.parametrize("parameters", ["projections", "last_block"])
def test_many_tangents_at_once_are_one_by_one(
    tiny_clip: CLIPModel, tiny_features: Features, parameters: str
) -> None:
    encoder = DualEncoder(tiny_clip, parameters, micro_batch_size=4)
    features = encoder.freeze(tiny_features)
    tangents, cotangents = gaussian(5, encoder.count), random_cotangents(5, len(features))
    together = encoder.push(encoder.theta, tangents, features)[1]
    pulled = encoder.pull(encoder.theta, cotangents, features)
    for k in range(5):
        alone = encoder.push(encoder.theta, tangents[k : k + 1], features)[1]
        close_all(alone, Embeddings(*(x[k : k + 1] for x in together)))
        one = Embeddings(*(x[k : k + 1] for x in cotangents))
        close(encoder.pull(encoder.theta, one, features)[0], pulled[k])


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
    encoder.push(theta, gaussian(2, encoder.count).to(dtype), features)
    cotangents = random_cotangents(1, len(features))
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
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_default_attention_is_the_fused_one(tiny_clip: CLIPModel) -> None:
    """So the derivatives above were those of a model as `from_pretrained` gives it."""
    assert tiny_clip.config._attn_implementation == "sdpa"


def test_load(make_clip: MakeClip, tiny_features: Features) -> None:
    encoder = DualEncoder(make_clip(), "last_block")
    theta = encoder.theta + 0.1 * gaussian(encoder.count)
    encoder.load(theta)
    close(encoder.theta, theta)
    out = encoder.model(**tiny_features.text, **tiny_features.image)
    expected = reference(make_clip(), encoder.names, tiny_features)(theta)
    close(out.text_embeds, expected.text)
    close(out.image_embeds, expected.image)


# --------------------------------------------------------------------------------- features


def test_features_are_rows(tiny_features: Features) -> None:
    assert len(tiny_features) == 10
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(tiny_features[rows].text["input_ids"][1], tiny_features.text["input_ids"][0])
    joined = Features.cat([tiny_features[:4], tiny_features[4:]])
    for side in ("text", "image"):
        for key, value in getattr(tiny_features, side).items():
            assert torch.equal(getattr(joined, side)[key], value)
    order = torch.arange(10).flip(0)
    swapped = tiny_features.with_texts_of(order)
    assert torch.equal(swapped.text["input_ids"], tiny_features.text["input_ids"].flip(0))
    assert torch.equal(swapped.image["pixel_values"], tiny_features.image["pixel_values"])


# -------------------------------------------------------------------------------- selection


def test_selected_names(tiny_clip: CLIPModel) -> None:
    every = [name for name, _ in tiny_clip.named_parameters()]
    heads = {"visual_projection.weight", "text_projection.weight"}
    assert set(select_parameters(tiny_clip, "projections")) == heads
    assert set(select_parameters(tiny_clip, "all")) == set(every) - {"logit_scale"}
    last = {name for name in every if ".encoder.layers.1." in name}
    assert len({name.split(".")[0] for name in last}) == 2
    assert set(select_parameters(tiny_clip, "last_block")) == heads | last
    assert select_parameters(tiny_clip, "logit_scale") == ["logit_scale"]


def test_flat_vector_follows_the_names(tiny_clip: CLIPModel) -> None:
    encoder = DualEncoder(tiny_clip, WITH_SCALE)
    assert encoder.count == 2 * 8 * 16 + 1
    pieces = [tiny_clip.get_parameter(name).flatten() for name in encoder.names]
    assert torch.equal(encoder.theta, torch.cat(pieces))


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("no_such_parameter", "selects none of the model's .* Use projections, last_block, all"),
        ("layers.[", "not a valid regular expression"),
    ],
)
def test_bad_selection(tiny_clip: CLIPModel, parameters: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        DualEncoder(tiny_clip, parameters)


class TextOnly(nn.Module):
    """Like a plain text encoder: it has no image side."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)

    def get_text_features(self, tokens: Tensor) -> Tensor:
        return self.embeddings(tokens)


def tiny_siglip() -> SiglipModel:
    tower = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return SiglipModel(
        SiglipConfig(
            text_config={**tower, "vocab_size": 10, "max_position_embeddings": 4},
            vision_config={**tower, "image_size": 8, "patch_size": 8},
        )
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (TextOnly, "TextOnly is not a contrastive dual encoder: it lacks get_image_features"),
        (tiny_siglip, "SiglipModel is trained with the sigmoid loss"),
    ],
)
def test_unsuitable_model(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        DualEncoder(make())
    assert "CLIPModel" in str(caught.value)
