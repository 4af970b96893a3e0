"""What a shared Space grants a visitor; at home there are no such limits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """Bounds of what one visitor may ask for.

    Attributes:
        shared: whether strangers share this machine: then nothing on its disk may be named, and
            its own login is never used.
        login: whether visitors log in with Hugging Face, which only a Space offers.
        rows: of an audit.
        upload: bytes of a file, and of what is in it.
        seconds: of an audit.
        memory: bytes of its address space; None is without a limit.
        waiting: visitors in the queue.
    """

    shared: bool
    login: bool
    rows: int
    upload: int
    seconds: float
    memory: int | None
    waiting: int


HOME = Limits(
    shared=False,
    login=False,
    rows=10_000_000,
    upload=2**40,
    seconds=float("inf"),
    memory=None,
    waiting=20,
)
SPACE = Limits(
    shared=True,
    login=True,
    rows=5_000,
    upload=200 * 2**20,
    seconds=900.0,
    memory=12 * 2**30,
    waiting=20,
)
NEIGHBOURS = replace(SPACE, login=False)  # on this machine's network


def find_limits() -> Limits:
    """Those of where this runs."""
    return SPACE if os.environ.get("SPACE_ID") else HOME
