"""``hf-ecif demo``: results in the browser."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from hf_ecif.cli.options import CLEANING, app
from hf_ecif.cli.screen import quieten_libraries
from hf_ecif.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@app.command(rich_help_panel=CLEANING)
def demo(
    source: Annotated[
        str | None,
        typer.Argument(
            help="What `audit` wrote; or data to be audited: a folder, or a Hub id. The demo's own "
            "audit if not given.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id that the tab for new audits proposes; that of the audit if not "
            "given.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at. Beyond this machine, visitors get the limits of a shared "
            "Space and cannot use your login."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; a free one from 7860 on if 0.", min=0)] = 0,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Look at an audit in the browser: see the flags, decide, trace, try out, publish.

    Decisions are kept beside the audit, in `review.jsonl`. It needs `gradio`: `pip install
    "hf_ecif[demo]"`.
    """
    if source is not None:
        _check(source)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError('The demo needs gradio: pip install "hf_ecif[demo]".') from error
    # Imported late: gradio takes seconds, and --help should not.
    from hf_ecif.app.app import launch, make_app
    from hf_ecif.app.desk import state_folder
    from hf_ecif.app.embedded import open_embedded
    from hf_ecif.app.limits import HOME, NEIGHBOURS
    from hf_ecif.app.selection import is_audit

    quieten_libraries()
    limits = HOME if host in LOOPBACK else NEIGHBOURS
    with TemporaryDirectory(prefix="hf-ecif-demo-") as aside:
        if source is not None and is_audit(source):
            folder, data = source, None
        else:
            open_embedded(Path(aside))
            folder, data = aside, source
        # The embedded audit is written anew each time; what is decided on it stays.
        keep = None if source == folder else state_folder() / "reviews"
        built = make_app(folder, limits, model=model, dataset=data, keep=keep)
        options = {"server_name": host, "server_port": port or None, "inbrowser": browser}
        launch(built, limits, **options, quiet=True, prevent_thread_lock=True)
        console = Console()
        console.print(f"Open {built.local_url} (Ctrl+C ends it).", highlight=False, soft_wrap=True)
        built.block_thread()


def _check(source: str) -> None:
    """A name of the Hub is looked up when it is audited; a folder should be there."""
    from hf_ecif.utils.hub_paths import is_local

    nameless = "/" not in source
    if (nameless or is_local(source)) and not Path(source).expanduser().exists():
        raise UserError(
            f"There is no folder {source}. Name the --output of hf-ecif audit, or data."
        )
