"""Selections of parameters by name, and adapters, on every family of models."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.parameters import add_lora, has_adapters, select_parameters
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.utils.seeds import derive
from tests.support.families import (
    FAMILIES,
    SIGMOID,
    build,
    build_inputs,
    gaussian,
    heads,
    layers,
    random_cotangents,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def all_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def names_under(model: nn.Module, *prefixes: str) -> list[str]:
    return [name for name in all_names(model) if name.startswith(prefixes)]


def temperature(family: str) -> list[str]:
    return ["logit_scale", "logit_bias"] if family in SIGMOID else ["logit_scale"]


# -------------------------------------------------------------------------------- selection


@EVERY_FAMILY
def test_projections_are_the_heads(family: str) -> None:
    model = build(family)
    expected = names_under(model, *(f"{head}." for head in heads(family)))
    assert expected
    assert select_parameters(model, "projections") == expected


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("parameters", "numbers"),
    [("last_block", [1]), ("last_1", [1]), ("last_2", [0, 1]), ("last_7", [0, 1])],
)
def test_last_layers_and_heads(family: str, parameters: str, numbers: list[int]) -> None:
    model = build(family)
    stacks = [f"{stack}{number}." for stack in layers(family) for number in numbers]
    assert all(names_under(model, stack) for stack in stacks)
    expected = names_under(model, *stacks, *heads(family))
    assert select_parameters(model, parameters) == expected


@EVERY_FAMILY
def test_layer_norm(family: str) -> None:
    model = build(family)
    expected = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for kind in ("weight", "bias")
    }
    assert set(select_parameters(model, "layer_norm")) == expected


@EVERY_FAMILY
def test_all_is_everything_but_the_temperature(family: str) -> None:
    model = build(family)
    assert set(select_parameters(model, "logit_scale")) == set(temperature(family))
    expected = [name for name in all_names(model) if name not in temperature(family)]
    assert select_parameters(model, "all") == expected


@EVERY_FAMILY
def test_regular_expression_is_searched_for(family: str) -> None:
    model = build(family)
    expected = [name for name in all_names(model) if "0.mlp" in name or name.endswith("n.bias")]
    assert select_parameters(model, r"0\.mlp|n\.bias$") == expected


def test_integers_cannot_be_attributed() -> None:
    model = build("clip")
    model.counter = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
    assert "counter" not in select_parameters(model, "all")


@EVERY_FAMILY
def test_model_without_adapters(family: str) -> None:
    with pytest.raises(
        UserError, match=r"`parameters='lora'` selects none of the model's \d+ parameters"
    ):
        select_parameters(build(family), "lora")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("no_such_parameter", "selects none of the model's .* Use projections, last_block, last_"),
        ("layers.[", r"`parameters='layers\.\['` is not a valid regular expression"),
    ],
)
def test_bad_selection(parameters: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        select_parameters(build("clip"), parameters)


# --------------------------------------------------------------------------------- adapters


def embeddings_of(encoder: DualEncoder, family: str) -> tuple[Tensor, ...]:
    return encoder.embed(encoder.theta, encoder.freeze(build_inputs(family, 5)))


@EVERY_FAMILY
def test_new_adapters_change_nothing(family: str) -> None:
    before = embeddings_of(DualEncoder(build(family)), family)
    model = add_lora(build(family), rank=2)
    after = embeddings_of(DualEncoder(model, "lora"), family)
    torch.testing.assert_close(after, before)


@EVERY_FAMILY
def test_adapters_are_in_every_layer_of_both_towers(family: str) -> None:
    plain = build(family)
    assert not has_adapters(plain)
    every = all_names(plain)
    model = add_lora(plain, rank=3)
    assert has_adapters(model)
    selected = select_parameters(model, "lora")
    assert len(selected) == 2 * 2 * 2 * 2  # factors, of queries and values, layers, towers
    assert {3} == {min(model.get_parameter(name).shape) for name in selected}
    for stack in layers(family):
        for number in (0, 1):
            assert sum(f"{stack}{number}." in name for name in selected) == 4
    assert len(all_names(model)) == len(every) + len(selected)


@pytest.mark.parametrize("family", ["clip", "siglip", "vision_text"])
def test_other_selections_of_an_adapted_model(family: str) -> None:
    prefix = "base_model.model."
    plain, model = build(family), add_lora(build(family))
    for parameters in ("projections", "logit_scale"):
        expected = [prefix + name for name in select_parameters(plain, parameters)]
        assert select_parameters(model, parameters) == expected
    last = select_parameters(model, "last_block")
    assert {name for name in last if "lora_" in name} == {
        name
        for name in select_parameters(model, "lora")
        if any(f"{stack}1." in name for stack in layers(family))
    }
    assert not any(name.endswith(("logit_scale", "logit_bias")) for name in last)


def test_seed_of_adapters() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        DualEncoder(add_lora(build("clip"), seed=seed), "lora").theta for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_need_attention() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

    with pytest.raises(UserError, match="Plain has no attention layers called q_proj"):
        add_lora(Plain())


def test_adapters_of_the_user_are_those_of_the_library() -> None:
    """Whether peft is called before or by `InfluenceModel`."""
    torch.manual_seed(derive(11, "adapters"))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(build("clip"), config)
    config = InfluenceConfig(parameters="lora", lora_rank=4, seed=11)
    before, own = (InfluenceModel(model, None, config) for model in (theirs, build("clip")))
    assert before.encoder.model is theirs
    assert before.encoder.names == own.encoder.names
    torch.testing.assert_close(before.encoder.theta, own.encoder.theta, rtol=0, atol=0)
    results = [products(model.encoder) for model in (before, own)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def products(encoder: DualEncoder) -> list[Tensor]:
    """Embeddings, push and pull away from the start, where adapters do act."""
    features = encoder.freeze(build_inputs("clip", 5))
    theta = encoder.theta + 0.1 * gaussian(encoder.count)
    primal, moved = encoder.push(theta, gaussian(2, encoder.count), features)
    pulled = encoder.pull(theta, random_cotangents(2, primal), features)
    assert all(part.norm() > 0 for part in (moved.text, moved.image, pulled))
    return [*primal, *moved, pulled]


def test_selection_follows_the_order_of_the_model() -> None:
    names = all_names(build("clip"))
    selected = select_parameters(build("clip"), "last_block")
    assert selected == sorted(selected, key=names.index)
    assert not re.search("logit", " ".join(selected))
