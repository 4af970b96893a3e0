"""``hf-ecif value``: which pairs help, which hurt, and what would new ones bring?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_ecif.cli.options import Json, Quiet, bars, command, print_json, print_warnings
from hf_ecif.config import InfluenceConfig

if TYPE_CHECKING:
    from hf_ecif.data.summary import ValueSummary

SHOWN = 8  # slices without a ranking that are named


@command(response="unrolled")
def value(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="New folder for the results.")],
    slice_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the query, language or category for instance. Pairs are ranked for "
            "each of its values, too, and those that help one and hurt another are shown."
        ),
    ] = None,
    curves: Annotated[
        bool,
        typer.Option(
            "--curves",
            help="Check the ranking: remove 5-30 % of the pairs, the most harmful first, the most "
            "valuable first and at random, and refit.",
        ),
    ] = False,
    repeats: Annotated[int, typer.Option(help="Refits of each point of a curve.")] = 3,
    test: Annotated[
        str | None,
        typer.Option(help="Held-out pairs that curves are judged by; the query if not given."),
    ] = None,
    test_split: Annotated[str, typer.Option(help="Split of the held-out pairs.")] = "test",
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Pairs that are not trained on, to be ranked by what each would bring if it were "
            "added: those to buy or to label."
        ),
    ] = None,
    candidates_split: Annotated[str, typer.Option(help="Split of the candidates.")] = "train",
    leverage: Annotated[
        bool,
        typer.Option(
            "--leverage",
            help="Add ecif_leverage, how much of what holds a pair's fit is the pair itself (a "
            "lower bound, to rank by), and warn where the fit has memorised its pairs.",
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: InfluenceConfig,
) -> None:
    """Rank pairs by what they do to a query, and to slices of it.

    A negative score is harmful: without the pair the query's loss should fall. Of a candidate a
    negative value is good: with it, the loss should fall.

    OUTPUT gets `value.html` with the pairs to look at, `value.parquet` with the scores of all rows,
    `candidates.parquet`, and `summary.json`.
    """
    from hf_ecif.applications.value import ValueRequest, run_value

    request = ValueRequest(
        **sources,
        output=output,
        slice_column=slice_column,
        curves=curves,
        repeats=repeats,
        test=test,
        test_split=test_split,
        candidates=candidates,
        candidates_split=candidates_split,
        leverage=leverage,
    )
    with bars(quiet, as_json) as (console, progress):
        summary = run_value(request, config, progress)
    _print_slices(console, summary)
    skipped = [f"{name} ({reason})" for name, reason in summary.skipped.items()]
    if skipped:
        more = f", and {len(skipped) - SHOWN:,} more" if len(skipped) > SHOWN else ""
        shown = escape(", ".join(skipped[:SHOWN]))
        console.print(f"No ranking for {shown}{more}.", highlight=False)
    if unnamed := summary.query.unnamed:
        console.print(f"{unnamed:,} rows of the query are in no slice.")
    if summary.curves:
        console.print(summary.curves.verdict)
    if found := summary.candidates:
        console.print(
            f"{found.worth_having:,} of {found.valued:,} candidates are worth having: the "
            "query's loss is predicted to fall with them."
        )
    print_warnings(console, summary.warnings)
    console.print(f"Page: {output / 'value.html'}", highlight=False, soft_wrap=True, markup=False)
    print_json(as_json, summary.to_dict())


def _print_slices(console: Console, summary: ValueSummary) -> None:
    table = Table("query", "rows", "loss before the fit", "after", "harmful pairs", "agreement")
    for one in summary.slices:
        table.add_row(
            escape(one.name),
            f"{one.rows:,}",
            f"{one.loss_before:.3f}",
            f"{one.loss:.3f}",
            f"{one.harmful_share:.1%}",
            f"{one.agreement:.2f}",
        )
    console.print(table)
