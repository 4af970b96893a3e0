"""Results of finished steps in a folder, so that an interrupted run does not repeat them.

A step is known by its name. Its result is written to a temporary file and renamed, so a run may be
killed at any moment and every file found later is complete; a file that a crash of the machine cut
short counts as missing. A manifest says what the results belong to; results of another model, data
set or config are refused.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_ecif.errors import UserError
from hf_ecif.utils import distributed
from hf_ecif.utils.files import aside, read_json, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class State:
    """Result of a step: tensors, and values that JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """Named states of a run.

    With several processes, all of them ask for the same states and the main one writes, into a
    folder that all can read.

    Args:
        folder: where they are kept; None keeps nothing.
        prefix: put before every name.
    """

    def __init__(self, folder: Path | None = None, prefix: str = "") -> None:
        self._folder = folder
        self._prefix = prefix

    @classmethod
    def open(cls, folder: Path, manifest: dict[str, Any], *, resume: bool) -> Checkpoints:
        """Checkpoints in ``folder``, emptied first unless a run is resumed.

        Args:
            folder: holds nothing but checkpoints.
            manifest: what the states belong to, JSON values by name.
            resume: keep the states that are there.

        Raises:
            UserError: the states belong to another manifest; the message names the differences.
        """

        def prepare() -> None:
            path = folder / MANIFEST
            if resume and path.exists():
                require_same(read_manifest(path), manifest, folder.parent)
                return
            shutil.rmtree(folder, ignore_errors=True)
            write_json(manifest, path)

        distributed.decide(prepare)
        return cls(folder)

    def within(self, name: str) -> Checkpoints:
        """Checkpoints of a part of the run, whose names are separate from all others."""
        return Checkpoints(self._folder, f"{self._prefix}{name}-")

    def remember(self, name: str, compute: Callable[[], State], *, own: bool = False) -> State:
        """The state of that name, computed and saved if there is none.

        Args:
            name: name of the step.
            compute: returns the state.
            own: whether this process has a step of its own, under a name of its own.
        """
        state = self.load(name, own=own)
        if state is None:
            state = compute()
            self.save(name, state, own=own)
        return state

    def load(self, name: str, *, own: bool = False) -> State | None:
        """The state of that name; None if there is none."""
        return read_state(self._path(name)) if self.has(name, own=own) else None

    def has(self, name: str, *, own: bool = False) -> bool:
        """Whether there is a complete state of that name."""
        if self._folder is None:
            return False
        look = partial(_is_whole, self._path(name))
        return look() if own else distributed.decide(look)

    def save(self, name: str, state: State, *, own: bool = False) -> None:
        """Write a state, in place of an earlier one of that name."""
        if self._folder is None or not (own or distributed.is_main()):
            return
        write_state(state, self._path(name))

    def clear(self) -> None:
        """Delete the folder: the run is finished."""
        if self._folder is not None and distributed.is_main():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._prefix}{name}.safetensors"


def _is_whole(path: Path) -> bool:
    """Whether the file is complete: its header says how long it must be."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def read_state(path: Path) -> State:
    """The state that `write_state` wrote."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return State(tensors, json.loads(file.metadata()["values"]))


def read_values(path: Path) -> dict[str, Any]:
    """The values of a state that `write_state` wrote, without its tensors."""
    with safe_open(path, "pt") as file:
        return cast(dict[str, Any], json.loads(file.metadata()["values"]))


def write_state(state: State, path: Path) -> None:
    """Write a state as one safetensors file, atomically.

    Raises:
        OSError: the disk is full.
    """
    tensors = {key: value.contiguous() for key, value in state.tensors.items()}
    with aside(path) as unfinished:
        try:
            save_file(tensors, unfinished, {"values": json.dumps(state.values)})
        except SafetensorError as error:  # its type hides the system's error
            reason = os.strerror(errno.ENOSPC)
            if reason not in str(error):
                raise
            raise OSError(errno.ENOSPC, reason, str(path)) from error


def read_manifest(path: Path) -> dict[str, Any]:
    """What an interrupted run belongs to: JSON values by name.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(
            f"It is not known what the interrupted run in {path.parent} belongs to: {error} "
            "Start anew with `overwrite`."
        ) from error


def require_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a run that has another manifest.

    Raises:
        UserError: the manifests differ; the message names the differences.
    """
    # Through JSON and back, so that tuples and lists compare equal.
    now = json.loads(json.dumps(now, default=str))
    names = sorted(before.keys() | now.keys())
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"The interrupted run in {folder} was another one: {'; '.join(changed)}. "
            "Run it with the same options and data, or start anew with `overwrite`."
        )
