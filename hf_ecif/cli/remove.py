"""``hf-ecif remove``: rows from a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_ecif.cli.options import Json, Quiet, bars, command, print_json, print_warnings
from hf_ecif.config import InfluenceConfig

if TYPE_CHECKING:
    from hf_ecif.data.summary import RemovalSummary


@command()
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
        bool, typer.Option(help="Retrain without the rows, too, to compare.")
    ] = False,
    test: Annotated[
        str | None, typer.Option(help="Further pairs to measure the models on, beside the query.")
    ] = None,
    test_split: Annotated[str, typer.Option(help="Split of the test.")] = "test",
    as_json: Json = False,
    quiet: Quiet = False,
    config: InfluenceConfig,
) -> None:
    """Remove rows from the model in closed form, as if it had been trained without them.

    The attributed parameters are first brought near their optimum on all rows; `--fit-epochs 0`
    takes the model as it is, if these rows trained it. OUTPUT gets a model that `from_pretrained`
    loads, `removal.json` and a page, `removal.html`.
    """
    from hf_ecif.applications.remove import RemoveRequest, run_remove

    request = RemoveRequest(
        **sources,
        where=where,
        output=output,
        steps=steps,
        retrain=retrain,
        test=test,
        test_split=test_split,
    )
    with bars(quiet, as_json) as (console, progress):
        summary = run_remove(request, config, progress)
    _print_summary(console, summary)
    console.print(f"Model: {output}", highlight=False, soft_wrap=True, markup=False)
    page = output / "removal.html"
    console.print(f"Page: {page}", highlight=False, soft_wrap=True, markup=False)
    print_json(as_json, summary.to_dict())


def _print_summary(console: Console, summary: RemovalSummary) -> None:
    from hf_ecif.utils.formatting import models_of_removal, share

    seconds, names = summary.seconds, models_of_removal(summary.config)
    console.print(
        f"{summary.removal.removed:,} of {summary.scored:,} readable rows removed in "
        f"{seconds['remove']:.1f} s."
        + (f" Retrained in {seconds['retrain']:.1f} s." if "retrain" in seconds else "")
    )
    for judge, states in summary.measures.items():
        table = Table(judge, "loss", "R@1 text to image", "R@1 image to text", "zero-shot accuracy")
        for state, values in states.items():
            table.add_row(
                names[state],
                f"{values['loss']:.4f}",
                share(values["text_to_image_recall@1"]),
                share(values["image_to_text_recall@1"]),
                share(values["zero_shot_accuracy"]),
            )
        console.print(table)
    predicted = summary.measures["query"]["before"]["loss"] + summary.predicted_change
    console.print(f"By the scores alone, the query's loss would be {predicted:.4f}.")
    print_warnings(console, summary.warnings, "Warning")
