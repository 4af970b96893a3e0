"""Models and fits from a folder or the Hub, and fits into a folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import (
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from transformers import AutoModel, AutoProcessor

from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import State, read_state, write_state
from hf_ecif.utils.files import FIT, read_json, write_json
from hf_ecif.utils.hub_errors import TransportError, explain_hub_error, is_unreachable
from hf_ecif.utils.hub_paths import HubPath, parse_model_path

_log = logging.getLogger(__name__)
CONFIG = "influence_config.json"


class SavedFit(NamedTuple):
    """A fit as it was saved, beside its model.

    Attributes:
        model: name of the model that was fitted; empty if it had none.
        config: config of the fit.
        fitted: what `Fitted.from_state` reads.
    """

    model: str
    config: InfluenceConfig
    fitted: State


class _Place(NamedTuple):
    """Where a model is.

    Attributes:
        path: a folder, or ``owner/name``.
        revision: on the Hub; None for its main branch, and of a folder.
        token: access token of the Hub.
    """

    path: str
    revision: str | None = None
    token: str | bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Given options, as arguments of the loaders."""
        given = {"revision": self.revision, "token": self.token}
        return {name: value for name, value in given.items() if value is not None}


def load_model(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Model and processor from a folder or the Hub, with weights from safetensors only.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        token: access token of the Hub; the user's login if absent.
        dtype: dtype of the weights; that of accelerate's settings if absent.
        device: device of the weights; accelerate's if absent.

    Raises:
        UserError: nothing there, or not loadable.
    """
    wanted, target = _dtype(dtype), _device(device)
    place = _locate(name, revision, token)
    is_folder, is_named = Path(place.path).is_dir(), parse_model_path(name) is not None
    if is_folder and is_named:
        _log.warning("%s: The Hub cannot be reached. Taking the copy from an earlier run.", name)
    if not is_folder and not is_named:
        raise UserError(_unloadable(name, "no such folder."))
    try:
        model = AutoModel.from_pretrained(
            place.path, dtype=wanted, use_safetensors=True, **place.options
        ).to(target)
        processor = AutoProcessor.from_pretrained(place.path, **place.options)
    except (OSError, ValueError, KeyError, TransportError) as error:
        reason = str(error).strip().splitlines()[0]
        if not Path(name).exists():
            on_hub = explain_hub_error(error) or reason
            reason = f"no such folder, and the Hub does not give it. {on_hub}"
        raise UserError(_unloadable(name, reason)) from error
    check_processor(processor, f"The processor of `model={name!r}`")
    return model, processor


def _unloadable(name: str, reason: str) -> str:
    return (
        f"`model={name!r}` cannot be loaded: {reason} Give a folder written by save_pretrained "
        "(model and processor) or a Hub id, such as openai/clip-vit-base-patch32."
    )


def check_processor(processor: Any, whose: str) -> None:
    """Check that images and texts can be prepared.

    Raises:
        UserError: one of the two cannot.
    """
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"{whose} is no processor for images and texts, but {type(processor).__name__}. It "
            "must be what AutoProcessor.from_pretrained loads for the model, or saved beside it: "
            "processor.save_pretrained(folder)."
        )


def load_fit(
    name: str, *, revision: str | None = None, token: str | bool | None = None
) -> SavedFit | None:
    """The fit that was saved in a folder or a repository; None if there is none.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        token: access token of the Hub; the user's login if absent.
    """
    place = _locate(name, revision, token)
    config, fit = (_find_file(place, file) for file in (CONFIG, FIT))
    if config is None or fit is None:
        return None
    values = read_json(config)
    model = values.pop("model", "")
    return SavedFit(model, InfluenceConfig.from_dict(values), read_state(fit))


def find_file(
    name: str, file: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path | None:
    """A file beside a fit; None where it is not there. Arguments are those of `load_fit`."""
    return _find_file(_locate(name, revision, token), file)


def find_commit(name: str) -> str | None:
    """The commit of a model of the Hub that was loaded; None of a folder, or of one in memory."""
    place = _locate(name)
    file: Any = Path(place.path, "config.json")
    if not Path(place.path).is_dir():
        try:
            file = try_to_load_from_cache(place.path, "config.json", revision=place.revision)
        except HFValidationError:  # no name that the Hub could have
            return None
    # The cache has a folder for every commit.
    found = isinstance(file, str | Path) and re.search(r"snapshots/([0-9a-f]{40})/", str(file))
    return found[1] if found else None


def save_model(model: Any, processor: Any, folder: str | Path) -> None:
    """Write a model and its processor, as transformers' own `from_pretrained` reads them."""
    model.save_pretrained(folder)
    processor.tokenizer("")  # else it is saved with the padding and the truncation of its last call
    processor.save_pretrained(folder)


def save_fit(folder: Path, fit: SavedFit) -> None:
    """Write a fit into a folder, beside its model."""
    write_json({"model": fit.model} | fit.config.to_dict(), folder / CONFIG)
    write_state(fit.fitted, folder / FIT)


def _locate(name: str, revision: str | None = None, token: str | bool | None = None) -> _Place:
    place = parse_model_path(name)
    if place is None:
        return _Place(str(Path(name).expanduser()), revision, token)
    if revision is not None and place.revision is not None:
        raise UserError(
            f"`model={name!r}` names the revision {place.revision!r}, and `revision={revision!r}` "
            "is given, too. Leave one of them out."
        )
    place = place._replace(revision=revision or place.revision)
    copy = None if _is_reachable(place, token) else _find_copy(place)
    return _Place(copy) if copy else _Place(place.repo_id, place.revision, token)


def _is_reachable(place: HubPath, token: str | bool | None) -> bool:
    try:
        HfApi(token=token).model_info(place.repo_id, revision=place.revision)
    except Exception as error:  # of any other kind: loading says what it is
        return not is_unreachable(error)
    return True


def _find_copy(place: HubPath) -> str | None:
    """The folder of an earlier run in the cache: the loaders ask the Hub for minutes, and fail."""
    try:
        return snapshot_download(place.repo_id, revision=place.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _find_file(place: _Place, file: str) -> Path | None:
    """A file of a folder or a repository; None where it is not there."""
    if Path(place.path).is_dir():
        path = Path(place.path, file)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(place.path, file, **place.options))
    except (EntryNotFoundError, HFValidationError):
        return None


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
