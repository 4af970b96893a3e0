"""Repositories of the Hub: whole or in part, or as a copy from an earlier run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import datasets.config
from datasets import load_dataset_builder
from huggingface_hub import HfApi

from hf_ecif.data.readers.builders import build, split_of
from hf_ecif.data.readers.patterns import expand_braces
from hf_ecif.data.readers.splits import Built
from hf_ecif.data.readers.tables import loader_of
from hf_ecif.utils.hub_errors import explain_hub_error, is_unreachable
from hf_ecif.utils.hub_paths import HubPath

_log = logging.getLogger(__name__)


def open_repository(place: HubPath, config: str | None) -> Built:
    """Splits of a repository, of a folder or a file in it, or of files by a pattern."""
    files = _ask_hub(place)
    options: dict[str, Any] = {"revision": place.revision}
    if place.path:
        options |= _part(place.path)
    elif files is not None and config is None and _is_downloaded(files):
        options["data_files"] = _by_split(name for name in files if name.endswith(".tar"))
    with _asked_once(reachable=files is not None):
        if files is None and config is None and not place.path:
            options |= _default_of_copy(place)
        return build(place.repo_id, options.pop("name", config), **options)


def _part(path: str) -> dict[str, Any]:
    """Arguments of `load_dataset` for a place in a repository."""
    names = list(expand_braces(path))
    if len(names) > 1 or any(sign in path for sign in "*?["):
        return {"data_files": _by_split(names)}
    if loader_of(path) or path.endswith(".tar"):
        return {"data_files": {split_of(PurePosixPath(path).name): path}}
    return {"data_dir": path}


def _by_split(names: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split_of(name), []).append(name)
    return found


def _is_downloaded(files: Sequence[str]) -> bool:
    """Whether these are tars with their tables beside them, as img2dataset leaves them."""
    names = [PurePosixPath(name) for name in files]
    tars = {name.with_suffix("") for name in names if name.suffix == ".tar"}
    tables = {name.with_suffix("") for name in names if name.suffix == ".parquet"}
    return bool(tars and tables) and tables <= tars


def _ask_hub(place: HubPath) -> list[str] | None:
    """Files of a repository; None, with a warning, where the Hub cannot be asked."""
    try:
        info = HfApi().dataset_info(place.repo_id, revision=place.revision)
        return [one.rfilename for one in info.siblings or ()]
    except Exception as error:
        if not is_unreachable(error):
            raise
        _log.warning(
            "%s: %s Looking for a copy from an earlier run, the newest one%s.",
            place.repo_id,
            explain_hub_error(error),
            f", whether it is {place.revision!r} or not" if place.revision else "",
        )
        return None


@contextmanager
def _asked_once(*, reachable: bool) -> Iterator[None]:
    """Where the Hub did not answer, `datasets` need not try again, for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not reachable
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _default_of_copy(place: HubPath) -> dict[str, str]:
    """Names the default configuration: of several copies, `datasets` does not know which it is."""
    try:
        load_dataset_builder(place.repo_id, "default", revision=place.revision)
    except Exception:  # no copy, or one of a repository where it has another name
        return {}
    return {"name": "default"}
