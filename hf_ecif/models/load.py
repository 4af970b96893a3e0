"""A model and its processor, from a folder or the Hub, whatever wrote them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from hf_ecif.errors import UserError
from hf_ecif.models.embeddings import (
    MODEL_TYPE,
    EmbeddingModel,
    EmbeddingProcessor,
    embedding_model,
)
from hf_ecif.models.open_clip import is_open_clip, load_open_clip
from hf_ecif.models.place import Place, locate
from hf_ecif.models.processors import load_processor
from hf_ecif.models.saved import REMEDY, describe_file, load_saved
from hf_ecif.utils import distributed

_log = logging.getLogger(__name__)
_DEEPEST = 4  # adapters of adapters of a wrapped model; more is a circle


def load_model(
    name: str,
    *,
    processor: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Model and processor from a folder or the Hub.

    Checkpoints of transformers (safetensors, or pickles by ``weights_only``), of open_clip and of
    sentence-transformers, adapters of peft and checkpoints of trainings are read.

    Args:
        name: folder or Hub id.
        processor: folder or Hub id of the processor, where none lies beside the model.
        revision: branch, tag or commit on the Hub.
        token: access token of the Hub; the user's login if absent.
        dtype: dtype of the weights; that of accelerate's settings if absent.
        device: device of the weights; accelerate's if absent.

    Raises:
        UserError: nothing there, or not loadable.
    """
    wanted, target = _dtype(dtype), _device(device)
    made = embedding_model(name)
    if made is not None:
        return made.to(target, wanted), EmbeddingProcessor(made.config.width)
    place = locate(name, revision, token)
    if place.is_copy:
        _log.warning("%s: The Hub cannot be reached. Taking the copy from an earlier run.", name)
    model, found = _load(place, processor, wanted)
    return model.to(target), found


def _load(
    place: Place, processor: str | None, dtype: torch.dtype | None, depth: int = 0
) -> tuple[Any, Any]:
    if place.folder and place.folder.is_file():
        raise place.refuse(describe_file(place.folder))
    if place.folder and not place.folder.exists():
        raise place.refuse(f"no such folder. {REMEDY}")
    if depth > _DEEPEST:
        raise place.refuse("its adapters and modules lead in a circle.")
    files = place.files
    if "modules.json" in files and not place.has("config.json"):
        return _load(_inner_module(place), processor, dtype, depth + 1)
    if "adapter_config.json" in files and "config.json" not in files:
        return _load_adapted(place, processor, dtype, depth)
    if place.read("config.json").get("model_type") == MODEL_TYPE:
        model: Any = EmbeddingModel.from_pretrained(place.path, dtype=dtype, **place.options)
        return model, EmbeddingProcessor(model.config.width)
    if is_open_clip(place):
        return load_open_clip(place, processor, dtype)
    model = load_saved(place, dtype)
    return model, load_processor(place, processor)


def _inner_module(place: Place) -> Place:
    """The folder of the CLIP model in one of sentence-transformers, or the same place."""
    path = place.find("modules.json")
    assert path is not None
    modules = _read_list(path, place)
    for module in modules:
        folder = str(module.get("path", ""))
        inner = place.under(folder)
        if folder and inner.find("config.json") and "CLIP" in str(module.get("type", "")):
            return inner
    kinds = ", ".join(str(module.get("type", "?")).rpartition(".")[2] for module in modules)
    raise place.refuse(
        f"it is a model of sentence-transformers without a CLIP in it, but {kinds}. {REMEDY}"
    )


def _read_list(path: Path, place: Place) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise place.refuse(f"its {path.name} cannot be read: {error}.") from error
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _load_adapted(
    place: Place, processor: str | None, dtype: torch.dtype | None, depth: int
) -> tuple[Any, Any]:
    """The base model with adapters of peft, and the processor of one of the two."""
    base = place.read("adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise place.refuse(
            "it holds adapters, and their adapter_config.json names no base model. Merge them into "
            "their model (merge_and_unload), and save that."
        )
    own = "processor_config.json" in place.files or "preprocessor_config.json" in place.files
    beside = place.path if own and place.folder else None
    try:
        under = locate(str(base), token=place.token)
        model, made = _load(under, processor or beside, dtype, depth + 1)
    except UserError as error:
        raise place.refuse(f"it holds adapters of {base}. {error}") from error
    try:
        model.load_adapter(place.path, adapter_kwargs=place.options)
    except ImportError as error:
        raise place.refuse(
            "it holds adapters, which need the package peft: pip install 'hf_ecif[lora]'."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise place.refuse(f"its adapters do not fit {base}: {reason}") from error
    return model, made


def _dtype(given: str | torch.dtype | None) -> torch.dtype:
    if given is None:
        return distributed.dtype()
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype = {given!r}: must be float32, float64, float16 or bfloat16.")
    return found


def _device(given: str | torch.device | None) -> torch.device:
    if given is None:
        return distributed.device()
    try:
        return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device = {given!r} cannot be used here: {reason}") from error
