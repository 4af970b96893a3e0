"""Files that are written aside and then renamed, so that none is ever found half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> None:
    """Write a file in one step; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(values: dict[str, Any], path: Path) -> None:
    """The same for JSON; what JSON does not know is written as its text."""
    write_text(json.dumps(values, indent=2, default=str) + "\n", path)
