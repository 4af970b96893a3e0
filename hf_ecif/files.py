"""Files that are written aside and then renamed, so that none is ever found half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_ecif.errors import UserError

PARTIAL = ".partial"  # what a run that was killed leaves behind ends like this


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` at the end; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete what runs that were killed left half-written, in a folder and below."""
    for path in list(folder.rglob(f".*{PARTIAL}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a file in one step."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(values: dict[str, Any], path: Path) -> None:
    """The same for JSON; what JSON does not know is written as its text."""
    write_text(json.dumps(values, indent=2, default=str) + "\n", path)


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file.

    Raises:
        UserError: It is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Make it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names with values. Make it again.")
    return values
