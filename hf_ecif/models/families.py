"""Families of transformers whose contrastive part has another form than CLIP's.

Most dual encoders have ``get_text_features``, ``get_image_features`` and a ``logit_scale``, and are
used as they are. ALIGN keeps a temperature, and BLIP's retrieval model has heads without methods:
each becomes a subclass with what is missing, over the same weights, and is saved as what it was.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.align.modeling_align import AlignModel
from transformers.models.blip.modeling_blip import BlipForImageTextRetrieval

# What pairs other things than images and texts, by model type.
REFUSED = {
    "clap": "it pairs texts with sounds, and hf_ecif reads images. Embed the pairs with it, and "
    "give the embeddings (`embeddings`).",
    "xclip": "it pairs texts with videos, and its texts depend on the video. Embed the pairs with "
    "it, and give the embeddings (`embeddings`).",
    "clvp": "it pairs texts with speech, and hf_ecif reads images. Embed the pairs with it, and "
    "give the embeddings (`embeddings`).",
    "blip-2": "its image has 32 embeddings, of which the best one counts for each text. Use a "
    "model with one embedding, such as BLIP (Salesforce/blip-itm-base-coco).",
}
BLIP_SCALE = math.log(1 / 0.07)  # BLIP learns a temperature from 0.07 on, and does not publish it


class ScaledAlign(AlignModel):  # type: ignore[misc]  # transformers has no types for it
    """ALIGN with ``logit_scale``, the negative logarithm of its temperature."""

    @classmethod
    def of(cls, model: nn.Module) -> ScaledAlign:
        """The model itself, from now on of this class."""
        temperature = cast(Tensor, model._parameters.pop("temperature"))
        scale = nn.Parameter(-temperature.data.log(), requires_grad=temperature.requires_grad)
        model.register_parameter("logit_scale", scale)
        model.__class__ = cls
        return cast(ScaledAlign, model)

    @property
    def temperature(self) -> Tensor:
        """Temperature, as ALIGN's own forward divides by it."""
        return (-cast(Tensor, self.logit_scale)).exp()

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Save as an `AlignModel`."""
        weights = dict(self.state_dict())
        weights["temperature"] = (-weights.pop("logit_scale")).exp()
        _save_as(AlignModel, self, weights, *args, **options)


class ContrastiveBlip(BlipForImageTextRetrieval):  # type: ignore[misc]  # likewise
    """BLIP's retrieval model by its contrastive heads, as with ``use_itm_head=False``."""

    @classmethod
    def of(cls, model: nn.Module) -> ContrastiveBlip:
        """The model itself, from now on of this class."""
        like = next(model.parameters())
        scale = torch.full((), BLIP_SCALE, dtype=like.dtype, device=like.device)
        model.register_parameter("logit_scale", nn.Parameter(scale))
        model.__class__ = cls
        return cast(ContrastiveBlip, model)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        """Projected first token ``(B, d)``, not normalised; BLIP has no types of tokens."""
        hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return cast(Tensor, self.text_proj(hidden.last_hidden_state[:, 0]))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected first patch ``(B, d)``, not normalised."""
        hidden = self.vision_model(pixel_values=pixel_values)
        return cast(Tensor, self.vision_proj(hidden.last_hidden_state[:, 0]))

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Save as a `BlipForImageTextRetrieval`."""
        weights = dict(self.state_dict())
        del weights["logit_scale"]
        _save_as(BlipForImageTextRetrieval, self, weights, *args, **options)


def adapt(model: nn.Module) -> nn.Module:
    """The model, with the form that CLIP has where its own is another."""
    if type(model) is AlignModel:
        return ScaledAlign.of(model)
    if type(model) is BlipForImageTextRetrieval:
        return ContrastiveBlip.of(model)
    return model


def _save_as(
    kind: type[Any], model: Any, weights: dict[str, Tensor], *args: Any, **options: Any
) -> None:
    """Save a model under the name of another class, which is the one that loads it."""
    own = type(model)
    model.__class__ = kind
    try:
        kind.save_pretrained(model, *args, state_dict=weights, **options)
    finally:
        model.__class__ = own
