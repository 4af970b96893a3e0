"""Checkpoints as transformers saves them, and the adapters, wrappers and remains around them."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.blip.modeling_blip import BlipForImageTextRetrieval

from hf_ecif.models.families import REFUSED, adapt
from hf_ecif.models.place import Place
from hf_ecif.models.processors import LOAD_ERRORS
from hf_ecif.utils.hub_errors import explain_hub_error

REMEDY = (
    "Give a folder written by save_pretrained (model and processor) or a Hub id, such as "
    "openai/clip-vit-base-patch32."
)
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FOREIGN = {
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "model.onnx": "ONNX",
    "onnx/model.onnx": "ONNX",
}
_LFS = b"version https://git-lfs"


def load_saved(place: Place, dtype: torch.dtype | None) -> Any:
    """A dual encoder as `save_pretrained` or a training writes it.

    Raises:
        UserError: it says what is there, and what would work.
    """
    _require_known(place)
    try:
        model, report = _class_of(place).from_pretrained(
            place.path,
            dtype=dtype,
            use_safetensors=_has_safetensors(place),
            trust_remote_code=False,
            output_loading_info=True,
            **place.options,
        )
    except (*LOAD_ERRORS, SafetensorError, UnpicklingError) as error:
        raise place.refuse(_explain(place, error)) from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise place.refuse(
            f"the weights of {len(lacking)} layers are missing ({', '.join(lacking[:3])}), so that "
            f"it is no whole {type(model).__name__}. {REMEDY}"
        )
    return adapt(model)


def describe(place: Place) -> str:
    """What a folder without a config is, and what would work instead."""
    files = place.files
    folders = sorted({file.partition("/")[0] for file in files if "/" in file})
    checkpoints = [name for name in folders if name.startswith("checkpoint-")]
    if "model_index.json" in files:
        what = "it is a pipeline of diffusers, which makes images and does not compare them."
        return f"{what} {REMEDY}"
    if checkpoints:
        last = max(checkpoints, key=lambda name: (len(name), name))
        return f"it holds the checkpoints of a training. Give one of them: {place.name}/{last}."
    if any(name.startswith(("global_step", "pytorch_model_fsdp")) for name in folders):
        return (
            "it holds the parts of a distributed training. Join them first: accelerate "
            "merge-weights (FSDP), or zero_to_fp32.py (DeepSpeed), into a folder with config.json."
        )
    for name, package in _FOREIGN.items():
        if name in files:
            return f"its weights are for {package}. Give weights for PyTorch, as safetensors."
    if any(file.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")) for file in files):
        return (
            "it has weights, but no config.json, so it is unknown which model they are of. "
            f"Save the model with save_pretrained, which writes both. {REMEDY}"
        )
    found = ", ".join(sorted(files)[:4]) or "nothing"
    return f"it is no model's folder: it holds {found}. {REMEDY}"


def describe_file(path: Path) -> str:
    """What a single file is, and what would work instead."""
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return (
            "it is one file of weights. If it is a checkpoint of open_clip's training, save it as "
            "a folder with open_clip.push_to_hf_hub's save_for_hf, which writes "
            "open_clip_config.json beside the weights, and give that."
        )
    return f"it is a file. {REMEDY}"


def _require_known(place: Place) -> None:
    """Refuse, before any weights are loaded, what is not a dual encoder of images and texts."""
    if not place.has("config.json"):
        raise place.refuse(describe(place))
    if place.on_hub and place.listed is None:
        return  # the loader says why the Hub does not tell
    config = place.read("config.json")
    kind = str(config.get("model_type", ""))
    if kind not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise place.refuse(
                "it comes with code of its own (auto_map in its config.json), and code that is "
                "downloaded is not run here. Load it yourself and pass model and processor to "
                f"hf_ecif.audit, or use a model that transformers knows. {REMEDY}"
            )
        known = f"model_type {kind!r}" if kind else "no model_type"
        raise place.refuse(
            f"its config.json has {known}, which transformers {transformers.__version__} does not "
            f"know. {REMEDY}"
        )
    if kind in REFUSED:
        raise place.refuse(f"{REFUSED[kind]}")
    named = _class_of(place)
    if named is not BlipForImageTextRetrieval and not (
        hasattr(named, "get_text_features") and hasattr(named, "get_image_features")
    ):
        raise place.refuse(
            f"{named.__name__} is not a contrastive dual encoder: it does not embed images and "
            f"texts. {REMEDY}"
        )


def _class_of(place: Place) -> Any:
    """Class of transformers that loads the checkpoint."""
    if place.on_hub and place.listed is None:
        return AutoModel
    config = place.read("config.json")
    if BlipForImageTextRetrieval.__name__ in (config.get("architectures") or ()):
        return BlipForImageTextRetrieval
    kinds = AutoModel._model_mapping
    made = AutoConfig.for_model(config["model_type"])
    found = kinds.get(type(made), AutoModel)
    return found[0] if isinstance(found, tuple) else found


def _has_safetensors(place: Place) -> bool:
    """Whether the weights are safetensors; those of a pickle are read with ``weights_only``."""
    files = place.files
    if not files or any(name in files for name in SAFETENSORS):
        return True
    if any(name in files for name in PICKLES):
        return False
    raise place.refuse(_without_weights(place))


def _without_weights(place: Place) -> str:
    for name, package in _FOREIGN.items():
        if name in place.files:
            return f"its weights are for {package}. Give weights for PyTorch, as safetensors."
    return f"it has a config.json, but no weights (model.safetensors). {REMEDY}"


def _explain(place: Place, error: Exception) -> str:
    """What went wrong in the loader, and what to do."""
    if place.on_hub:
        on_hub = explain_hub_error(error) or _first_line(error)
        return f"no such folder, and the Hub does not give it. {on_hub} {REMEDY}"
    pointer = _pointer_in(Path(place.path))
    if pointer:
        return f"{pointer} is a pointer of Git LFS, not the weights. Fetch them: git lfs pull."
    causes = {type(cause) for cause in (error, error.__cause__, error.__context__)}
    if UnpicklingError in causes or "weights_only" in str(error).lower():
        return (
            "its pytorch_model.bin holds more than weights, and is not opened, since that could "
            "run anything. Save it as safetensors where you trust it: "
            "model.save_pretrained(folder)."
        )
    return f"{_first_line(error)} {REMEDY}"


def _pointer_in(folder: Path) -> str | None:
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                return path.name
    return None


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."
