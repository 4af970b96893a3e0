"""Models and fits from a folder or the Hub, and fits into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file

from hf_ecif import processes
from hf_ecif.checkpoints import State, read_state, write_state
from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError

FIT, CONFIG = "influence.safetensors", "influence_config.json"


class SavedFit(NamedTuple):
    """A fit as it was saved, beside its model."""

    config: InfluenceConfig
    fitted: State


def load_model(name: str) -> tuple[Any, Any]:
    """Model and processor from a folder or the Hub, with weights from safetensors only.

    Raises:
        UserError: nothing there, or not loadable.
    """
    path, options = _locate(name)
    try:
        model = AutoModel.from_pretrained(
            path, dtype=processes.dtype(), use_safetensors=True, **options
        ).to(processes.device())
        processor = AutoProcessor.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {name!r} cannot be loaded: {reason} Give a folder written by save_pretrained "
            "(model and processor) or a Hub id, such as openai/clip-vit-base-patch32."
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"--model {name!r} has no processor for images and texts. Save it with the processor: "
            "processor.save_pretrained(folder)."
        )
    return model, processor


def load_fit(name: str) -> SavedFit | None:
    """The fit that was saved in a folder or a repository; None if there is none."""
    path, options = _locate(name)
    quiet = {"_raise_exceptions_for_missing_entries": False} | options
    files = [cached_file(path, file, **quiet) for file in (CONFIG, FIT)]
    if None in files:
        return None
    return SavedFit(InfluenceConfig.load(Path(files[0])), read_state(Path(files[1])))


def save_fit(folder: Path, config: InfluenceConfig, fitted: State) -> None:
    """Write a fit into a folder, beside its model."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / CONFIG)
    write_state(fitted, folder / FIT)


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Path or name, and the revision where one is named."""
    if Path(name).exists():
        return name, {}
    path, _, revision = name.partition("@")
    return path, {"revision": revision} if revision else {}
