"""``hf-ecif remove``: rows from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ecif.commands.options import Quiet, bars, command
from hf_ecif.config import InfluenceConfig


@command
def remove(
    *,
    sources: dict[str, Any],
    where: Annotated[
        str,
        typer.Option(
            help="Boolean column, true where a row is to be removed: ecif_flag of an audit's "
            "scored/ folder, for instance."
        ),
    ],
    output: Annotated[Path, typer.Option(help="New folder for the edited model.")],
    steps: Annotated[int, typer.Option(help="Newton steps, each with fresh curvature.", min=1)] = 2,
    retrain: Annotated[
        bool, typer.Option(help="Retrain without the rows, too, to compare the query.")
    ] = False,
    quiet: Quiet = False,
    config: InfluenceConfig,
) -> None:
    """Remove rows from the model in closed form, as if it had been trained without them.

    The attributed parameters are first brought near their optimum on all rows; `--fit-epochs 0`
    takes the model as it is, if these rows trained it. OUTPUT gets a model that `from_pretrained`
    loads, and `removal.json`.
    """
    from hf_ecif.applications.remove import RemoveRequest, run_remove

    request = RemoveRequest(
        **sources,
        where=where,
        output=output,
        steps=steps,
        retrain=retrain,
    )
    with bars(quiet) as (console, progress):
        summary = run_remove(request, config, progress)
    values = summary["query"]
    console.print(
        f"{summary['removal']['removed']:,} of {summary['rows']:,} rows removed in "
        f"{summary['seconds']:.1f} s. The query's loss: {values['before']:.4f} before, "
        f"{values['after']:.4f} after (predicted {values['predicted']:.4f})."
    )
    if retrained := summary.get("retrained"):
        console.print(
            f"Retrained without them in {retrained['seconds']:.1f} s: {retrained['query']:.4f}."
        )
    console.print(f"Model: {output}", highlight=False, soft_wrap=True, markup=False)
