"""Models and fits from a folder or the Hub, and fits into a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple, cast

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import State, read_state, write_state
from hf_ecif.utils.files import read_json, write_json
from hf_ecif.utils.hub_errors import explain_hub_error, is_unreachable
from hf_ecif.utils.hub_paths import HubPath, parse_model_path

_log = logging.getLogger(__name__)
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
    if path != name and Path(path).is_dir():
        _log.warning("%s: The Hub cannot be reached. Taking the copy from an earlier run.", name)
    try:
        model = AutoModel.from_pretrained(
            path, dtype=distributed.dtype(), use_safetensors=True, **options
        ).to(distributed.device())
        processor = AutoProcessor.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, httpx.TransportError) as error:
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


def find_commit(name: str) -> str | None:
    """The commit of a model of the Hub that was loaded; None of a folder."""
    path, options = _locate(name)
    options |= {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(path, "config.json", **options)  # in the cache, its folder's name tells
    return cast(str | None, extract_commit_hash(file, None))


def save_fit(folder: Path, fit: SavedFit) -> None:
    """Write a fit into a folder, beside its model."""
    write_json({"model": fit.model} | fit.config.to_dict(), folder / CONFIG)
    write_state(fit.fitted, folder / FIT)


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Path or repository, and the revision where one is named."""
    place = parse_model_path(name)
    if place is None:
        return name, {}
    copy = None if _is_reachable(place) else _find_copy(place)
    if copy is not None:
        return copy, {}
    return place.repo_id, {"revision": place.revision} if place.revision else {}


def _is_reachable(place: HubPath) -> bool:
    try:
        HfApi().model_info(place.repo_id, revision=place.revision)
    except Exception as error:  # of any other kind: loading says what it is
        return not is_unreachable(error)
    return True


def _find_copy(place: HubPath) -> str | None:
    """The folder of an earlier run in the cache: the loaders ask the Hub for minutes, and fail."""
    try:
        return snapshot_download(place.repo_id, revision=place.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
