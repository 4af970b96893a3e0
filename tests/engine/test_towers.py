"""Wherever a tower is cut, what comes out is what the whole tower gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.towers import Tower
from tests.support.families import (
    FAMILIES,
    build,
    build_inputs,
    gaussian,
    heads,
    layers,
    random_cotangents,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SIDES = ("text", "image")
SUBSETS = ["projections", "last_block", "last_2", "layer_norm", "logit_scale", "all"]


def units(encoder: DualEncoder) -> list[str | None]:
    """Names of the first attributed modules, text first; None where nothing is to be resumed."""
    boundaries = [encoder._towers[side]._found.boundary for side in SIDES]
    return [boundary.unit if boundary else None for boundary in boundaries]


def products(encoder: DualEncoder, features: Features) -> list[Tensor]:
    """Embeddings, push and pull at a place of its own."""
    theta = encoder.theta + 0.05 * gaussian(encoder.count)
    embeddings = encoder.embed(theta, features)
    primal, moved = encoder.push(theta, gaussian(2, encoder.count), features)
    pulled = encoder.pull(theta, random_cotangents(2, embeddings), features)
    return [*embeddings, *primal, *moved, pulled]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------- every family


@EVERY_FAMILY
@pytest.mark.parametrize("parameters", SUBSETS)
def test_what_is_frozen_does_not_matter(family: str, parameters: str) -> None:
    model, inputs = build(family), build_inputs(family, 5)
    cached = DualEncoder(model, parameters, micro_batch_size=3)
    frozen = cached.freeze(inputs)
    whole = DualEncoder(model, parameters)
    # SigLIP 2 interpolates the positions of patches in float32.
    tolerance = 1e-6 if (family, parameters) == ("siglip2", "all") else 1e-9
    agree(products(cached, frozen), products(whole, inputs), tolerance)


def keys(features: Features) -> list[set[str]]:
    return [set(features.text), set(features.image)]


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("parameters", "number"), [("projections", None), ("last_block", 1), ("last_2", 0)]
)
def test_boundary(family: str, parameters: str, number: int | None) -> None:
    encoder = DualEncoder(build(family), parameters)
    features = encoder.freeze(build_inputs(family, 3))
    expected = heads(family) if number is None else [f"{x}{number}" for x in layers(family)]
    assert units(encoder) == list(expected)
    assert all("hidden" in side for side in keys(features))
    assert all("features" not in side for side in keys(features))


@EVERY_FAMILY
def test_one_row_is_enough_to_find_it(family: str) -> None:
    encoder = DualEncoder(build(family), "last_block")
    encoder.freeze(build_inputs(family, 1))
    assert units(encoder) == [f"{stack}1" for stack in layers(family)]
    whole = DualEncoder(build(family), "last_block")
    inputs = build_inputs(family, 5, seed=1)
    agree(products(encoder, encoder.freeze(inputs)), products(whole, inputs))


@EVERY_FAMILY
def test_projections_need_nothing_but_their_inputs(family: str) -> None:
    encoder = DualEncoder(build(family), "projections")
    text, image = keys(encoder.freeze(build_inputs(family, 3)))
    masks = {"pixel_attention_mask", "spatial_shapes"} if family == "siglip2" else set()
    assert (text, image) == ({"hidden"}, {"hidden"} | masks)


@EVERY_FAMILY
@pytest.mark.parametrize("parameters", ["projections", "last_block", "logit_scale"])
def test_pixels_are_kept_only_where_they_are_needed(family: str, parameters: str) -> None:
    inputs = build_inputs(family, 3)
    assert "pixel_values" not in DualEncoder(build(family), parameters).freeze(inputs).image
    kept = DualEncoder(build(family), "all").freeze(inputs)
    assert torch.equal(kept.image["pixel_values"], inputs.image["pixel_values"])


@EVERY_FAMILY
def test_tower_without_attributed_parameters_is_its_features(family: str) -> None:
    model, inputs = build(family), build_inputs(family, 3)
    text_head, image_head = heads(family)
    text_only = DualEncoder(model, f"^{text_head}").freeze(inputs)
    assert keys(text_only) == [{"hidden"}, {"features"}]
    image_only = DualEncoder(model, f"^{image_head}").freeze(inputs)
    assert set(image_only.text) == {"features"}
    out = model(**inputs.text, **inputs.image)
    for kept, expected in ((image_only.text, out.text_embeds), (text_only.image, out.image_embeds)):
        embedded = kept["features"] / kept["features"].norm(dim=-1, keepdim=True)
        torch.testing.assert_close(embedded, expected)


@EVERY_FAMILY
def test_longer_and_shorter_texts_later(family: str) -> None:
    """A boundary found on texts of one length serves texts of another."""
    encoder, inputs = DualEncoder(build(family), "last_block"), build_inputs(family, 5)
    short = Features({key: x[:, :4] for key, x in inputs.text.items()}, inputs.image)
    frozen = [(part, encoder.freeze(part)) for part in (short, inputs, short)]
    whole = DualEncoder(build(family), "last_block")
    for part, kept in frozen[:2]:
        agree(products(encoder, kept), products(whole, part))


def test_freezing_twice_is_freezing_once() -> None:
    encoder = DualEncoder(build("clip"), "last_block")
    once = encoder.freeze(build_inputs("clip", 4))
    twice = encoder.freeze(once)
    assert twice.text.keys() == once.text.keys()
    assert all(torch.equal(twice.text[key], once.text[key]) for key in once.text)


def test_first_inputs_must_be_raw() -> None:
    encoder = DualEncoder(build("clip"))
    with pytest.raises(ValueError, match="must be raw"):
        encoder.embed(encoder.theta, Features({"hidden": gaussian(3, 16)}, {}))


def test_lightness() -> None:
    inputs = build_inputs("siglip", 3)
    encoder = DualEncoder(build("siglip"))
    frozen = encoder.freeze(inputs)
    assert [Tower.is_light(side) for side in (frozen.text, frozen.image)] == [True, False]
    assert not Tower.is_light(inputs.text)


# ------------------------------------------------------------------------- leaves no traces


def traces(model: nn.Module) -> dict[str, tuple[int, int, object]]:
    """Hooks, and a forward of the instance's own, of every module."""
    return {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.__dict__.get("forward"),
        )
        for name, module in model.named_modules()
    }


@EVERY_FAMILY
def test_no_hooks_stay_behind(family: str) -> None:
    model = build(family)
    before = traces(model)
    encoder = DualEncoder(model, "last_block")
    products(encoder, encoder.freeze(build_inputs(family, 3)))
    assert traces(model) == before


def test_no_hooks_stay_behind_an_error() -> None:
    model = build("clip")
    before = traces(model)
    encoder, inputs = DualEncoder(model, "last_block"), build_inputs("clip", 3)
    unknown = Features({**inputs.text, "input_ids": inputs.text["input_ids"] + 50}, inputs.image)
    with pytest.raises(IndexError):  # while the boundary is looked for
        encoder.freeze(unknown)
    assert traces(model) == before
    frozen = encoder.freeze(inputs)
    with pytest.raises(IndexError):  # on the way to the boundary
        encoder.freeze(unknown)
    narrow = Features({**frozen.text, "hidden": frozen.text["hidden"][..., :9]}, frozen.image)
    with pytest.raises(RuntimeError):  # behind the boundary
        encoder.embed(encoder.theta, narrow)
    assert traces(model) == before


def test_forward_of_another_library_stays() -> None:
    """Such as accelerate's, which are attributes of the instance."""
    model, inputs = build("clip"), build_inputs("clip", 3)
    expected = products(DualEncoder(model, "last_block"), inputs)
    layer = model.text_model.encoder.layers[0]
    calls: list[int] = []
    plain = layer.forward

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return plain(*args, **kwargs)

    layer.forward = counting
    encoder = DualEncoder(model, "last_block")
    frozen = encoder.freeze(inputs)
    run = len(calls)
    assert run > 0
    agree(products(encoder, frozen), expected)
    assert len(calls) == run  # what is frozen does not run again
    assert layer.forward is counting


# ------------------------------------------------------------------------------ odd models


class Odd(nn.Module):
    """Two linear maps per tower, put together in a way that is given."""

    def __init__(self, combine: Callable[..., Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.text = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("first", "second")})
            self.image = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("first", "second")})
            self.offset = nn.Parameter(torch.randn(6))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.combine = combine
        self.double()

    def get_text_features(self, tokens: Tensor) -> Tensor:
        return self.combine(self.text["first"], self.text["second"], tokens, self.offset)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.combine(self.image["first"], self.image["second"], pixel_values, self.offset)


WAYS: dict[str, Callable[..., Tensor]] = {
    "in a row": lambda first, second, x, offset: second(first(x).tanh()),
    "offset": lambda first, second, x, offset: second(first(x).tanh() + offset) + offset,
    "skip": lambda first, second, x, offset: second(first(x).tanh()) + first(x),
    "skip of the kept": lambda first, second, x, offset: (lambda h: second(h) + h)(first(x)),
    "skip of the input": lambda first, second, x, offset: second(first(x).tanh()) + x,
    "called twice": lambda first, second, x, offset: second(second(first(x).tanh())),
    "skip of some rows": lambda first, second, x, offset: (
        second(first(x).tanh()) + (x[:, :1] > 1.5) * first(x)
    ),
    "beside": lambda first, second, x, offset: second(x) * first(x),
}
ODD_INPUTS = Features({"tokens": gaussian(5, 6)}, {"pixel_values": gaussian(5, 6, seed=6)})
for values in (ODD_INPUTS.text["tokens"], ODD_INPUTS.image["pixel_values"]):
    values[:, 0] = torch.arange(5)  # so that the first rows differ from the others


def odd_gradient(model: Odd, names: list[str], cotangents: Tensor) -> Tensor:
    """Of ``<cotangent, embedding>`` of both sides, by autograd."""
    text = model.get_text_features(**ODD_INPUTS.text)
    image = model.get_image_features(**ODD_INPUTS.image)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (text, image)]
    value = sum((x * c).sum() for x, c in zip(unit, cotangents, strict=True))
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize("parameters", [r"second", r"second.bias", r"first.weight|second"])
@pytest.mark.parametrize("way", WAYS)
def test_odd_models_are_embedded_right(way: str, parameters: str) -> None:
    encoder = DualEncoder(Odd(WAYS[way]), parameters)
    frozen = encoder.freeze(ODD_INPUTS)
    embeddings = encoder.embed(encoder.theta, frozen)
    cotangents = random_cotangents(1, embeddings)
    cotangents = cotangents._replace(scale=0 * cotangents.scale)
    sides = torch.stack([cotangents.text[0], cotangents.image[0]])
    expected = odd_gradient(Odd(WAYS[way]), encoder.names, sides)
    agree([encoder.pull(encoder.theta, cotangents, frozen)[0]], [expected])


def test_odd_models_are_frozen_where_they_can_be() -> None:
    found = {}
    for way, combine in WAYS.items():
        encoder = DualEncoder(Odd(combine), "second")
        encoder.freeze(ODD_INPUTS)
        found[way] = units(encoder)
    frozen = ["text.second", "image.second"]
    assert found.pop("in a row") == found.pop("offset") == frozen
    assert found.pop("skip of the input") == ["text.second", None]  # pixels are not kept
    assert set(map(tuple, found.values())) == {(None, None)}


@pytest.mark.parametrize("parameters", ["offset", "offset|second"])
def test_parameters_of_the_model_itself(parameters: str) -> None:
    """They may act anywhere, so all is kept."""
    encoder = DualEncoder(Odd(WAYS["offset"]), parameters)
    frozen = encoder.freeze(ODD_INPUTS)
    assert units(encoder) == [None, None]
    assert keys(frozen) == [{"tokens"}, {"pixel_values"}]
    cotangents = random_cotangents(1, encoder.embed(encoder.theta, frozen))
    sides = torch.stack([cotangents.text[0], cotangents.image[0]])
    expected = odd_gradient(Odd(WAYS["offset"]), encoder.names, sides)
    agree([encoder.pull(encoder.theta, cotangents, frozen)[0]], [expected])


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    hook = module.register_forward_hook(lambda *args: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def test_frozen_layers_do_not_run_again() -> None:
    model = build("clip")
    encoder = DualEncoder(model, "last_block")
    frozen = encoder.freeze(build_inputs("clip", 4))
    stem = model.vision_model.embeddings.patch_embedding
    with counted_calls(stem) as below, counted_calls(model.visual_projection) as above:
        products(encoder, frozen)
    assert (len(below), len(above) > 0) == (0, True)
