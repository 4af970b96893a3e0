"""Arguments of the library, as a user of the command line knows them."""

from __future__ import annotations

import re
from dataclasses import Field, fields
from typing import Any

from hf_ecif.applications.requests import Sources
from hf_ecif.config import DetectionConfig

_NAMED = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def flag_of(field: Field[Any]) -> str:
    """The flag of a field."""
    return f"--{field.metadata['flag'] or field.name.replace('_', '-')}"


_RENAMED = {one.name: flag_of(one) for kind in (DetectionConfig, Sources) for one in fields(kind)}


def name_flags(message: str) -> str:
    """A message of the library, with flags where it sets arguments in backticks.

    >>> name_flags("`batch_size=1`: must be at least 2. See `text_column` or `suggest=False`.")
    '--batch-size 1: must be at least 2. See --text-column or --no-suggest.'
    """

    def named(match: re.Match[str]) -> str:
        name, value = match.groups()
        flag = _RENAMED.get(name, "--" + name.replace("_", "-"))
        if value == "False":
            return flag.replace("--", "--no-", 1)
        return flag if value in (None, "True") else f"{flag} {value}"

    return _NAMED.sub(named, message)
