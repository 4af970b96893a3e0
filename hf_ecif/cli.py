"""The command ``hf-ecif``. It holds no logic: every command is a call of the library."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.version import __version__

app = typer.Typer(
    help="Which image-text pairs help a CLIP-like model, and which hurt it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_DEFAULTS = InfluenceConfig()


def main() -> None:
    """Entry point: a user's mistake is a message and status 2, never a stack trace."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(
            f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf_ecif {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    pass


def _setting(name: str, panel: str = "How scores are computed") -> Any:
    """An option that is a field of `InfluenceConfig`, with its help."""
    return typer.Option(help=InfluenceConfig.help(name), rich_help_panel=panel)


@app.command()
def audit(
    model: Annotated[str, typer.Option(help="Folder of a saved CLIP-like model, or a Hub id.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Data to audit: a folder of save_to_disk, parquet files or an image folder with "
            "metadata, or a Hub id."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    split: Annotated[str, typer.Option(help="Split to audit.")] = "train",
    query: Annotated[
        str | None,
        typer.Option(
            help="Clean pairs like those that the model is for. Their loss is what a pair is "
            "judged by. Chosen from the data if not given."
        ),
    ] = None,
    query_split: Annotated[str, typer.Option(help="Split of the query.")] = "validation",
    image_column: Annotated[str, typer.Option(help="Column of the images.")] = "image",
    text_column: Annotated[str, typer.Option(help="Column of the captions.")] = "text",
    truth_column: Annotated[
        str | None,
        typer.Option(
            help="Boolean column that says which rows are known to be wrong. Read only after the "
            "detection, to say in the report how much it found."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in OUTPUT.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
    task: Annotated[str, _setting("task")] = _DEFAULTS.task,
    parameters: Annotated[str, _setting("parameters")] = _DEFAULTS.parameters,
    lora_rank: Annotated[int, _setting("lora_rank")] = _DEFAULTS.lora_rank,
    batch_size: Annotated[int, _setting("batch_size")] = _DEFAULTS.batch_size,
    micro_batch_size: Annotated[int, _setting("micro_batch_size")] = _DEFAULTS.micro_batch_size,
    partitions: Annotated[int, _setting("partitions")] = _DEFAULTS.partitions,
    fit_epochs: Annotated[int, _setting("fit_epochs")] = _DEFAULTS.fit_epochs,
    curvature: Annotated[str, _setting("curvature")] = _DEFAULTS.curvature,
    solver: Annotated[str, _setting("solver")] = _DEFAULTS.solver,
    rank: Annotated[int, _setting("rank")] = _DEFAULTS.rank,
    damping: Annotated[float | None, _setting("damping")] = _DEFAULTS.damping,
    probes: Annotated[int, _setting("probes")] = _DEFAULTS.probes,
    relative: Annotated[str, _setting("relative")] = _DEFAULTS.relative,
    tangents: Annotated[str, _setting("tangents")] = _DEFAULTS.tangents,
    memory_limit: Annotated[float, _setting("memory_limit")] = _DEFAULTS.memory_limit,
    seed: Annotated[int, _setting("seed")] = _DEFAULTS.seed,
) -> None:
    """Score every pair, flag those that look misaligned, and write data and report to OUTPUT.

    OUTPUT gets `scored/`, `kept/` and `removed/` (parquet, opened by `load_dataset`),
    `summary.json` and `report.html`.

    A **negative** `ecif_score` is harmful: without the pair, the query's loss is predicted to fall.
    A **positive** one is valuable.
    """
    # The strings are checked against their choices by the config itself.
    config = InfluenceConfig(
        task=task,  # type: ignore[arg-type]
        parameters=parameters,
        lora_rank=lora_rank,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        partitions=partitions,
        fit_epochs=fit_epochs,
        curvature=curvature,  # type: ignore[arg-type]
        solver=solver,  # type: ignore[arg-type]
        rank=rank,
        damping=damping,
        probes=probes,
        relative=relative,  # type: ignore[arg-type]
        tangents=tangents,  # type: ignore[arg-type]
        memory_limit=memory_limit,
        seed=seed,
    )
    # Imported late: torch and transformers take seconds, and --help should not.
    from hf_ecif.audit import AuditRequest, run_audit
    from hf_ecif.progress import progress_bars

    _quieten_libraries()
    request = AuditRequest(
        model=model,
        dataset=dataset,
        split=split,
        query=query,
        query_split=query_split,
        image_column=image_column,
        text_column=text_column,
        truth_column=truth_column,
        output=output,
        overwrite=overwrite,
    )
    console = Console()
    with nullcontext() if quiet else progress_bars(console) as progress:
        summary = run_audit(request, config, progress)
    _print_summary(console, summary, output)


def _print_summary(console: Console, summary: dict[str, Any], output: Path) -> None:
    noise = summary["noise"]
    console.print(
        f"{summary['rows']:,} rows: {summary['flagged']:,} flagged as misaligned "
        f"(estimated noise {noise['rate']:.1%}), {summary['unreadable']:,} unreadable, "
        f"{summary['kept']:,} kept."
    )
    if truth := summary.get("truth"):
        console.print(
            f"Of {truth['misaligned']:,} rows known to be misaligned, {truth['found']:,} are "
            f"flagged (precision {truth['precision']:.1%})."
        )
    for warning in summary["warnings"]:
        console.print(f"[yellow]Warning:[/] {escape(warning)}", highlight=False)
    console.print(
        f"Report: {output / 'report.html'}", highlight=False, soft_wrap=True, markup=False
    )


def _quieten_libraries() -> None:
    """Their bars and notices would drown our own."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
