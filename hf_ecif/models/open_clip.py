"""Checkpoints of open_clip, converted on load into `CLIPModel`: the same functions, other names.

Covered is the ViT with a text transformer, which most open_clip models are: of OpenAI (quick_gelu),
LAION, DataComp, DFN, MetaCLIP and one's own. Its image tower has a class token and a norm before
the layers, its text tower is causal and is read at the end token; scales of layers are multiplied
into the weights. Towers of timm, of ResNet, of Hugging Face texts, CoCa and what has other parts
are refused, each by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from hf_ecif.models.place import OPEN_CLIP_PREFIX, Place
from hf_ecif.models.processors import load_processor, load_tokenizer
from hf_ecif.models.saved import PICKLES, SAFETENSORS

CONFIG = "open_clip_config.json"
WEIGHTS, PICKLE = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC, BILINEAR = 3, 2
NATIVE = (
    "Give a checkpoint of this model for transformers instead, of which the Hub has most "
    "(such as google/siglip-base-patch16-224 or laion/CLIP-ViT-B-32-laion2B-s34B-b79K), or embed "
    "the pairs with open_clip and give the embeddings (`embeddings`)."
)
_TOWER_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 224,
        "mlp_ratio": 4.0,
        "pool_type": "tok",
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "mlp_ratio": 4.0,
        "pool_type": "argmax",
        "eos_id": 2,
    },
}
# Values of a tower's config that CLIPModel has no part for, and what they are.
_OTHER_PARTS = {
    "timm_model_name": "an image tower of timm",
    "hf_model_name": "a text tower of Hugging Face",
    "attentional_pool": "a pooling by attention",
    "no_ln_pre": "no norm before its layers",
    "embed_cls": "a class token in its texts (CoCa)",
    "no_causal_mask": "a text tower that looks ahead",
    "qk_norm": "norms of queries and keys",
    "scaled_cosine_attn": "a scaled cosine attention",
    "scale_heads": "scales of heads",
    "scale_attn_inner": "norms within its attention",
    "scale_attn": "norms after its attention",
    "scale_fc": "norms within its MLPs",
    "proj_bias": "a projection with a bias",
}
_LAYER = re.compile(r"(?P<stack>.*?)transformer\.resblocks\.(?P<number>\d+)\.(?P<part>.+)")
_PARTS = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_SCALED = {  # parts whose output a layer scale multiplies
    "attn.out_proj.weight": "ls_1.gamma",
    "attn.out_proj.bias": "ls_1.gamma",
    "mlp.c_proj.weight": "ls_2.gamma",
    "mlp.c_proj.bias": "ls_2.gamma",
}
_BESIDE_LAYERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection.weight",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def is_open_clip(place: Place) -> bool:
    """Whether a place holds a checkpoint of open_clip, and none for transformers beside it."""
    files = place.files
    has_own = CONFIG in files or WEIGHTS in files or PICKLE in files
    has_other = "config.json" in files and any(f in files for f in (*SAFETENSORS, *PICKLES))
    return has_own and (not has_other or place.name.startswith(OPEN_CLIP_PREFIX))


def load_open_clip(
    place: Place, processor: str | None, dtype: torch.dtype | None
) -> tuple[CLIPModel, Any]:
    """The checkpoint as a `CLIPModel`, and its processor.

    The tokenizer is the one beside the weights, as open_clip's own export puts it there; in other
    folders there is none, since the package brings its vocabulary. Both make the same tokens,
    except that open_clip's turns ``&amp;`` and its like into characters first.

    Args:
        place: where `is_open_clip` is true.
        processor: folder or Hub id of a processor, whose tokenizer is taken; images are made as
            open_clip's config says.
        dtype: dtype of the weights.

    Raises:
        UserError: the model has parts that `CLIPModel` has not, or no tokenizer.
    """
    given = place.read(CONFIG)
    if "model_cfg" not in given:
        raise place.refuse(
            f"it holds weights of open_clip without {CONFIG}, so it is unknown which model they "
            "are of. Save it with open_clip's push_to_hf_hub or save_for_hf, which writes both. "
            f"{NATIVE}"
        )
    model_cfg = given["model_cfg"]
    _require_covered(place, model_cfg)
    vision, text = (_tower(model_cfg, name) for name in ("vision_cfg", "text_cfg"))
    tokenizer = (
        load_tokenizer(place) if processor is None else load_processor(place, processor).tokenizer
    )
    if tokenizer is None:
        words = text["vocab_size"]
        name = text.get("hf_tokenizer_name")
        named = name or "openai/clip-vit-base-patch32"
        known = (
            ""
            if name or words == _TOWER_DEFAULTS["text_cfg"]["vocab_size"]
            else (f", or another one with its {words:,} tokens")
        )
        raise place.refuse(
            "it is a checkpoint of open_clip without a tokenizer beside it. Name one with "
            f"`processor`: {named}{known}."
        )
    model: Any = CLIPModel(clip_config(model_cfg))
    _fill(place, model, _read_weights(place))
    images = image_processor(_side(vision), given.get("preprocess_cfg") or {})
    made = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    return model.to(dtype).eval() if dtype else model.eval(), made


def clip_config(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    """Config of the `CLIPModel` that is equal to a model of open_clip."""
    vision, text = (_tower(model_cfg, name) for name in ("vision_cfg", "text_cfg"))
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"

    def common(tower: Mapping[str, Any]) -> dict[str, Any]:
        tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
        return {
            "hidden_size": tower["width"],
            "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
            "num_hidden_layers": tower["layers"],
            "hidden_act": "gelu_pytorch_tanh" if tanh and activation == "gelu" else activation,
            "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
        }

    # By the largest token, as open_clip's argmax: of CLIP's vocabulary, that is the end token.
    last = text["vocab_size"] - 1 if text["pool_type"] == "argmax" else text["eos_id"]
    return CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config=common(vision)
        | {
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": _side(vision),
            "patch_size": vision["patch_size"],
        },
        text_config=common(text)
        | {
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": max(last - 1, 0),
            "eos_token_id": last,
        },
    )


def image_processor(size: int, preprocess: Mapping[str, Any]) -> CLIPImageProcessor:
    """What makes images as open_clip's transform for inference does."""
    squashed = preprocess.get("resize_mode") == "squash"
    square = {"height": size, "width": size}
    return CLIPImageProcessor(
        size=square if squashed else {"shortest_edge": size},
        crop_size=square,
        do_center_crop=not squashed,
        image_mean=_channels(preprocess.get("mean") or MEAN),
        image_std=_channels(preprocess.get("std") or STD),
        resample=BILINEAR if preprocess.get("interpolation") == "bilinear" else BICUBIC,
    )


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip by the names that they have in `CLIPModel`.

    Raises:
        KeyError: the name of a weight that it has no place for.
    """
    named = {_plain(name): value for name, value in weights.items()}
    return {new: value for name in named for new, value in _renamed(name, named)}


def _renamed(name: str, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A weight by its names in `CLIPModel`: three for the joint projection of an attention."""
    value = weights[name]
    if name in _BESIDE_LAYERS:
        yield _BESIDE_LAYERS[name], value.reshape(()) if name == "logit_scale" else value
    elif name in _TRANSPOSED:
        yield _TRANSPOSED[name], value.T
    elif layer := _LAYER.fullmatch(name):
        tower = "vision_model" if layer["stack"] == "visual." else "text_model"
        prefix, part = f"{tower}.encoder.layers.{layer['number']}.", layer["part"]
        if joint := re.fullmatch(r"attn\.in_proj_(weight|bias)", part):
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                yield f"{prefix}self_attn.{letter}_proj.{joint[1]}", third
        elif part in _PARTS:
            scale = weights.get(name.removesuffix(part) + _SCALED.get(part, ""))
            yield prefix + _PARTS[part], value if scale is None else _scaled(value, scale)
        elif part not in _SCALED.values():
            raise KeyError(name)
    elif name != "attn_mask":
        raise KeyError(name)


def _scaled(value: Tensor, scale: Tensor) -> Tensor:
    return value * (scale[:, None] if value.ndim == 2 else scale)


def _plain(name: str) -> str:
    """Name without the prefixes of a parallel training, and of a text tower of its own."""
    return name.removeprefix("module.").removeprefix("text.")


def _require_covered(place: Place, model_cfg: Mapping[str, Any]) -> None:
    found = list(_other_parts(model_cfg))
    if found:
        raise place.refuse(
            f"it is a model of open_clip with {', '.join(found)}, which CLIPModel has not. {NATIVE}"
        )


def _other_parts(model_cfg: Mapping[str, Any]) -> Iterator[str]:
    for name in ("vision_cfg", "text_cfg"):
        tower = _tower(model_cfg, name)
        yield from (what for key, what in _OTHER_PARTS.items() if tower.get(key))
    vision, text = (_tower(model_cfg, name) for name in ("vision_cfg", "text_cfg"))
    if not isinstance(vision["layers"], int):
        yield "a ResNet for images"
    if vision["pool_type"] != "tok":
        yield f"a pooling of images by {vision['pool_type']!r}"
    if text["pool_type"] not in ("argmax", "eos"):
        yield f"a pooling of texts by {text['pool_type']!r}"
    if text["pool_type"] == "eos" and text["eos_id"] == 2:
        yield "an end token of number 2, which CLIPModel reads in another way"
    if text.get("proj_type", "linear") != "linear":
        yield f"a text projection of type {text['proj_type']!r}"
    if model_cfg.get("multimodal_cfg"):
        yield "a decoder of texts (CoCa)"
    if model_cfg.get("init_logit_bias") is not None:
        yield "a bias of its logits (the sigmoid loss)"
    size = vision["image_size"]
    if not isinstance(size, int) and len({*size}) > 1:
        yield "images that are not square"


def _tower(model_cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    given = model_cfg.get(name) or {}
    return _TOWER_DEFAULTS[name] | {key: value for key, value in given.items() if value is not None}


def _side(vision: Mapping[str, Any]) -> int:
    size = vision["image_size"]
    return int(size if isinstance(size, int) else size[0])


def _channels(value: Any) -> list[float]:
    return [float(value)] * 3 if isinstance(value, int | float) else [float(one) for one in value]


def _read_weights(place: Place) -> dict[str, Tensor]:
    try:
        if WEIGHTS in place.files:
            return load_file(str(place.find(WEIGHTS)))
        if PICKLE not in place.files:
            raise place.refuse(f"it has {CONFIG}, but no weights ({WEIGHTS}).")
        found = torch.load(str(place.find(PICKLE)), map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise place.refuse(
            f"its weights cannot be read, and are not opened in any other way, since that could "
            f"run anything: {reason}"
        ) from error
    weights: dict[str, Tensor] = found.get("state_dict", found)
    return weights


def _fill(place: Place, model: Any, weights: Mapping[str, Tensor]) -> None:
    """Put weights into the model, all of them and no others."""
    here = model.state_dict()
    try:
        weights = convert(weights)
    except KeyError as error:
        raise place.refuse(
            f"it is a folder of open_clip whose weights have {error.args[0]}, which CLIPModel has "
            f"not. {NATIVE}"
        ) from error
    lacking = sorted({name for name in here if "position_ids" not in name} - weights.keys())
    odd = [
        f"{name} {tuple(value.shape)} for {tuple(here[name].shape)}"
        for name, value in weights.items()
        if name in here and value.shape != here[name].shape
    ]
    if lacking or odd:
        what = f"lacks {lacking[0]}" if lacking else f"has {odd[0]}"
        raise place.refuse(
            f"it is a folder of open_clip whose weights are not of the model that its {CONFIG} "
            f"names: it {what}. {NATIVE}"
        )
    model.load_state_dict(dict(weights), strict=False)
