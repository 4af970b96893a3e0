"""Where a command may write."""

from __future__ import annotations

from pathlib import Path

from hf_ecif.errors import UserError


def require_new(output: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        UserError: it does.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty. Give a new folder.")
