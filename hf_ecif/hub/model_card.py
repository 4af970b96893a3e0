"""Card of a model from which rows were removed, or with a fitted influence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_ecif.errors import UserError
from hf_ecif.hub.markdown import (
    Metadata,
    as_list,
    describe_solve,
    merge_card,
    read_card,
    render,
)
from hf_ecif.utils.files import FIT, read_json
from hf_ecif.utils.formatting import models_of_removal
from hf_ecif.utils.hub_paths import HubPath, hide_folders, parse_model_path

INHERITED = ("license", "license_name", "license_link", "language")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class ModelKind:
    """What a pushed model folder holds.

    Attributes:
        name: name in the template.
        evidence: file in the folder that says how the model was made.
        needed: keys that the file must have.
        title: title of the commit.
        library: library that loads the model.
        tags: tags on the Hub.
    """

    name: str
    evidence: str
    needed: tuple[str, ...]
    title: str
    library: str
    tags: tuple[str, ...]


EDITED = ModelKind(
    "edited",
    evidence="removal.json",
    needed=(
        *("model", "dataset", "split", "where", "rows", "predicted_change", "measures"),
        *("removal", "warnings", "config"),
    ),
    title="Remove pairs",
    library="transformers",
    tags=("hf-ecif", "data-removal"),
)
INFLUENCE = ModelKind(
    "influence",
    evidence="influence_config.json",
    needed=("model", "curvature"),
    title="Fit influence",
    library="hf_ecif",
    tags=("hf-ecif", "influence-function", "data-valuation"),
)


def write_model_card(
    card: str | None,
    repo_id: str,
    kind: ModelKind,
    facts: dict[str, Any],
    *,
    base_card: str | None = None,
) -> str:
    """README of a pushed model folder.

    Args:
        card: the README into which our section goes; None if there is none.
        repo_id: repository of the new README.
        kind: what the folder holds.
        facts: from `read_facts`.
        base_card: card of the model that this one comes from; a new card inherits its licence.

    Raises:
        UserError: a card's metadata is not a YAML mapping.
    """
    base = base_model(facts)
    inherited: Metadata = {}
    if card is None and base_card is not None:
        theirs, _ = read_card(base_card)
        inherited = {name: theirs[name] for name in INHERITED if name in theirs}
    measured = facts.get("measures", {}).get("query", {})
    section = render(
        "model_card.md.j2",
        repo_id=repo_id,
        kind=kind.name,
        base=base and base.repo_id,
        facts=facts,
        states=[models_of_removal(facts["config"])[state] for state in measured],
        settings=_settings(facts),
    )

    def change(metadata: Metadata) -> Metadata:
        tags = [str(tag) for tag in as_list(metadata.get("tags"))]
        bases = [str(name) for name in as_list(metadata.get("base_model"))]
        bases = bases or as_list(base and base.repo_id)
        changed = (
            inherited
            | metadata
            | {
                "library_name": kind.library,
                "base_model": bases or None,
                "tags": tags + [tag for tag in kind.tags if tag not in tags],
            }
        )
        return {name: value for name, value in changed.items() if value is not None}

    return merge_card(card, section, repo_id.partition("/")[2], change, ModelCardData)


def find_kind(folder: Path) -> ModelKind | None:
    """Kind of a model folder; None if it is of no known kind."""
    return next((kind for kind in (INFLUENCE, EDITED) if (folder / kind.evidence).is_file()), None)


def model_files(folder: Path) -> dict[str, Path | bytes]:
    """Files of a model folder by path in the repository.

    Hidden files, links, the README and the page are left out, and paths of this machine are hidden.

    Raises:
        UserError: there are no weights, or some that are not safetensors.
    """
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    }
    paths = {name: path for name, path in paths.items() if not name.startswith(".")}
    for stays in ("README.md", "removal.html"):  # the page names folders; the card has its content
        paths.pop(stays, None)
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
            told = hide_folders(read_json(folder / kind.evidence))
            files[kind.evidence] = (json.dumps(told, indent=2) + "\n").encode()
    return files


def read_facts(folder: Path, kind: ModelKind) -> dict[str, Any]:
    """Facts about how a model was made, from the folder's files, without paths of this machine.

    Raises:
        UserError: a file is damaged, or of another version.
    """
    facts: dict[str, Any] = hide_folders(read_json(folder / kind.evidence))
    missing = [name for name in kind.needed if name not in facts]
    if missing:
        raise UserError(
            f"{folder / kind.evidence} lacks {missing[0]!r}: it is of another version. Make the "
            "folder again."
        )
    if kind is INFLUENCE:
        from hf_ecif.utils.checkpoints import read_values  # with torch

        try:
            facts["fitted"] = read_values(folder / FIT)
        except Exception as error:  # safetensors raises its own errors
            raise UserError(f"{folder / FIT} cannot be read: {error}. Fit again.") from error
    return facts


def base_model(facts: dict[str, Any]) -> HubPath | None:
    """Model on the Hub that this one comes from; None for a local one, unknown to others."""
    model = facts.get("model")
    return parse_model_path(model) if isinstance(model, str) else None


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    """Rows of the table on how it was done: sources, solves, and the config."""
    if "fitted" in facts:
        fitted = facts["fitted"]
        # The file of a fit holds its config and the model's name.
        config = {name: value for name, value in facts.items() if name not in ("model", "fitted")}
        settings = {
            "rows fitted on": f"{fitted['train_count']:,}",
            "query's loss, before and after the fit": f"{fitted['query_loss_before']:.4g}, "
            f"{fitted['query_loss']:.4g} nats",
        }
        solves = {f"solver for the {purpose}": one for purpose, one in fitted["solvers"].items()}
    else:
        config = facts["config"]
        settings = {name: facts[name] for name in ("dataset", "split", "where", "rows")}
        steps = facts["removal"]["solvers"]
        solves = {f"solver, step {step}": one for step, one in enumerate(steps, 1)}
    settings |= {name: describe_solve(report, config) for name, report in solves.items()}
    return {"model": facts["model"]} | settings | config
