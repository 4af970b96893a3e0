"""``hf-ecif score``: rows with a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_ecif.cli.options import (
    Json,
    Overwrite,
    Quiet,
    Resume,
    app,
    bars,
    print_json,
    resumable,
)


@app.command()
def score(
    influence: Annotated[
        str, typer.Argument(help="Folder of `hf-ecif fit`, or a Hub id of one that was pushed.")
    ],
    *,
    dataset: Annotated[
        str,
        typer.Option(help="Rows to score: a folder, parquet files or a Hub id."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the scored rows.")],
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    image_column: Annotated[str, typer.Option(help="Column of the images.")] = "image",
    text_column: Annotated[str, typer.Option(help="Column of the captions.")] = "text",
    streaming: Annotated[
        bool, typer.Option(help="Read the rows as a stream; nothing is downloaded ahead.")
    ] = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score any number of rows with a fit, in flat memory.

    OUTPUT gets `scored/` (parquet, opened by `load_dataset`) and `scoring.json`. Rows are scored in
    blocks, each among itself; shuffle rows that are sorted. Start it with `torchrun` to share the
    blocks among processes.
    """
    from hf_ecif.applications.score import ScoreRequest, run_score

    request = ScoreRequest(
        influence=influence,
        dataset=dataset,
        output=output,
        split=split,
        image_column=image_column,
        text_column=text_column,
        streaming=streaming,
        overwrite=overwrite,
        resume=resume,
    )
    with bars(quiet, as_json) as (console, progress), resumable():
        summary = run_score(request, progress)
    console.print(
        f"{summary['rows']:,} rows scored, {summary['unscored']:,} of them without a score, in "
        f"{summary['shards']:,} shards."
    )
    console.print(f"Scores: {output / 'scored'}", highlight=False, soft_wrap=True, markup=False)
    print_json(as_json, summary)
