"""Help in two lengths: ``--help`` explains what most need, ``--help-all`` every option."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

ADVANCED = "Advanced"  # panel of the options that few need


class Command(TyperCommand):
    """A command whose ``--help`` only names its advanced options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the short help."""
        advanced = [one for one in self.params if _is_advanced(one)]
        names = ", ".join(one.opts[0] for one in advanced)
        self.epilog = f"`--help-all` also explains: {names}" if names else None
        with _hidden(advanced):
            super().format_help(ctx, formatter)

    def format_all(self, ctx: Any) -> None:
        """Write the whole help."""
        self.epilog = None
        super().format_help(ctx, ctx.make_formatter())


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted and isinstance(ctx.command, Command):
        ctx.command.format_all(ctx)
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        help="Show this message with the advanced options, and exit.",
        is_eager=True,
        expose_value=False,
        callback=_show_all,
    ),
]


def _is_advanced(one: Any) -> bool:
    return isinstance(one, TyperOption) and one.rich_help_panel == ADVANCED


@contextmanager
def _hidden(options: list[Any]) -> Iterator[None]:
    for one in options:
        one.hidden = True
    try:
        yield
    finally:
        for one in options:
            one.hidden = False
