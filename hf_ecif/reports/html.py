"""What every page has in common: one HTML file that needs nothing but a browser.

A page carries its style, its figures (inlined SVG) and its thumbnails (data URIs), runs no script,
and forbids itself any request by a content security policy. It can be mailed, archived next to the
scores, and opened offline.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from hf_ecif.data.summary import Provenance
from hf_ecif.reports.figures import FLAGGED, INK, KEPT, MUTED, RULE
from hf_ecif.utils.files import write_text
from hf_ecif.utils.formatting import estimate, number, percent, share, superscript
from hf_ecif.version import __version__

# In a page each colour of a figure is replaced by the style sheet's variable of that name, so that
# the same drawing follows the reader's theme.
THEME = {INK: "ink", MUTED: "muted", RULE: "rule", KEPT: "kept", FLAGGED: "flagged"}


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a page in full, write it aside and rename it: ``path`` never holds half a page."""
    write_text(render_page(template, **values), Path(path))


def render_page(template: str, **values: Any) -> str:
    """A page, or a piece of one, as HTML."""
    return environment().get_template(template).render(**values).strip() + "\n"


def about(summary: Provenance) -> dict[str, str]:
    """What was run on what, for the head of a page."""
    return {"Model": summary.model, "Data set": summary.dataset, "Split": summary.split}


def inline_svg(figure: Figure, name: str) -> Markup:
    """Turns a figure into an SVG element which may stand in a page beside others."""
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
    # Its neighbour, the caption, and a label in the template say what the figure shows.
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def environment(package: str = __package__) -> jinja2.Environment:
    """A Jinja environment that escapes all values.

    Args:
        package: in whose folder ``templates`` the templates lie.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,  # captions and column names come from strangers
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": number,
        "percent": percent,
        "share": share,
        "superscript": superscript,
        "estimate": estimate,
    }
    environment.filters.update(filters)
    environment.globals["version"] = __version__
    return environment
