"""The command ``hf-ecif``. It holds no logic: every command is a call of the library."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.version import __version__

if TYPE_CHECKING:
    from hf_ecif.progress import ProgressFactory

app = typer.Typer(
    help="Which image-text pairs help a CLIP-like model, and which hurt it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Entry point: a user's mistake is a message and status 2, never a stack trace."""
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one says so
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


def _option(name: str, kind: Any, default: Any, help: str, panel: str | None = None) -> Parameter:
    option = typer.Option(help=help, rich_help_panel=panel)
    return Parameter(
        name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


# The fields of `hf_ecif.sources.Sources`, which would take seconds to import.
SOURCES = [
    _option("model", str, Parameter.empty, "Folder of a saved CLIP-like model, or a Hub id."),
    _option(
        "dataset",
        str,
        Parameter.empty,
        "A folder of save_to_disk, parquet files or an image folder with metadata, or a Hub id.",
    ),
    _option("split", str, "train", "Split of the data."),
    _option(
        "query",
        str | None,
        None,
        "Clean pairs like those that the model is for. Their loss is what a pair is judged by. "
        "Chosen from the data if not given.",
    ),
    _option("query_split", str, "validation", "Split of the query."),
    _option("image_column", str, "image", "Column of the images."),
    _option("text_column", str, "text", "Column of the captions."),
]
Quiet = Annotated[bool, typer.Option(help="No progress bars.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier run in OUTPUT.")]
Resume = Annotated[
    bool, typer.Option(help="Go on with an interrupted run in OUTPUT, where it was.")
]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A command with the options that all have in common, beside its own.

    It gets the `SOURCES` as a dictionary ``sources``, and an option for every field of
    `InfluenceConfig` as a ``config``.
    """
    settings = _settings()

    @wraps(function)
    def command(**values: Any) -> None:
        config = InfluenceConfig(**{setting.name: values.pop(setting.name) for setting in settings})
        sources = {source.name: values.pop(source.name) for source in SOURCES}
        function(sources=sources, config=config, **values)

    own = signature(function, eval_str=True).parameters.values()
    kept = [parameter for parameter in own if parameter.name not in ("sources", "config")]
    command.__signature__ = Signature([*SOURCES, *kept, *settings])  # type: ignore[attr-defined]
    return app.command()(command)


def _settings() -> list[Parameter]:
    hints = get_type_hints(InfluenceConfig)
    return [
        _option(
            field.name,
            # The config checks choices itself, so that the library and the command say the same.
            str if get_origin(hints[field.name]) is Literal else hints[field.name],
            field.default,
            InfluenceConfig.help(field.name),
            "How it is computed",
        )
        for field in fields(InfluenceConfig)
    ]


@_command
def audit(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    truth_column: Annotated[
        str | None,
        typer.Option(
            help="Boolean column that says which rows are known to be wrong. Read only after the "
            "detection, to say in the report how much it found."
        ),
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column of names, a language for instance. Groups of 50 rows or more get a noise "
            "rate and a threshold of their own."
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="Text file of captions to suggest, one a line. The captions of rows that are not "
            "flagged, if not given."
        ),
    ] = None,
    suggest: Annotated[
        bool,
        typer.Option(
            help="Compare all rows with each other: captions that fit flagged images better, and "
            "duplicates. Takes the square of the rows in time, not in memory."
        ),
    ] = True,
    suggest_margin: Annotated[
        float,
        typer.Option(
            help="A caption is suggested if its logit is so far above the next best one, in nats.",
            min=0,
        ),
    ] = 1.5,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: InfluenceConfig,
) -> None:
    """Score every pair, flag those that look misaligned, and write data and report to OUTPUT.

    OUTPUT gets `scored/`, `kept/` and `removed/` (parquet, opened by `load_dataset`),
    `summary.json` and `report.html`.

    A **negative** `ecif_score` is harmful: without the pair, the query's loss is predicted to fall.
    A **positive** one is valuable.
    """
    # Imported late: torch and transformers take seconds, and --help should not.
    from hf_ecif.audit import AuditRequest, run_audit

    request = AuditRequest(
        **sources,
        truth_column=truth_column,
        group_column=group_column,
        vocabulary=vocabulary,
        suggest=suggest,
        suggest_margin=suggest_margin,
        output=output,
        overwrite=overwrite,
        resume=resume,
    )
    with _bars(quiet, as_json) as (console, progress):
        summary = run_audit(request, config, progress)
    _print_summary(console, summary, output)
    _print_json(as_json, summary)


@_command
def fit(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="Folder for the fitted influence.")],
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: InfluenceConfig,
) -> None:
    """Fit once; `hf-ecif score` then scores any number of rows, here or elsewhere.

    OUTPUT gets the model, the processor and the fit: `from_pretrained` reads it, and `hf-ecif push`
    publishes it.
    """
    from hf_ecif.endless import FitRequest, run_fit

    request = FitRequest(**sources, output=output, overwrite=overwrite, resume=resume)
    with _bars(quiet, as_json) as (console, progress):
        fitted = run_fit(request, config, progress)
    console.print(
        f"Fitted on {fitted.train_count:,} rows: the query's loss is {fitted.query_loss:.4f}, "
        f"{fitted.query_loss_before:.4f} before."
    )
    for purpose, report in fitted.solvers.items():
        if not report.converged:
            console.print(f"[yellow]Warning:[/] the solve for the {purpose}: {report.advice}.")
    console.print(f"Influence: {output}", highlight=False, soft_wrap=True, markup=False)
    _print_json(as_json, fitted.to_state().values)


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
    from hf_ecif.endless import ScoreRequest, run_score

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
    with _bars(quiet, as_json) as (console, progress):
        summary = run_score(request, progress)
    console.print(
        f"{summary['rows']:,} rows scored, {summary['unscored']:,} of them without a score, in "
        f"{summary['shards']:,} shards."
    )
    console.print(f"Scores: {output / 'scored'}", highlight=False, soft_wrap=True, markup=False)
    _print_json(as_json, summary)


@_command
def validate(
    *,
    sources: dict[str, Any],
    output: Annotated[Path, typer.Option(help="New folder for the results.")],
    subsets: Annotated[int, typer.Option(help="Random subsets that are retrained on.")] = 32,
    removed_share: Annotated[
        float, typer.Option(help="Share of the rows that each subset goes without.")
    ] = 0.5,
    repeats: Annotated[int, typer.Option(help="Retrainings of each subset, averaged.", min=1)] = 2,
    quiet: Quiet = False,
    config: InfluenceConfig,
) -> None:
    """Do the scores hold on your data? Compare them with true retrainings.

    The attributed parameters are retrained without random parts of the data. The rank correlation
    of the query's true and predicted loss (with half of the rows gone: the linear datamodeling
    score) says how far to trust the scores.

    OUTPUT gets `validation.json` and a plot.
    """
    from hf_ecif.applications import ValidateRequest, run_validate

    request = ValidateRequest(
        **sources,
        output=output,
        subsets=subsets,
        removed_share=removed_share,
        repeats=repeats,
    )
    with _bars(quiet) as (console, progress):
        result = run_validate(request, config, progress)
    console.print(
        f"Rank correlation of predicted and true changes: {result.spearman:.2f} "
        f"(95 % interval {result.low:.2f} to {result.high:.2f}) over {subsets} subsets that go "
        f"without {removed_share:.0%} of the rows; order right for {result.sign_agreement:.0%} of "
        f"the pairs of subsets; slope {result.slope:.2f}."
    )
    console.print(result.verdict)
    console.print(f"Plot: {output / 'validation.png'}", highlight=False, soft_wrap=True)


@_command
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
    from hf_ecif.applications import RemoveRequest, run_remove

    request = RemoveRequest(
        **sources,
        where=where,
        output=output,
        steps=steps,
        retrain=retrain,
    )
    with _bars(quiet) as (console, progress):
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
    _quieten_libraries()
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


@app.command()
def push(
    output: Annotated[
        Path,
        typer.Argument(help="What `audit` wrote; or a folder of an edited model or an influence."),
    ],
    repo_id: Annotated[str, typer.Argument(help="Where to: owner/name.")],
    *,
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
    create_pr: Annotated[
        bool, typer.Option(help="Open a pull request and change nothing else.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; made if it is missing.")
    ] = None,
    removed: Annotated[bool, typer.Option(help="Publish the removed rows, too.")] = True,
    other_splits: Annotated[
        bool, typer.Option(help="Bring the other splits of the source along.")
    ] = True,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Publish a result on the Hub, with a card and the evidence, in one commit.

    Of an audit, the kept rows become the data, and the removed ones the configuration `removed`,
    each with its reason. It needs a login with write access (`hf auth login`, or `HF_TOKEN`). Run
    it again to update, or to go on where it broke off.
    """
    from hf_ecif.hub import push as push_to_hub

    with _bars(quiet) as (console, progress):
        report = push_to_hub(
            output,
            repo_id,
            private=private,
            create_pr=create_pr,
            revision=revision,
            removed=removed,
            other_splits=other_splits,
            dry_run=dry_run,
            progress=progress,
        )
    console.print(str(report), highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _bars(quiet: bool, as_json: bool = False) -> Iterator[tuple[Console, ProgressFactory]]:
    """A console, and what makes progress bars on it; of several processes, one talks."""
    from hf_ecif import processes
    from hf_ecif.progress import progress_bars, silent

    _quieten_libraries()
    console = Console(quiet=as_json or not processes.is_main())
    with nullcontext(silent) if quiet or console.quiet else progress_bars(console) as progress:
        yield console, progress
    processes.leave()


def _print_json(wanted: bool, values: dict[str, Any]) -> None:
    from hf_ecif import processes

    if wanted and processes.is_main():
        print(json.dumps(values, default=str))


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
    from huggingface_hub.utils.tqdm import disable_progress_bars

    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
