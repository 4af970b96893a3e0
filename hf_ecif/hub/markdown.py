"""Cards of repositories: our section inside a README whose other parts stay as they are."""

from __future__ import annotations

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
from hf_ecif.utils.formatting import share
from hf_ecif.utils.hub_errors import explain_hub_error, find_answer, is_transient
from hf_ecif.utils.hub_paths import HubPath

BEGIN = "<!-- hf-ecif:begin. The next push replaces what is between these marks. -->"
END = "<!-- hf-ecif:end -->"
_SECTION = re.compile(r"<!-- hf-ecif:begin(?:(?!<!-- hf-ecif:begin).)*?<!-- hf-ecif:end -->", re.S)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)(?:\n|\A)---[ \t]*(?:\n|\Z)", re.S)
# Untrusted text: every character with a meaning in Markdown or HTML, or for right-to-left text.
# Hyphens and dots have one only at the start of a line, in addresses and in numbers of lists.
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
    """Card that contains our section once, with everything else unchanged.

    Args:
        card: the README so far; None if there is none.
        section: text between our marks. It replaces a section of an earlier push in place, and
            comes first, below the metadata, if there is none.
        title: heading of a new card.
        change: maps the old metadata to the new.
        kind: `DatasetCardData` or `ModelCardData`.

    Raises:
        UserError: the card's metadata is not a YAML mapping.
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
    """Metadata and text of a README.

    Raises:
        UserError: the metadata is not a YAML mapping.
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
        raise UserError(
            f"the metadata between the lines '---' is not valid YAML{where}."
        ) from error
    if metadata is None:
        return {}, text[match.end() :]
    if not isinstance(metadata, dict):
        raise UserError(
            "the metadata between the lines '---' must be a mapping of names to values."
        )
    return {str(name): value for name, value in metadata.items()}, text[match.end() :]


def as_list(value: Any) -> list[Any]:
    """Value as a list; a card may hold a list, a single value or nothing."""
    return value if isinstance(value, list) else [] if value is None else [value]


def local_card(source: str) -> str | None:
    """README in a local folder; None if there is none."""
    path = Path(source).expanduser() / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def hub_card(
    place: HubPath, repo_type: Literal["dataset", "model"], token: str | None
) -> str | None:
    """README of a repository; None if there is none.

    Raises:
        UserError: it cannot be read, and another try would not help; transient errors are raised
            unchanged.
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


def describe_solve(report: dict[str, Any], config: dict[str, Any]) -> str:
    """A line about a solve, from a `SolveReport` and the config as JSON holds them."""
    return (
        f"{report['method']}, {config['curvature']}: relative residual "
        f"{report['relative_residual']:.1e} (asked for {report['tolerance']:.0e}), damping "
        f"{report['damping']:.3g} ({report['relative_damping']:g} mean eigenvalues)"
    )


def render(template: str, **values: Any) -> str:
    """Markdown from a template; every value is escaped unless it is `Markup`."""
    return _environment().get_template(template).render(**values)


def escape(text: Any) -> Markup:
    """Text on one line that appears literally anywhere in Markdown or HTML.

    Examples:
        >>> print(escape("*a* <b>"))
        &#42;a&#42; &#60;b&#62;
    """
    plain = " ".join(_INVISIBLE.sub(" ", str(text)).split())
    return Markup(_MARKUP.sub(lambda match: f"&#{ord(match[0])};", plain))


def _verbatim(name: str) -> Markup:
    """A name unchanged, for a code span or a link, in which nothing can be escaped."""
    if not re.fullmatch(r"[\w./-]+", name):
        raise ValueError(f"{name!r} cannot be used in Markdown unescaped")
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
    environment.filters["share"] = lambda value: Markup.escape(share(value))
    return environment


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML loader with the booleans of YAML 1.2, as on the Hub: `no` is Norwegian, not false."""


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
