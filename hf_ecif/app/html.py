"""HTML that the app shows, from templates that escape all values."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from hf_ecif.reports.html import environment

STYLE = (Path(__file__).parent / "templates" / "app.css").read_text()

# A pair is a button in a list; its row reaches Python as the event's data.
PICK = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-row]');
  if (!button) return;
  element.querySelectorAll('.chosen').forEach(other => other.classList.remove('chosen'));
  button.classList.add('chosen');
  trigger('select', {row: Number(button.dataset.row)});
  const shown = document.getElementById(element.querySelector('[data-shows]')?.dataset.shows);
  if (shown) shown.scrollIntoView({block: 'nearest'});
});
"""


def render(template: str, **values: Any) -> str:
    """HTML of a template with these values."""
    return _environment().get_template(f"{template}.html.j2").render(**values)


@cache
def _environment() -> jinja2.Environment:
    """One environment, which compiles each template once."""
    return environment(__package__)
