"""Where the embedded demo lies: ``spaces_demo`` of a checkout, ``hf_ecif/demo`` of a wheel."""

from __future__ import annotations

from pathlib import Path

from hf_ecif.errors import UserError

TRUTH = "is_misaligned"  # column that says which captions were exchanged


def demo_folder() -> Path:
    """Folder with the demo's ``model``, ``data`` and ``audit``.

    Raises:
        UserError: it has been removed from the installation.
    """
    packed, checkout = Path(__file__).parents[1] / "demo", Path(__file__).parents[2] / "spaces_demo"
    for folder in (packed, checkout):
        if (folder / "model").is_dir():
            return folder
    raise UserError(f"The demo is not in {packed}. Install hf_ecif again.")
