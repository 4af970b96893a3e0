"""Choice of the attributed parameters: names of subsets, and low-rank adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_ecif.errors import UserError

SUBSETS = "projections, last_block, last_2 (or more), lora, layer_norm, logit_scale, all"
TEMPERATURE = re.compile(r"(^|\.)logit_(scale|bias)$")
# SigLIP has no projections; its towers end in heads. BLIP's have shorter names.
HEAD = re.compile(
    r"(^|\.)(text_projection|visual_projection|(text|vision)_proj|(text|vision)_model\.head)(\.|$)"
)
ADAPTER = re.compile(r"(^|\.)lora_")
# Layers that get adapters: queries and values, by the names of CLIP-like and BERT-like towers.
ADAPTED = ("q_proj", "v_proj", "query", "value")


def select_parameters(model: nn.Module, parameters: str) -> list[str]:
    """Names of the parameters that ``parameters`` selects, in the model's order.

    Args:
        model: a dual encoder.
        parameters: ``projections`` (the last linear map, or head, of each tower), ``last_block``
            (the last transformer layer of each tower, and the projections), ``last_<k>`` (the last
            ``k`` layers, and the projections), ``lora`` (adapters), ``layer_norm`` (all
            normalisations), ``logit_scale`` (temperature, and SigLIP's bias), ``all`` (everything
            but the temperature), or a regular expression searched for in the parameter names.

    Raises:
        UserError: the expression is invalid or selects nothing.
    """
    names = [name for name, value in model.named_parameters() if value.is_floating_point()]
    chosen = set(_select(model, names, parameters))
    if not chosen:
        raise UserError(
            f"`parameters={parameters!r}` selects none of the model's {len(names)} parameters. "
            f"Use {SUBSETS}, or a regular expression that matches names such as "
            f"{', '.join(names[-3:])}."
        )
    return [name for name in names if name in chosen]


def has_adapters(model: nn.Module) -> bool:
    """Whether the model carries LoRA adapters."""
    return any(ADAPTER.search(name) for name, _ in model.named_parameters())


def add_lora(model: nn.Module, *, rank: int = 8, seed: int = 0) -> Any:
    """Model with new LoRA adapters on the queries and values of its attention layers.

    They change nothing until they are fitted, since one of their two factors starts at zero.

    Args:
        model: a dual encoder; its layers are replaced by adapted ones, its weights stay.
        rank: rank of the adapters.
        seed: seed of their random factor.

    Raises:
        UserError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            "`parameters=lora` needs the package peft: pip install 'hf_ecif[lora]'."
        ) from error
    targets = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules()} & {*ADAPTED})
    if not targets:
        raise UserError(
            f"`parameters=lora`: {type(model).__name__} has no attention layers called "
            f"{', '.join(ADAPTED)}. Add adapters with peft yourself and pass the adapted model."
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _select(model: nn.Module, names: list[str], parameters: str) -> Iterable[str]:
    if parameters == "all":
        return (name for name in names if not TEMPERATURE.search(name))
    if parameters == "projections":
        return filter(HEAD.search, names)
    if parameters == "lora":
        return filter(ADAPTER.search, names)
    if parameters == "logit_scale":
        return filter(TEMPERATURE.search, names)
    if parameters == "layer_norm":
        return (name for name in names if _is_normalisation(model, name))
    if found := re.fullmatch(r"last_(block|[1-9]\d*)", parameters):
        last = _last_layers(names, 1 if found[1] == "block" else int(found[1]))
        return (name for name in names if name.startswith(last) or HEAD.search(name))
    try:
        return filter(re.compile(parameters).search, names)
    except re.error as error:
        raise UserError(
            f"`parameters={parameters!r}` is not a valid regular expression: {error}."
        ) from error


def _is_normalisation(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return type(owner).__name__.endswith("Norm")


def _last_layers(names: Iterable[str], count: int) -> tuple[str, ...]:
    """Prefixes of the ``count`` last layers of every stack, such as ``...layers.11.``."""
    depth: dict[str, int] = {}
    for name in names:
        if found := re.match(r"(.*?\blayers?\.)(\d+)\.", name):
            depth[found[1]] = max(depth.get(found[1], 0), int(found[2]) + 1)
    return tuple(
        f"{stack}{number}."
        for stack, layers in depth.items()
        for number in range(max(0, layers - count), layers)
    )
