"""``hf-ecif trace``: which training pairs are behind a misprediction?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hf_ecif.cli.options import Json, Quiet, bars, command, print_json, print_warnings
from hf_ecif.config import InfluenceConfig

if TYPE_CHECKING:
    from hf_ecif.data.summary import TraceSummary

CAPTION = 80  # letters that are shown of one


@command()
def trace(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="New folder for the results.")],
    errors: Annotated[
        str,
        typer.Option(
            help="Which mispredictions of the query: retrieval-text (captions that find another "
            "image than their own), retrieval-image (images that find another caption), or "
            "zero-shot (images of another class; the captions are the classes)."
        ),
    ] = "retrieval-text",
    rows: Annotated[
        list[int] | None,
        typer.Option(help="A row of the query to trace, right or wrong; again for further ones."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Training pairs for each error.")] = 10,
    most: Annotated[int, typer.Option(help="Errors at most, the worst first.")] = 100,
    candidates: Annotated[
        int,
        typer.Option(
            help="Let an index propose so many training pairs for each error, and score these "
            "alone; for thousands of errors in large data. 0 scores all pairs.",
            min=0,
        ),
    ] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
    config: InfluenceConfig,
) -> None:
    """Trace mispredictions of the query to the training pairs that are responsible.

    A pair is responsible through one of its roles: as a positive, or as a hard negative. Those come
    first without which, in this role, the log-odds against the right answer are predicted to fall
    most, for the size of the change that the removal causes.

    OUTPUT gets `trace.html` (each error beside what was predicted instead, and the pairs behind it,
    with the role of each), `trace.parquet` (a row for every error and pair) and `summary.json`.
    """
    from hf_ecif.applications.trace import TraceRequest, run_trace

    request = TraceRequest(
        **sources,
        output=output,
        errors=errors,
        rows=rows,
        top_k=top_k,
        most=most,
        candidates=candidates,
    )
    with bars(quiet, as_json) as (console, progress):
        summary = run_trace(request, config, progress)
    _print_summary(console, summary)
    console.print(f"Page: {output / 'trace.html'}", highlight=False, soft_wrap=True, markup=False)
    print_json(as_json, summary.to_dict())


def _print_summary(console: Console, summary: TraceSummary) -> None:
    from hf_ecif.utils.formatting import shorten

    errors = summary.errors
    if errors.wrong is not None:
        console.print(
            f"{errors.wrong:,} of {errors.of:,} rows of the query are mispredicted ({errors.kind})."
        )
    if errors.traced:
        console.print(f"{errors.traced:,} traced to {summary.top_k} training pairs each.")
    for one in summary.often[:3]:
        text = escape(shorten(one.text, CAPTION))
        console.print(f"Row {one.row:,} is behind {one.errors:,} of them: {text}", highlight=False)
    print_warnings(console, summary.warnings)
