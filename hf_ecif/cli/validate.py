"""``hf-ecif validate``: predictions against retrainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ecif.cli.options import Json, Quiet, bars, command, print_json, print_warnings
from hf_ecif.config import InfluenceConfig


@command(response="unrolled")
def validate(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="New folder for the results.")],
    subsets: Annotated[int, typer.Option(help="Random subsets that are retrained on.")] = 64,
    removed_share: Annotated[
        float, typer.Option(help="Share of the rows that each subset goes without.")
    ] = 0.5,
    repeats: Annotated[int, typer.Option(help="Retrainings of each subset, averaged.", min=1)] = 2,
    as_json: Json = False,
    quiet: Quiet = False,
    config: InfluenceConfig,
) -> None:
    """Do the scores hold on your data? Compare them with true retrainings.

    The attributed parameters are retrained without random parts of the data. The rank correlation
    of the query's true and predicted loss (with half of the rows gone: the linear datamodeling
    score) says how far to trust the scores. Repeated retrainings tell what could be reached at all.

    OUTPUT gets `validation.json`, a plot and a page, `validation.html`.
    """
    from hf_ecif.applications.validate import ValidateRequest, run_validate
    from hf_ecif.utils.formatting import percent, reach

    request = ValidateRequest(
        **sources,
        output=output,
        subsets=subsets,
        removed_share=removed_share,
        repeats=repeats,
    )
    with bars(quiet, as_json) as (console, progress):
        summary = run_validate(request, config, progress)
    reached = reach(summary.ceiling)
    console.print(
        f"Rank correlation of predicted and true changes: {summary.spearman:.2f} "
        f"(95 % interval {summary.low:.2f} to {summary.high:.2f}{reached}) over "
        f"{subsets} subsets that go without {percent(removed_share)} of the rows; order right for "
        f"{summary.sign_agreement:.0%} of the pairs of subsets; slope {summary.slope:.2f}."
    )
    console.print(summary.verdict)
    print_warnings(console, summary.warnings)
    page = output / "validation.html"
    console.print(f"Page: {page}", highlight=False, soft_wrap=True, markup=False)
    print_json(as_json, summary.to_dict())
