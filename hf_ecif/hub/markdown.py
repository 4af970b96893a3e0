"""Cards of repositories: a section of ours inside a README that stays its owner's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml  # type: ignore[import-untyped]
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard_data import CardData
from markupsafe import Markup

from hf_ecif.errors import UserError
from hf_ecif.utils.hub_errors import explain_hub_error, find_answer, is_transient
from hf_ecif.utils.hub_paths import HubPath, public_name

BEGIN = "<!-- hf-ecif:begin. The next push replaces what is between these marks. -->"
END = "<!-- hf-ecif:end -->"
_SECTION = re.compile(r"<!-- hf-ecif:begin(?:(?!<!-- hf-ecif:begin).)*?<!-- hf-ecif:end -->", re.S)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)(?:\n|\A)---[ \t]*(?:\n|\Z)", re.S)
# Text from strangers: everything that Markdown, HTML or a right-to-left override could act on.
# Hyphens and dots act only at the start of a line, in addresses and in the numbers of lists.
_MARKUP = re.compile(r"""[!"#$&*+:<=>@\[\\\]^_`{|}~]|^-|(?<=www)\.|(?<=\d)[.)](?=\s|$)""", re.I)
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")

Metadata = dict[str, Any]


def merge_card(
    card: str | None,
    section: str,
    title: str,
    change: Callable[[Metadata], Metadata],
    kind: type[CardData],
) -> str:
    """A card with our section in it, once, and everything else as it was.

    Args:
        card: The README so far, None if there is none.
        section: What stands between our marks. A section of an earlier push is replaced where it
            stands; else it comes first, below the metadata.
        title: Heading of a card that is new.
        change: Makes the new metadata of the old.
        kind: `DatasetCardData` or `ModelCardData`.

    Raises:
        UserError: The card's metadata is no YAML mapping.
    """
    metadata, body = read_card(card or "")
    marked = f"{BEGIN}\n\n{section.strip()}\n\n{END}"
    first, *others = _SECTION.split(body)
    if others:
        rest = "".join(others)
        body = f"{first.rstrip()}\n\n{marked}\n\n{rest.strip()}"
    elif card is None:
        body = f"# {escape(title)}\n\n{marked}"
    else:
        body = f"{marked}\n\n{body.strip()}"
    order = list(metadata)
    data = kind(**change(metadata))
    return f"---\n{data.to_yaml(original_order=order)}\n---\n\n{body.strip()}\n"


def read_card(card: str) -> tuple[Metadata, str]:
    """The metadata and the text of a README.

    Raises:
        UserError: The metadata is no YAML mapping.
    """
    text = card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    match = _FRONT_MATTER.match(text)
    if not match:
        return {}, text
    try:
        metadata = yaml.load(match[1], Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 2}" if mark else ""
        raise UserError(f"the metadata between the lines '---' is no valid YAML{where}.") from error
    if metadata is None:
        return {}, text[match.end() :]
    if not isinstance(metadata, dict):
        raise UserError("the metadata between the lines '---' must be names with values.")
    return {str(name): value for name, value in metadata.items()}, text[match.end() :]


def as_list(value: Any) -> list[Any]:
    """A list, of what a card may also write as a single value."""
    return value if isinstance(value, list) else [] if value is None else [value]


def local_card(source: str) -> str | None:
    """The README in a local folder, None if there is none."""
    path = Path(source).expanduser() / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def hub_card(
    place: HubPath, repo_type: Literal["dataset", "model"], token: str | None
) -> str | None:
    """The README of a repository, None if there is none.

    Raises:
        UserError: It cannot be read, and another try would not help; errors that pass are raised
            as they are.
    """
    try:
        file = HfApi(token=token).hf_hub_download(
            place.repo_id, "README.md", repo_type=repo_type, revision=place.revision
        )
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except Exception as error:
        if isinstance(find_answer(error), EntryNotFoundError):
            return None
        reason = explain_hub_error(error)
        if reason is None or is_transient(error):
            raise
        raise UserError(f"it cannot be read. {reason}") from error


def hide_folders(value: Any) -> Any:
    """The same values with the mere names of folders of this machine, at any depth."""
    if isinstance(value, dict):
        return {name: hide_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [hide_folders(part) for part in value]
    if not isinstance(value, str) or os.sep not in value or len(value) > 1000:
        return value
    source, comma, split = value.partition(", split ")
    path = Path(source).expanduser()
    local = path.is_absolute() or path.exists() or source.startswith(".")
    return f"{public_name(source) if local else source}{comma}{split}"


def describe_solve(report: dict[str, Any], config: dict[str, Any]) -> str:
    """A solve in a line, of a `SolveReport` and the config as JSON keeps them."""
    return (
        f"{report['method']}, {config['curvature']}: relative residual "
        f"{report['relative_residual']:.1e} (asked for {report['tolerance']:.0e}), damping "
        f"{report['damping']:.3g} ({report['relative_damping']:g} mean eigenvalues)"
    )


def render(template: str, **values: Any) -> str:
    """A template of Markdown; every value is escaped unless it is `Markup`."""
    return _environment().get_template(template).render(**values)


def escape(text: Any) -> Markup:
    """Text that shows as itself, wherever it stands in Markdown or HTML, on one line.

    Example:
        >>> print(escape("*a* <b>"))
        &#42;a&#42; &#60;b&#62;
    """
    plain = " ".join(_INVISIBLE.sub(" ", str(text)).split())
    return Markup(_MARKUP.sub(lambda match: f"&#{ord(match[0])};", plain))


def _verbatim(name: str) -> Markup:
    """A name for a code span or a link, where nothing can be escaped."""
    if not re.fullmatch(r"[\w./-]+", name):
        raise ValueError(f"{name!r} cannot stand in Markdown as it is")
    return Markup(name)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _verbatim
    environment.filters["count"] = lambda value: Markup(f"{value:,}")
    environment.filters["figure"] = lambda value: Markup(f"{value:.3g}")
    environment.filters["share"] = lambda value: Markup(f"{value:.1%}")
    return environment


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Booleans as in YAML 1.2, which the Hub reads: `language: no` is Norwegian, not false."""


_Loader.yaml_implicit_resolvers = {
    start: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    ]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
