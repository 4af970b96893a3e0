"""The command ``hf-ecif``."""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

# Importing a command registers it; ``--help`` lists them in this order.
from hf_ecif.commands import audit, clean, fit, push, remove, score, validate  # noqa: F401
from hf_ecif.commands.options import app
from hf_ecif.errors import UserError
from hf_ecif.version import __version__

PATIENCE = 5.0  # seconds


def main() -> None:
    """Entry point: a user's mistake is a message and status 2, never a stack trace."""
    try:
        app()
    except Exception as error:
        _let_the_main_process_speak()
        message = _message(error)
        if message is None:
            raise
        Console(stderr=True).print(
            f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _let_the_main_process_speak() -> None:
    """Of several processes, one says what is wrong with all of them; its end is theirs, too.

    `torchrun` sees to that. Who is still there afterwards is the only one to know.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE)


def _message(error: Exception) -> str | None:
    """What to tell the user; None where the stack trace tells more."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}. Make room; a run that was interrupted goes on with --resume."
    return str(error) if isinstance(error, UserError) else None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf_ecif {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    pass
