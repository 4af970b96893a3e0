"""``hf-ecif clean``: rows of an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_ecif.commands.options import app, quieten_libraries
from hf_ecif.errors import UserError


@app.command()
def clean(
    audit: Annotated[Path, typer.Argument(help="Folder of an audit, or its scored/ folder.")],
    strategy: Annotated[
        str,
        typer.Option(
            help="drop the flagged rows; drop the worst share by probability; weight all rows "
            "(ecif_weight) and remove none; or relabel flagged rows with the suggested caption, "
            "and drop those without one."
        ),
    ] = "drop",
    share: Annotated[
        float | None, typer.Option(help="Of the scored rows, between 0 and 1, for worst.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New folder for kept/ and removed/.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the table and write nothing.")] = False,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column of the captions, for relabel; the audited one if not given."),
    ] = None,
) -> None:
    """Part an audit's rows into those to keep and those to remove, without a new audit.

    OUTPUT gets `kept/` and `removed/`, which together are all rows, and `cleaning.json`.
    """
    from hf_ecif.cleaning import CleanRequest, run_clean

    if output is None and not dry_run:
        raise UserError("Give an --output folder, or --dry-run.")
    quieten_libraries()
    request = CleanRequest(
        audit=audit,
        output=None if dry_run else output,
        strategy=strategy,  # type: ignore[arg-type]  # checked there
        share=share,
        text_column=text_column,
    )
    result = run_clean(request)
    console = Console()
    table = Table(strategy, "rows", title=escape(str(audit)))
    for name, count in result.counts().items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console.print(table)
    if request.output:
        console.print(f"Rows: {output}", highlight=False, soft_wrap=True, markup=False)
