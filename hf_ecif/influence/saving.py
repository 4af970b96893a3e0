"""Fits from a folder or the Hub, and models and fits into a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from hf_ecif.config import InfluenceConfig
from hf_ecif.models.embeddings import EmbeddingProcessor
from hf_ecif.models.place import locate
from hf_ecif.utils.checkpoints import State, read_state, write_state
from hf_ecif.utils.files import FIT, read_json, write_json

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


def load_fit(
    name: str, *, revision: str | None = None, token: str | bool | None = None
) -> SavedFit | None:
    """The fit that was saved in a folder or a repository; None if there is none.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        token: access token of the Hub; the user's login if absent.
    """
    place = locate(name, revision, token)
    config, fit = (place.find(file) for file in (CONFIG, FIT))
    if config is None or fit is None:
        return None
    values = read_json(config)
    model = values.pop("model", "")
    return SavedFit(model, InfluenceConfig.from_dict(values), read_state(fit))


def find_file(
    name: str, file: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path | None:
    """A file beside a fit; None where it is not there. Arguments are those of `load_fit`."""
    return locate(name, revision, token).find(file)


def find_commit(name: str) -> str | None:
    """The commit of a model of the Hub that was loaded; None of a folder, or of one in memory."""
    place = locate(name)
    file: Any = Path(place.path, "config.json")
    if place.folder is None:
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
    if not isinstance(processor, EmbeddingProcessor):
        processor.tokenizer("")  # else it is saved with the padding of its last call
    processor.save_pretrained(folder)


def save_fit(folder: Path, fit: SavedFit) -> None:
    """Write a fit into a folder, beside its model."""
    write_json({"model": fit.model} | fit.config.to_dict(), folder / CONFIG)
    write_state(fit.fitted, folder / FIT)
