"""The card of a model that rows were removed from, or that carries a fitted influence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_ecif.cards import Metadata, as_list, hide_folders, merge_card, render
from hf_ecif.errors import UserError
from hf_ecif.files import read_json
from hf_ecif.hub_paths import parse_hub_path

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class ModelKind:
    """What a pushed model folder holds.

    Attributes:
        name: For the template.
        evidence: The file in the folder that tells.
        title: Of the commit.
        library: That loads it.
        tags: For the Hub.
    """

    name: str
    evidence: str
    title: str
    library: str
    tags: tuple[str, ...]


EDITED = ModelKind(
    "edited", "removal.json", "Remove pairs", "transformers", ("hf-ecif", "data-removal")
)
INFLUENCE = ModelKind(
    "influence",
    "influence_config.json",
    "Fit influence",
    "hf_ecif",
    ("hf-ecif", "influence-function", "data-valuation"),
)


def write_model_card(card: str | None, repo_id: str, kind: ModelKind, facts: dict[str, Any]) -> str:
    """The README of a pushed model folder.

    Args:
        card: The README that it goes into, None if there is none.
        repo_id: Where it is going to be.
        kind: What the folder holds.
        facts: Content of the file that tells.

    Raises:
        UserError: The card's metadata is no YAML mapping.
    """
    base = _base_model(facts)
    section = render(
        "model_card.md.j2",
        repo_id=repo_id,
        kind=kind.name,
        base=base or facts.get("model"),
        facts=facts,
        settings=_flatten(facts),
    )

    def change(metadata: Metadata) -> Metadata:
        tags = [str(tag) for tag in as_list(metadata.get("tags"))]
        bases = [str(name) for name in as_list(metadata.get("base_model"))] or as_list(base)
        changed = metadata | {
            "library_name": kind.library,
            "base_model": bases or None,
            "tags": tags + [tag for tag in kind.tags if tag not in tags],
        }
        return {name: value for name, value in changed.items() if value is not None}

    return merge_card(card, section, repo_id.partition("/")[2], change, ModelCardData)


def find_kind(folder: Path) -> ModelKind | None:
    """What a folder holds, None if it is neither."""
    return next((kind for kind in (INFLUENCE, EDITED) if (folder / kind.evidence).is_file()), None)


def model_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a model folder by their path in the repository.

    Hidden files, links and a README stay behind, and no folder of this machine is named.

    Raises:
        UserError: There are no weights, or some that are not safetensors.
    """
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    }
    paths = {name: path for name, path in paths.items() if not name.startswith(".")}
    paths.pop("README.md", None)
    unsafe = [name for name, path in paths.items() if path.suffix in PICKLES]
    if unsafe:
        raise UserError(
            f"{folder / unsafe[0]} can run code when it is loaded. Save the model with safetensors "
            "(save_pretrained does), and delete that file."
        )
    if not any(path.suffix == ".safetensors" for path in paths.values()):
        raise UserError(f"{folder} has no weights (*.safetensors). Save the model again.")
    files: dict[str, Path | bytes] = dict(paths)
    for kind in (INFLUENCE, EDITED):
        if kind.evidence in files:
            facts = hide_folders(read_json(folder / kind.evidence))
            files[kind.evidence] = (json.dumps(facts, indent=2) + "\n").encode()
    return files


def _base_model(facts: dict[str, Any]) -> str | None:
    """The Hub id of the model that this one comes from; a local folder means nothing to others."""
    model = facts.get("model")
    place = parse_hub_path(model) if isinstance(model, str) else None
    return place and place.repo_id


def _flatten(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every single value under a name such as ``config damping``; long lists are left out."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            flat[f"{prefix}{name}"] = f"{value:.4g}"
        elif isinstance(value, str | int | bool):
            flat[f"{prefix}{name}"] = value
    return flat
