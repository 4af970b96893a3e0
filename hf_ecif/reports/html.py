"""Base of all pages: one HTML file that needs only a browser.

A page contains its style, figures (inline SVG) and thumbnails (data URIs), runs no script, and has
a content security policy that forbids all requests. It can be mailed, archived with the scores, and
opened offline.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from hf_ecif.data.summary import Provenance
from hf_ecif.reports.figures import FLAGGED, INK, KEPT, MUTED, RULE
from hf_ecif.utils.files import write_text
from hf_ecif.utils.formatting import estimate, nats, number, share, superscript
from hf_ecif.utils.hub_paths import hide_folders, hide_paths
from hf_ecif.version import __version__

# In a page, each colour of a figure is replaced by the style sheet's variable of that name, so that
# the figure follows the reader's theme.
THEME = {INK: "ink", MUTED: "muted", RULE: "rule", KEPT: "kept", FLAGGED: "flagged"}


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a page and write it atomically: ``path`` never holds half a page."""
    write_text(render_page(template, **values), Path(path))


def render_page(template: str, **values: Any) -> str:
    """HTML of a page, or of a piece of one."""
    return environment().get_template(template).render(**values).strip() + "\n"


@dataclass(frozen=True)
class Strip:
    """A few pictures for the first screen of a page.

    Attributes:
        title: what they are.
        cards: those that are shown, each with ``thumbnail``, ``problem``, ``marked`` and ``note``.
        count: how many there are in all.
    """

    title: str
    cards: Sequence[Any]
    count: int


def about(summary: Provenance) -> dict[str, str]:
    """Model, data set and split, for the head of a page; folders by their names alone."""
    sources = {"Model": summary.model, "Data set": summary.dataset}
    return {name: public(source) for name, source in sources.items()} | {"Split": summary.split}


def public(value: Any) -> Any:
    """A value or a sentence without the paths of this machine."""
    return hide_paths(hide_folders(value)) if isinstance(value, str) else value


def inline_svg(figure: Figure, name: str) -> Markup:
    """SVG element of a figure, with names that are unique among the figures of a page."""
    stream = io.StringIO()
    # Text stays text: it takes the page's fonts, can be searched, and is small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", dpi=200, transparent=True)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # The caption beside it and a label in the template say what the figure shows.
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def code(text: str) -> Markup:
    """HTML of a sentence whose names of arguments stand in backticks, without paths."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(public(text)))))


def environment(package: str = __package__) -> jinja2.Environment:
    """A Jinja environment that escapes all values.

    Args:
        package: package with a folder ``templates``; the templates of `reports` are found, too.
    """
    packages = dict.fromkeys((package, __package__))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,  # captions and column names are untrusted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "code": code,
        "number": number,
        "nats": nats,
        "public": public,
        "share": share,
        "superscript": superscript,
        "estimate": estimate,
    }
    environment.filters.update(filters)
    environment.globals["version"] = __version__
    return environment
