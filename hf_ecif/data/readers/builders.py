"""Builders of `datasets` for files, folders and repositories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path, PurePath
from typing import Any

from datasets import get_dataset_config_names, load_dataset_builder
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_ecif.data.readers.splits import Built
from hf_ecif.data.readers.webdataset import Shards
from hf_ecif.errors import UserError


def build(
    name: str, config: str | None = None, *, bases: Sequence[Path] = (), **options: Any
) -> Built:
    """Splits by a builder of `datasets`, or by our own for tars.

    Args:
        name: of a loader, a folder or a repository.
        config: which configuration of several.
        bases: folders that paths in the rows may be relative to.
        options: further arguments of `load_dataset_builder`.

    Raises:
        UserError: there are several configurations and none was chosen, or there is no such one.
    """
    try:
        builder = load_dataset_builder(name, config, **options)
    except ValueError as error:
        raise _explain_config(name, config, options, error) from error
    if isinstance(builder, WebDataset):
        builder = Shards(
            data_files=builder.config.data_files,
            dataset_name=builder.dataset_name,
            config_name=builder.config.name,
            base_path=builder.base_path,
            repo_id=builder.repo_id,
            hash=builder.hash,
        )
    return Built(builder, builder.name, bases)


def build_files(
    loader: str, files: Sequence[Path], root: Path, *, bases: Sequence[Path] = (), **options: Any
) -> Built:
    """Splits of local files by a loader of `datasets`.

    Args:
        loader: its name.
        files: one at least.
        root: a folder that they all lie in; their names from there on name their splits.
        bases: folders that paths in the rows may be relative to.
        options: of the loader.
    """
    return build(loader, bases=bases, data_files=by_split(files, root), **options)


def by_split(files: Iterable[Path], root: Path) -> dict[str, list[str]]:
    """Patterns that match these files alone, by the splits that their names tell."""
    found: dict[str, list[str]] = {}
    for file in files:
        split = split_of(file.relative_to(root) if file.is_relative_to(root) else file.name)
        found.setdefault(split, []).append(escape(str(file.resolve())))
    return found


def split_of(name: str | PurePath) -> str:
    """Split that a file or its folders are called by, in the words that `datasets` knows.

    >>> split_of("val/00001.tar"), split_of("pairs-test.csv"), split_of("00000.tar")
    ('validation', 'test', 'train')
    """
    path = PurePath(name)
    words = {word for part in (*path.parts[:-1], path.stem) for word in _words(part)}
    return next(
        (str(split) for split, known in SPLIT_KEYWORDS.items() if words & {*known}), "train"
    )


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())


def _explain_config(
    name: str, config: str | None, options: dict[str, Any], error: ValueError
) -> Exception:
    """The error in our words, where it is about configurations."""
    if "config" not in str(error).lower():
        return error
    try:
        names = get_dataset_config_names(name, revision=options.get("revision"))
    except Exception:  # the first error says more
        return error
    problem = (
        "there are several configurations"
        if config is None
        else f"there is no configuration {config!r}"
    )
    return UserError(f"{problem}. Choose one with `config_name`: {', '.join(names)}.")
