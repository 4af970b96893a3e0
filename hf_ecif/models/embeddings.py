"""A model of embeddings that were made elsewhere: two projections that begin as the identity.

What may change when a pair goes are the projections ``(d, d)`` of either side and the scale, as if
the model that made the embeddings were followed by them. As given, embeddings are the ones given.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ecif.errors import UserError

MODEL_TYPE, INPUT = "hf_ecif_embeddings", "embeddings"
_NAME = re.compile(r"embeddings:(?P<width>\d+):(?P<scale>[\d.e+-]+)")
SCALE = 100.0  # of CLIP at the end of its training, where none is given


class EmbeddingConfig(PreTrainedConfig):
    """Width of the embeddings, and the inverse temperature of the model that made them."""

    model_type = MODEL_TYPE

    def __init__(self, width: int = 8, logit_scale: float = SCALE, **options: Any) -> None:
        self.width = width
        self.logit_scale = logit_scale
        super().__init__(**options)


class EmbeddingModel(PreTrainedModel):
    """Dual encoder whose inputs are embeddings ``(B, d)`` already."""

    config_class = EmbeddingConfig

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__(config)
        # What ends before the projections begin is frozen: the embeddings themselves.
        self.given = nn.Identity()
        self.visual_projection = nn.Linear(config.width, config.width, bias=False)
        self.text_projection = nn.Linear(config.width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)

    def get_image_features(self, embeddings: Tensor) -> Tensor:
        """Projected embeddings of images ``(B, d)``, not normalised."""
        projected: Tensor = self.visual_projection(self.given(embeddings))
        return projected

    def get_text_features(self, embeddings: Tensor) -> Tensor:
        """Projected embeddings of texts ``(B, d)``, not normalised."""
        projected: Tensor = self.text_projection(self.given(embeddings))
        return projected


class EmbeddingProcessor:
    """Stands where other models have a processor: embeddings need none.

    Attributes:
        width: size of the embeddings that the model takes.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def save_pretrained(self, folder: str | Path) -> None:
        """Save nothing."""


def embedding_name(width: int, logit_scale: float | None = None) -> str:
    """Name by which a model of embeddings is loaded, and stands in summaries.

    Args:
        width: size ``d`` of the embeddings.
        logit_scale: inverse temperature, by which cosines are multiplied; 100 if absent.

    Raises:
        UserError: the scale is not positive.

    >>> embedding_name(768)
    'embeddings:768:100.0'
    """
    scale = SCALE if logit_scale is None else float(logit_scale)
    if not scale > 0:
        raise UserError(f"`logit_scale={scale}`: must be positive, such as CLIP's 100.")
    return f"embeddings:{width}:{scale}"


def embedding_model(name: str) -> Any:
    """Model of a name that `embedding_name` made; None of any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    model: Any = EmbeddingModel(EmbeddingConfig(int(found["width"]), float(found["scale"])))
    return model.eval()
