"""``hf-ecif push``: results to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_ecif.cli.options import CLEANING, Quiet, app
from hf_ecif.cli.screen import screen


@app.command(rich_help_panel=CLEANING)
def push(
    output: Annotated[
        Path,
        typer.Argument(
            help="What `audit` or `clean` wrote; or the folder of `remove` or of `fit`."
        ),
    ],
    repo_id: Annotated[str, typer.Argument(help="Where to: owner/name.")],
    *,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request and change nothing else.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; made if it is missing.")
    ] = None,
    removed: Annotated[bool, typer.Option(help="Publish the removed rows, too.")] = True,
    other_splits: Annotated[
        bool, typer.Option(help="Bring the other splits of the source along.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Publish a result on the Hub, with a card and the evidence, in one commit.

    Of an audit, the kept rows become the data, and the removed ones the configuration `removed`,
    each with its reason. It needs a login with write access (`hf auth login`, or `HF_TOKEN`). Run
    it again to update, or to go on where it broke off.
    """
    from hf_ecif.hub.push import push as push_to_hub

    with screen(quiet) as shows:
        report = push_to_hub(
            output,
            repo_id,
            private=private,
            create_pr=create_pr,
            revision=revision,
            removed=removed,
            other_splits=other_splits,
            dry_run=dry_run,
            progress=shows.progress,
        )
    text = str(report)
    shows.console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)
