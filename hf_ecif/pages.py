"""What every page has in common: one HTML file that needs nothing but a browser.

A page carries its style, its figures (inlined SVG) and its thumbnails (data URIs), runs no script,
and forbids itself any request by a content security policy. It can be mailed, archived next to the
scores, and opened offline.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_ecif.files import write_text
from hf_ecif.viz import FLAGGED, INK, KEPT, MUTED, RULE
from hf_ecif.words import estimate, number, percent, share, shorten, superscript

THUMBNAIL_SIDE = 160
PROBLEM_LENGTH = 160

# In a page each colour of a figure is replaced by the style sheet's variable of that name, so that
# the same drawing follows the reader's theme.
THEME = {INK: "ink", MUTED: "muted", RULE: "rule", KEPT: "kept", FLAGGED: "flagged"}


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a page in full, write it aside and rename it: ``path`` never holds half a page."""
    page = environment().get_template(template).render(**values)
    write_text(page.strip() + "\n", Path(path))


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


def thumbnail(
    cell: dict[str, Any] | None, side: int = THUMBNAIL_SIDE
) -> tuple[str | None, str | None]:
    """A small copy of an image as a data URI, or None and the reason why there is none."""
    if not cell or not (cell.get("bytes") or cell.get("path")):
        return None, "no image in this row"
    try:
        source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]
        with Image.open(source) as image:
            return _encode(image, side), None
    except UnidentifiedImageError:
        return None, "not a known image format"
    except FileNotFoundError:
        return None, "file not found"
    except Exception as error:  # decoders of damaged files raise almost anything
        return None, shorten(f"{error}", PROBLEM_LENGTH) or type(error).__name__


def _encode(image: Image.Image, side: int) -> str:
    small: Image.Image = image
    if "transparency" in image.info or image.mode in ("P", "PA", "LA", "RGBA"):
        small = image.convert("RGBA")
    # Before anything else touches the pixels: a JPEG is then decoded at a reduced size.
    small.thumbnail((side, side))
    small = ImageOps.exif_transpose(small)
    stream = io.BytesIO()
    small.convert("RGBA" if small.mode == "RGBA" else "RGB").save(stream, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_ecif", "templates"),
        autoescape=True,  # captions and column names come from strangers
        undefined=jinja2.ChainableUndefined,  # optional parts of the summary may be absent
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
    return environment
