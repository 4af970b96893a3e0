"""Where results may go, and files that are written completely or not at all."""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from uuid import uuid4

from hf_ecif.errors import UserError

CHECKPOINTS = ".checkpoints"  # in the output of a run that is not finished
FIT = "influence.safetensors"  # what makes a model's folder that of a fit
PARTIAL = ".partial"  # ending of a file whose writing was interrupted


def require_writable(output: Path) -> None:
    """Refuse, before a long run, an output folder that cannot be written to.

    Raises:
        UserError: it is a file, lies below a file, or is not writable.
    """
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"`output={output}`: {there} is a file. Give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"`output={output}`: {there} may not be written to. Give another folder.")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Temporary path that is renamed to ``path`` at the end; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def aside_folder(path: Path) -> Iterator[Path]:
    """Temporary folder that becomes ``path`` at the end; ``path`` may be an empty folder."""
    # A sibling, since a rename is only atomic within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete the unfinished files that killed runs left in a folder and below."""
    for path in list(folder.rglob(f".*{PARTIAL}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@cache
def scratch_folder() -> Path:
    """A folder that is removed when the program ends."""
    folder = mkdtemp(prefix="hf-ecif-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def scratch_file(suffix: str = "") -> Path:
    """A name that no other file in `scratch_folder` has."""
    return scratch_folder() / f"{uuid4().hex}{suffix}"


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write values as JSON, atomically; values of other types are written as text."""
    write_text(to_json(values, indent=2) + "\n", path)


def to_json(values: Any, indent: int | None = None) -> str:
    """JSON text that every reader accepts: numbers that are not finite become null."""
    return json.dumps(_finite(values), indent=indent, default=str, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Make it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a JSON object. Make it again.")
    return values


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
