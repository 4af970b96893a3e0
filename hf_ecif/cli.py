"""The command ``hf-ecif``."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

# Importing a command registers it; ``--help`` lists them in this order.
from hf_ecif.commands import audit, clean, fit, push, remove, score, trace, validate  # noqa: F401
from hf_ecif.commands.options import app
from hf_ecif.errors import UserError
from hf_ecif.version import __version__


def main() -> None:
    """Entry point: a user's mistake is a message and status 2, never a stack trace."""
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one says so
            Console(stderr=True).print(
                f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
            )
        sys.exit(2)


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
