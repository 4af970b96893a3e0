"""Hooks of ``make docs``: formulas as MathML, which needs no script, and a page of all commands."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from hf_ecif.cli.main import app

COMMANDS = "reference/commands.md"


def on_files(files: Files, config: Any) -> Files:
    """Files with a page of all commands and their options."""
    files.append(File.generated(config, COMMANDS, content=_commands()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """A page's HTML with its formulas as MathML."""
    html = re.sub(r"\\\[(.+?)\\\]", lambda found: _mathml(found[1], "block"), html, flags=re.DOTALL)
    return re.sub(r"\\\((.+?)\\\)", lambda found: _mathml(found[1], "inline"), html)


def _mathml(formula: str, display: str) -> str:
    return convert(unescape(formula).strip(), display=display)


def _commands() -> str:
    """Help of every command, as Typer prints it."""
    command = get_command(app)
    return get_docs_for_click(obj=command, ctx=Context(command), name="hf-ecif")
