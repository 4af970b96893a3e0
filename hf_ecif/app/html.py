"""HTML that the app shows, from templates that escape all values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

# Keys press the buttons of the review, except while text is edited.
KEYS = """
<script>
document.addEventListener('keydown', event => {
  const writing = event.target.closest(
    'input:not([type=radio], [type=checkbox], [type=range]), textarea, select');
  if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
  const id = {k: 'keep', r: 'remove', u: 'undo', j: 'next', p: 'previous'}[event.key];
  const button = id && document.getElementById('review-' + id);
  if (button && button.offsetParent) { event.preventDefault(); button.click(); }
});
</script>
"""


def render(template: str, **values: Any) -> str:
    """HTML of a template with these values."""
    return environment(__package__).get_template(f"{template}.html.j2").render(**values)
