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
from hf_ecif.files import read_json, write_json
from hf_ecif.hub_errors import explain_hub_error
from hf_ecif.hub_paths import parse_hub_path

FIT, CONFIG = "influence.safetensors", "influence_config.json"


class SavedFit(NamedTuple):
    """A fit as it was saved, beside its model.

    Attributes:
        model: name of the model that was fitted; empty if it had none.
        config: of the fit.
        fitted: what `Fitted.from_state` reads.
    """

    model: str
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
        if not Path(name).exists():
            on_hub = explain_hub_error(error) or reason
            reason = f"no such folder, and the Hub does not give it. {on_hub}"
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
    values = read_json(Path(files[0]))
    model = values.pop("model", "")
    return SavedFit(model, InfluenceConfig.from_dict(values), read_state(Path(files[1])))


def save_fit(folder: Path, fit: SavedFit) -> None:
    """Write a fit into a folder, beside its model."""
    write_json({"model": fit.model} | fit.config.to_dict(), folder / CONFIG)
    write_state(fit.fitted, folder / FIT)


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Path or repository, and the revision where one is named."""
    if Path(name).exists():
        return name, {}
    plain = name.removeprefix("hf://").removeprefix("models/")
    place = parse_hub_path(plain)
    if place is None or place.revision is None:
        return plain, {}
    return place.repo_id, {"revision": place.revision}
