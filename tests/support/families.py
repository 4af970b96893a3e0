"""Small random models of every family, in float64, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, normalize
from transformers import (
    AlignConfig,
    AlignModel,
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BlipConfig,
    BlipForImageTextRetrieval,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    GroupViTConfig,
    GroupViTModel,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.models.families import adapt

WORDS, TOKENS, PIXELS, PATCH = 50, 7, 16, 8
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {
    **TOWER,
    "vocab_size": WORDS,
    "max_position_embeddings": TOKENS + 2,  # RoBERTa counts positions from its padding token
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": WORDS - 1,
}
VISION = {**TOWER, "image_size": PIXELS, "patch_size": PATCH}


def clip() -> nn.Module:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


def metaclip2() -> nn.Module:
    return MetaClip2Model(MetaClip2Config(text_config=TEXT, vision_config=VISION, projection_dim=8))


def siglip() -> nn.Module:
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))


def siglip2() -> nn.Module:
    vision = {**TOWER, "patch_size": PATCH, "num_patches": 4}
    return Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=vision))


def chinese_clip() -> nn.Module:
    return ChineseCLIPModel(
        ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    )


def altclip() -> nn.Module:
    text = {**TEXT, "project_dim": 12}
    return AltCLIPModel(AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def vision_text() -> nn.Module:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VISION), BertConfig(**TEXT), projection_dim=8
    )
    return VisionTextDualEncoderModel(config)


def align() -> nn.Module:
    vision = {
        "image_size": PIXELS,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 8,
        "in_channels": [8] * 3,
        "out_channels": [8] * 3,
        "kernel_sizes": [3] * 3,
        "strides": [1, 2, 2],
        "num_block_repeats": [1] * 3,
        "expand_ratios": [1, 2, 2],
    }
    return AlignModel(AlignConfig(text_config=TEXT, vision_config=vision, projection_dim=8))


def groupvit() -> nn.Module:
    groups = {"num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2], "depths": [1, 1, 1]}
    return GroupViTModel(
        GroupViTConfig(
            text_config=TEXT,
            vision_config={**VISION, "num_hidden_layers": 3, **groups},
            projection_dim=8,
            projection_intermediate_dim=12,
        )
    )


def blip() -> nn.Module:
    text = {**TEXT, "encoder_hidden_size": 16, "sep_token_id": 2}
    return BlipForImageTextRetrieval(
        BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=8)
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder
    for builder in (clip, metaclip2, siglip, siglip2, chinese_clip, altclip, vision_text)
}

# Of another form: without a projection of images, with heads of several layers, without methods.
OTHER_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder for builder in (align, groupvit, blip)
}

SIGMOID = ("siglip", "siglip2")  # trained with the sigmoid loss; they have a bias and heads
CLIP_LAYERS = ("text_model.encoder.layers.", "vision_model.encoder.layers.")
# Stacks of transformer layers, where they are not called as in CLIP.
OTHER_LAYERS = {
    "chinese_clip": ("text_model.encoder.layer.", "vision_model.encoder.layers."),
    "altclip": ("text_model.roberta.encoder.layers.", "vision_model.encoder.layers."),
    "vision_text": ("text_model.encoder.layer.", "vision_model.layers."),
}


def heads(family: str) -> tuple[str, str]:
    """What the towers end in, text first."""
    if family in SIGMOID:
        return "text_model.head", "vision_model.head"
    return "text_projection", "visual_projection"


def layers(family: str) -> tuple[str, str]:
    """Prefixes of the layers of both towers, text first; a number follows."""
    return OTHER_LAYERS.get(family, CLIP_LAYERS)


def build(family: str, seed: int = 0) -> nn.Module:
    """A random model whose embeddings differ from row to row."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = adapt((FAMILIES | OTHER_FAMILIES)[family]().double().eval())
        with torch.no_grad():  # a fresh model embeds all rows nearly alike
            for name, value in model.named_parameters():
                if "logit_" in name:
                    value.fill_(1.5 if "scale" in name else -2.0)
                else:
                    value += 0.25 * torch.randn_like(value)
    return model


def build_inputs(family: str, count: int, seed: int = 0) -> Features:
    """Captions of random length, closed by the end token and padded, and images of noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, WORDS - 1, (count, TOKENS), generator=generator)
    last = torch.randint(3, TOKENS, (count, 1), generator=generator)
    position = torch.arange(TOKENS)
    tokens = tokens.masked_fill(position > last, 1).masked_fill(position == last, WORDS - 1)
    tokens[:, 0] = 0
    text = {"input_ids": tokens, "attention_mask": (position <= last).long()}
    return Features(text, _images(family, count, generator))


def _images(family: str, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    if family != "siglip2":
        pixels = torch.randn(count, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels}
    # Patches of images of different shapes, padded to a common number.
    shapes = torch.tensor([[2, 2], [1, 3], [3, 1]])[torch.arange(count) % 3]
    patches = torch.randn(count, 4, 3 * PATCH**2, generator=generator, dtype=torch.float64)
    mask = (torch.arange(4) < shapes.prod(dim=1, keepdim=True)).long()
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def forward(
    model: nn.Module, names: list[str], features: Features
) -> Callable[[Tensor], Embeddings]:
    """``theta -> embeddings`` by the model's own forward, all rows at once."""
    values = [model.get_parameter(name) for name in names]

    def embed(theta: Tensor) -> Embeddings:
        pieces = theta.split([value.numel() for value in values])
        shaped = [x.view(value.shape) for x, value in zip(pieces, values, strict=True)]
        weights = dict(zip(names, shaped, strict=True))
        with sdpa_kernel(SDPBackend.MATH):  # eager attention rounds its softmax to float32
            out = _call(model, weights, {**features.text, **features.image})
        log_scale = weights.get("logit_scale", model.logit_scale)
        scale = log_scale.exp().reshape(())
        bias = weights.get("logit_bias", getattr(model, "logit_bias", 0 * scale)).reshape(())
        return Embeddings(out.text_embeds, out.image_embeds, scale, bias)

    return embed


def _call(model: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
    """Output of the model's own forward; BLIP returns what its heads are put on."""
    if not isinstance(model, BlipForImageTextRetrieval):
        return functional_call(model, weights, kwargs=inputs)
    out = functional_call(model, weights, kwargs=inputs | {"use_itm_head": False})
    heads = {
        name: weights.get(name, model.get_parameter(name))
        for side in ("text", "vision")
        for name in (f"{side}_proj.weight", f"{side}_proj.bias")
    }

    def project(side: str, hidden: Tensor) -> Tensor:
        weight, bias = heads[f"{side}_proj.weight"], heads[f"{side}_proj.bias"]
        return normalize(linear(hidden[:, 0], weight, bias))

    text, image = project("text", out.question_embeds), project("vision", out.last_hidden_state)
    torch.testing.assert_close(image @ text.T, out.itm_score)
    return SimpleNamespace(text_embeds=text, image_embeds=image)


def gaussian(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_cotangents(count: int, like: Embeddings) -> Embeddings:
    """``count`` random cotangents of a batch."""
    return Embeddings(*(gaussian(count, *x.shape, seed=i) for i, x in enumerate(like)))
