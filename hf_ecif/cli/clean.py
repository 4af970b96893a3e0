"""``hf-ecif clean``: rows of an audit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_ecif.cli.options import Json, Quiet, app, bars, print_json
from hf_ecif.errors import UserError

if TYPE_CHECKING:
    from hf_ecif.applications.clean import Cleaning, Comparison


@app.command()
def clean(
    audit: Annotated[Path, typer.Argument(help="Folder of an audit, or its scored/ folder.")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="drop the flagged rows; drop the worst share by probability; weight all rows "
            "(ecif_weight) and remove none; or relabel flagged rows with the suggested caption, "
            "and drop those without one. Given more than once, all are counted and compared, and "
            "the first is written. [default: drop]",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Of the scored rows, between 0 and 1, for worst.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New folder for kept/ and removed/.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the table and write nothing.")] = False,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column of the captions, for relabel; the audited one if not given."),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            help="Data that nothing was decided by: neither audited nor the query. The audited "
            "model is fine-tuned on the rows before and after, with as many steps for each, and "
            "retrieves and classifies these."
        ),
    ] = None,
    test_split: Annotated[str, typer.Option(help="Split of the test.")] = "test",
    repeats: Annotated[int, typer.Option(help="Fine-tunings of each kind, averaged.", min=1)] = 3,
    model: Annotated[
        str | None, typer.Option(help="What is fine-tuned; the audited model if not given.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Part an audit's rows into those to keep and those to remove, without a new audit.

    OUTPUT gets `kept/` and `removed/`, which together are all rows, and `cleaning.json`; `hf-ecif
    push` publishes it like an audit. With `--test`, a table and a page, `cleaning.html`, say
    whether it helps.
    """
    from hf_ecif.applications.clean import CleanRequest, run_clean

    if output is None and not dry_run:
        raise UserError("Give an --output folder, or --dry-run.")
    first, *others = strategy or ["drop"]
    request = CleanRequest(
        audit=audit,
        output=None if dry_run else output,
        strategy=first,  # type: ignore[arg-type]  # checked there
        share=share,
        beside=tuple(others),  # type: ignore[arg-type]
        text_column=text_column,
        test=test,
        test_split=test_split,
        repeats=repeats,
        model=model,
    )
    with bars(quiet, as_json) as (console, progress):
        cleaning = run_clean(request, progress)
    console.print(_counts(cleaning, audit))
    if cleaning.comparison:
        console.print(_figures(cleaning.comparison))
        for line in _gains(cleaning.comparison):
            console.print(line, highlight=False)
        for warning in cleaning.comparison.warnings:
            console.print(f"Warning: {warning}", highlight=False, markup=False)
    if request.output:
        console.print(f"Rows: {output}", highlight=False, soft_wrap=True, markup=False)
    print_json(as_json, _plain(cleaning))


def _counts(cleaning: Cleaning, audit: Path) -> Table:
    """What becomes of the rows, a column for each strategy."""
    table = Table("rows that are", *cleaning.results, title=escape(str(audit)))
    counts = [result.counts() for result in cleaning.results.values()]
    for name in dict.fromkeys(name for one in counts for name in one):
        cells = [f"{one[name]:,}" if name in one else "–" for one in counts]
        table.add_row(name.replace("_", " "), *cells)
    return table


def _figures(comparison: Comparison) -> Table:
    """The test after fine-tuning on each version of the rows, in percent."""
    from hf_ecif.utils.formatting import estimate

    columns = {
        "text_to_image_recall@1": "text→image R@1",
        "image_to_text_recall@1": "image→text R@1",
        "zero_shot_accuracy": "zero-shot accuracy",
    }
    title = f"{comparison.test_rows:,} rows of {escape(comparison.test)}; percent ± standard error"
    table = Table("fine-tuned on", "rows", title=title)
    for heading in columns.values():
        table.add_column(heading.replace(" ", "\n"), no_wrap=True)
    for outcome in comparison.outcomes:
        cells = [
            estimate(outcome.mean(name), _known(outcome.stderr(name)), exponent=-2)
            for name in columns
        ]
        rows = f"{outcome.rows:,.0f}" if outcome.rows else "–"
        table.add_row(outcome.version, rows, *cells)
    return table


def _gains(comparison: Comparison) -> list[str]:
    """What every version changes in zero-shot accuracy, repeat by repeat."""
    from hf_ecif.data.cleaning import BEFORE
    from hf_ecif.utils.formatting import estimate

    place = [outcome.version for outcome in comparison.outcomes].index(BEFORE)
    before, *after = comparison.outcomes[place:]
    lines = []
    for outcome in after:
        gain, error = outcome.gain(before, "zero_shot_accuracy")
        points = estimate(gain, _known(error), exponent=-2)
        lines.append(f"Zero-shot accuracy, {outcome.version} over {BEFORE}: {points} points.")
    return lines


def _known(error: float | None) -> float:
    """The error of a single repeat is not known."""
    return float("nan") if error is None else error


def _plain(cleaning: Cleaning) -> dict[str, Any]:
    return {
        "counts": {name: result.counts() for name, result in cleaning.results.items()},
        "comparison": cleaning.comparison and cleaning.comparison.describe().to_dict(),
    }
