"""Commands made of dataclasses: their fields are the options, with help, defaults and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from hf_ecif.cli.flags import flag_of, name_flags
from hf_ecif.cli.help import ADVANCED, Command, HelpAll
from hf_ecif.cli.screen import Result, screen, warn
from hf_ecif.config import DetectionConfig, InfluenceConfig, Options, choices_of

CLEANING, MODELS, MANY = "Find wrong pairs", "Understand and change a model", "Many rows"
_HELP = """Which image-text pairs help a CLIP-like model, which hurt it, and which are wrong.

```
hf-ecif audit --model openai/clip-vit-base-patch32 --dataset me/pairs --output runs/pairs
hf-ecif clean runs/pairs --output runs/clean
hf-ecif push runs/clean me/pairs-clean
```
"""
app = typer.Typer(
    help=_HELP,
    epilog="`hf-ecif COMMAND --help` explains a command, and `--help-all` all of its options.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
_COMMON = [
    Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
    Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=_Json),
]
_HELP_ALL = Parameter("help_all", Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)
_FIRST = ("model", "dataset", "query", "output")  # in help, after what is required
_PASSED = ("request", "config", "progress")  # to the work of a command


def command(
    request: type[Options],
    config: type[InfluenceConfig] | None = None,
    *,
    panel: str,
    without: Sequence[str] = (),
    **defaults: Any,
) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """A command whose options are the fields of a request, and of a config if it takes one.

    What does its work gets ``request``, ``config`` and ``progress``, which makes progress bars.
    Parameters of its own are options, too, in place of fields of the same name. Its docstring is
    the help of the command, and its result is shown, or printed as JSON.

    Args:
        request: the class of the request.
        config: `InfluenceConfig`, or nothing.
        panel: under which ``hf-ecif --help`` lists it.
        without: fields of the config that do nothing here.
        defaults: of fields, where those of the library do not suit the command.
    """

    def decorate(work: Callable[..., Result]) -> Callable[..., None]:
        own = _own_parameters(work)
        hidden = {*own, *without}
        asked = [one for one in _parameters(request, defaults) if one.name not in hidden]
        settings = list(_parameters(config, defaults)) if config else []
        shown = [*own.values(), *asked, *(one for one in settings if one.name not in hidden)]
        shown.sort(key=lambda one: (one.default is not Parameter.empty, _place(one.name)))
        retired = list(_retired(shown)) if config else []

        @wraps(work)
        def run(quiet: bool, as_json: bool, **values: Any) -> None:
            _warn_of_retired(work.__name__, retired, values)
            passed = {name: values.pop(name) for name in own}
            passed["request"] = _make(request, values)
            if config:
                passed["config"] = _make(config, values)
            with screen(quiet, as_json, resumes="resume" in values) as shows:
                result = work(progress=shows.progress, **passed)
            shows.result(result)

        common = [*_COMMON, *([_HELP_ALL] if any(map(_is_advanced, shown)) else [])]
        run.__signature__ = Signature([*shown, *common, *retired])  # type: ignore[attr-defined]
        return app.command(rich_help_panel=panel, cls=Command)(run)

    return decorate


def _own_parameters(work: Callable[..., Result]) -> dict[str, Parameter]:
    known = signature(work, eval_str=True).parameters
    return {
        name: one.replace(kind=Parameter.KEYWORD_ONLY)
        for name, one in known.items()
        if name not in _PASSED
    }


def _parameters(kind: type[Options], defaults: Mapping[str, Any]) -> Iterator[Parameter]:
    """Options for the fields of a dataclass, and of those inside it."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        if _is_options(hints[one.name]):
            yield from _parameters(hints[one.name], defaults)
        elif "help" in one.metadata:
            yield _parameter(one, hints[one.name], defaults.get(one.name, one.default))


def _parameter(field: Field[Any], hint: Any, default: Any) -> Parameter:
    is_choice = bool(choices_of(hint))  # checked by the field, as in the library
    about: dict[str, Any] = {"help": name_flags(field.metadata["help"])}
    about["metavar"] = "<choice>" if is_choice else None
    if field.metadata["is_argument"]:
        made = typer.Argument(**about)
    else:
        # Without names, typer would give each boolean a --no- form; few need one.
        names = () if default is True else (flag_of(field),)
        panel = ADVANCED if field.metadata["is_advanced"] else None
        made = typer.Option(*names, **about, rich_help_panel=panel)
    return Parameter(
        field.name,
        Parameter.KEYWORD_ONLY,
        default=Parameter.empty if default is MISSING else default,
        annotation=Annotated[(str | None if default is None else str) if is_choice else hint, made],
    )


def _place(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _is_advanced(one: Parameter) -> bool:
    return any(getattr(made, "rich_help_panel", None) == ADVANCED for made in _made(one))


def _made(one: Parameter) -> tuple[Any, ...]:
    """What typer is told of a parameter."""
    return getattr(one.annotation, "__metadata__", ())


def _retired(shown: Sequence[Parameter]) -> Iterator[Parameter]:
    """Settings that version 0.1 took without any effect: they are still taken, with a warning."""
    names = {one.name for one in shown}
    for kind in (InfluenceConfig, DetectionConfig):
        for one in fields(kind):
            if one.name not in names:
                made = typer.Option(flag_of(one), hidden=True)
                yield Parameter(
                    one.name,
                    Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[str | None, made],
                )


def _warn_of_retired(name: str, retired: Sequence[Parameter], values: dict[str, Any]) -> None:
    for one in retired:
        if values.pop(one.name) is not None:
            flag = name_flags(f"`{one.name}`")
            warn(f"{flag} has no effect on {name}, and the next version will refuse it.")


def _make(kind: type[Options], values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    return kind(
        **{
            one.name: _make(hints[one.name], values)
            if _is_options(hints[one.name])
            else values[one.name]
            for one in fields(kind)
            if _is_options(hints[one.name]) or one.name in values
        }
    )


def _is_options(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Options)
