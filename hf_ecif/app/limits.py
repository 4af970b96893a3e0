"""Limits for visitors of a shared Space; there are none on one's own machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """Bounds of what one visitor may ask for.

    Attributes:
        shared: whether strangers share this machine: then no path on its disk may be named, and
            its own login is never used.
        login: whether visitors log in with Hugging Face, which only a Space offers.
        rows: largest number of rows of an audit.
        upload: largest number of bytes of a file, and of its unpacked content.
        seconds: longest time of an audit.
        memory: bytes of an audit's address space; None for no limit.
        waiting: largest number of visitors in the queue.
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
NEIGHBOURS = replace(SPACE, login=False)  # for visitors from the local network


def find_limits() -> Limits:
    """Limits of the place where this runs."""
    return SPACE if os.environ.get("SPACE_ID") else HOME
