"""Where results may go; and files that are written aside and then renamed, never half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_ecif.errors import UserError

CHECKPOINTS = ".checkpoints"  # of a run that is not finished, in its output
PARTIAL = ".partial"  # what a run that was killed leaves behind ends like this


def require_new(output: Path) -> None:
    """Refuse a folder that holds anything, or cannot be written to.

    Raises:
        UserError: it does, or cannot.
    """
    require_writable(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} exists and is not empty. Give a new folder.")


def require_writable(output: Path) -> None:
    """Refuse early what a long run would fail at in the end.

    Raises:
        UserError: it is a file, or below one, or may not be written to.
    """
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output {output}: {there} is a file. Give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: {there} may not be written to. Give another folder.")


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
    write_text(to_json(values, indent=2) + "\n", path)


def to_json(values: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: what is not a number is null."""
    return json.dumps(_finite(values), indent=indent, default=str, allow_nan=False)


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
