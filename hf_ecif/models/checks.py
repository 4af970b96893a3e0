"""Checks of a model with its processor, before any work is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hf_ecif.errors import UserError

_SIDE = 64  # of the image by which sizes are tried
_MISFITS = (ValueError, RuntimeError, IndexError, TypeError, KeyError)


def require_finite(model: nn.Module) -> None:
    """Refuse weights that are not numbers, as a fine-tuning leaves them that diverged.

    Raises:
        UserError: it names the first such layer, and says how many there are.
    """
    values = [item for item in model.named_parameters() if item[1].is_floating_point()]
    bad = [name for name, value in values if not bool(value.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} others of {len(values)}" if len(bad) > 1 else ""
        raise UserError(
            f"The model's weights {bad[0]}{more} hold NaN or infinite values, as after a training "
            "that diverged. Take an earlier checkpoint."
        )


def with_padding(processor: Any, model: Any) -> Any:
    """The processor; a copy with a padding token if its tokenizer has none.

    Any token will do, since it is masked or comes after the end of the caption: the end token, or
    else the one that the model's config names.

    Raises:
        UserError: there is no such token either.
    """
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is not None:
        return processor
    number = getattr(getattr(model.config, "text_config", None), "pad_token_id", None)
    known = number is not None and 0 <= number < len(tokenizer)
    token = tokenizer.eos_token or tokenizer.sep_token
    if token is None and known:
        token = tokenizer.convert_ids_to_tokens(number)
    if token is None:
        raise UserError(
            "The tokenizer has no padding token, and no end token to take in its place. Set one "
            "and save it: processor.tokenizer.pad_token = '...'; processor.save_pretrained(folder)."
        )
    processor = deepcopy(processor)
    processor.tokenizer.pad_token = token
    return processor


def require_fit(model: Any, processor: Any) -> None:
    """Refuse a processor that is not the model's, by trying both on one image and one caption.

    Raises:
        UserError: it says the sizes of both.
    """
    tokenizer = processor.tokenizer
    _require_words(model, tokenizer)
    tokens = tokenizer(["a"], return_tensors="pt")
    _require_end(model, tokens["input_ids"][0].tolist())
    texts = {key: tokens[key] for key in tokenizer.model_input_names if key in tokens}
    image = Image.new("RGB", (_SIDE, _SIDE))
    pixels = _as(model, processor.image_processor(images=[image], return_tensors="pt"))
    try:
        with torch.no_grad():
            model.get_image_features(**pixels)
    except _MISFITS as error:
        raise UserError(_misfit_of_image(model, pixels, error)) from error
    try:
        with torch.no_grad():
            model.get_text_features(**_as(model, texts))
    except _MISFITS as error:
        raise UserError(
            f"The model cannot read what the tokenizer makes of a caption: {_line(error)} "
            "Name the right processor with `processor`, or save it beside the model."
        ) from error


def _as(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs in the dtype and on the device of the model."""
    like = next(value for value in model.parameters() if value.is_floating_point())
    return {
        key: value.to(like) if value.is_floating_point() else value.to(like.device)
        for key, value in inputs.items()
        if isinstance(value, Tensor)
    }


def _require_words(model: Any, tokenizer: Any) -> None:
    config = getattr(model.config, "text_config", None)
    count = getattr(config, "vocab_size", None)
    if count is not None and len(tokenizer) > count:
        raise UserError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model embeds {count:,}: it is "
            "another model's. Name the right processor with `processor`, or save it beside the "
            "model."
        )


def _require_end(model: nn.Module, tokens: list[int]) -> None:
    """Refuse captions without the token at which the model reads them: it would take the first."""
    ends = {getattr(module, "eos_token_id", None) for module in model.modules()}
    # A config of 2 is of the first CLIPs, which read at the largest token.
    lacking = [end for end in ends if isinstance(end, int) and end != 2 and end not in tokens]
    if lacking:
        raise UserError(
            f"The model reads a caption at its end token, number {lacking[0]:,}, which this "
            "tokenizer does not set: it is another model's. Name the right processor with "
            "`processor`, or save it beside the model."
        )


def _misfit_of_image(model: Any, inputs: dict[str, Tensor], error: Exception) -> str:
    made = inputs.get("pixel_values")
    size: Any = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    wanted = (size, size) if isinstance(size, int) else tuple(size or ())
    remedy = (
        "Name the right processor with `processor`, or set its size and save it beside the model."
    )
    if made is not None and made.ndim == 4 and wanted and tuple(made.shape[-2:]) != wanted:
        height, width = made.shape[-2:]
        return (
            f"The processor makes images of {height} x {width} pixels, but the model takes "
            f"{wanted[0]} x {wanted[1]}. {remedy}"
        )
    return f"The model cannot read what the processor makes of an image: {_line(error)} {remedy}"


def _line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."
