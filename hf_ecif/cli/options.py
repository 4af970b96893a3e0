"""What the commands have in common: the application, shared options, bars on the console."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape

from hf_ecif.config import InfluenceConfig

if TYPE_CHECKING:
    from hf_ecif.utils.progress import ProgressFactory

app = typer.Typer(
    help="Which image-text pairs help a CLIP-like model, and which hurt it.",
    epilog="The usual way is `audit`, then `clean` and `push`. `hf-ecif COMMAND --help` explains a "
    "command and all of its options.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _option(name: str, kind: Any, default: Any, help: str, panel: str | None = None) -> Parameter:
    option = typer.Option(help=help, rich_help_panel=panel)
    return Parameter(
        name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


# The fields of `hf_ecif.applications.sources.Sources`, which would take seconds to import.
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


def command(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the options that all have in common, beside its own.

    It gets the `SOURCES` as a dictionary ``sources``, and an option for every field of
    `InfluenceConfig` as a ``config``.

    Args:
        defaults: of fields of the config, where those of the library do not suit the command.
    """
    settings = _settings(defaults)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: Any) -> None:
            named = {setting.name: values.pop(setting.name) for setting in settings}
            sources = {source.name: values.pop(source.name) for source in SOURCES}
            function(sources=sources, config=InfluenceConfig(**named), **values)

        own = signature(function, eval_str=True).parameters.values()
        kept = [parameter for parameter in own if parameter.name not in ("sources", "config")]
        command.__signature__ = Signature([*SOURCES, *kept, *settings])  # type: ignore[attr-defined]
        return app.command()(command)

    return decorate


def _settings(defaults: Mapping[str, Any]) -> list[Parameter]:
    hints = get_type_hints(InfluenceConfig)
    return [
        _option(
            field.name,
            # The config checks choices itself, so that the library and the command say the same.
            str if get_origin(hints[field.name]) is Literal else hints[field.name],
            defaults.get(field.name, field.default),
            InfluenceConfig.help(field.name),
            "How it is computed",
        )
        for field in fields(InfluenceConfig)
    ]


@contextmanager
def bars(quiet: bool, as_json: bool = False) -> Iterator[tuple[Console, ProgressFactory]]:
    """A console, and what makes progress bars on it; of several processes, one talks."""
    from hf_ecif.utils import distributed
    from hf_ecif.utils.progress import progress_bars, silent

    quieten_libraries()
    console = Console(quiet=as_json or not distributed.is_main())
    with nullcontext(silent) if quiet or console.quiet else progress_bars(console) as progress:
        yield console, progress
    distributed.leave()


@contextmanager
def resumable() -> Iterator[None]:
    """Say how to go on with what Ctrl-C has stopped."""
    try:
        yield
    except KeyboardInterrupt:
        text = "Stopped. The same command with --resume goes on where it was."
        Console(stderr=True).print(text, highlight=False)
        raise


def print_json(wanted: bool, values: dict[str, Any]) -> None:
    from hf_ecif.utils import distributed
    from hf_ecif.utils.files import to_json

    if wanted and distributed.is_main():
        print(to_json(values))


def print_warnings(console: Console, warnings: Sequence[str], name: str = "Note") -> None:
    """What a reader of the figures must know."""
    for warning in warnings:
        console.print(f"[yellow]{name}:[/] {escape(warning)}", highlight=False)


def quieten_libraries() -> None:
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
