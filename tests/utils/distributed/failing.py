"""A command that goes wrong in some processes: `... failing everywhere`."""

from __future__ import annotations

from typing import NoReturn

import torch

from hf_ecif.cli.main import main
from hf_ecif.cli.options import app
from hf_ecif.errors import UserError
from hf_ecif.utils import distributed


class AwkwardError(UserError):
    """Cannot be unpickled: that calls it with its message alone."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} is missing: {remedy}.")


@app.command()
def everywhere() -> None:
    """The main process finds out, and tells the others."""
    distributed.decide(refuse)


@app.command()
def unexpectedly() -> None:
    """The main process finds out, and it is no mistake of the user's."""
    distributed.decide(lambda: {}["the file"])


@app.command()
def elsewhere() -> None:
    """Another process finds out, while the main one waits for its numbers."""
    if not distributed.is_main():
        refuse()
    distributed.add_up(torch.zeros(1))


def refuse() -> NoReturn:
    raise AwkwardError("the file", "bring it here")


if __name__ == "__main__":
    main()
