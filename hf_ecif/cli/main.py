"""The command ``hf-ecif``."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text
from typer.rich_utils import rich_format_error

# Importing a command registers it; ``--help`` lists them in this order.
from hf_ecif.cli import (  # noqa: F401
    audit,
    calibrate,
    clean,
    demo,
    export,
    fit,
    push,
    remove,
    score,
    trace,
    validate,
    value,
)
from hf_ecif.cli.flags import name_flags
from hf_ecif.cli.options import app
from hf_ecif.cli.screen import is_first
from hf_ecif.errors import UserError
from hf_ecif.version import __version__


def main() -> None:
    """Entry point: a user's mistake is a message and status 2, never a stack trace."""
    try:
        # Of several processes, each would print help and tell of a wrong option; one does.
        with nullcontext() if is_first() else redirect_stdout(io.StringIO()):
            sys.exit(app(standalone_mode=not _is_one_of_several()))
    except Exception as error:
        if not _tells(error):
            sys.exit(2)
        if hasattr(error, "exit_code"):  # an error in the options, found before a command runs
            rich_format_error(cast(Any, error))
            sys.exit(error.exit_code)
        message = _message(error)
        if message is None:
            raise
        text = Text.assemble(("Error:", "bold red"), " ", message)
        Console(stderr=True).print(text, soft_wrap=True)
        sys.exit(2)


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _tells(error: Exception) -> bool:
    """Whether to report the error: of several processes, only the first to fail does."""
    if not _is_one_of_several():
        return True
    from hf_ecif.utils import distributed

    elsewhere = isinstance(error, distributed.MainProcessError)
    return not elsewhere and distributed.is_first("to fail")


def _message(error: Exception) -> str | None:
    """What to tell the user; None where the stack trace tells more."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}. Make room; an interrupted run continues with --resume."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
        return f"{error}. Give another folder."
    return name_flags(str(error)) if isinstance(error, UserError) else None


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
