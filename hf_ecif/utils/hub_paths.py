"""Names of places on the Hub: ``owner/name@revision`` and ``hf://datasets/owner/name/folder``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

_NAME = r"(?P<repo_id>[\w-][\w.-]*/[\w-][\w.-]*)"
_HUB_ID = re.compile(rf"{_NAME}(@(?P<revision>\S+))?(?P<path>)")
# A revision has slashes only where it is a reference of the Hub's own, or where they are encoded.
_URI = re.compile(
    rf"hf://datasets/{_NAME}(@(?P<revision>refs/\w+/\w+|[^/\s]+))?(?:/(?P<path>.*?))?/?"
)


class HubPath(NamedTuple):
    """A place in a repository of the Hub.

    Attributes:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit; None is the main branch.
        path: Of a file or a folder inside; empty is all of it.
    """

    repo_id: str
    revision: str | None
    path: str


def parse_hub_path(source: str) -> HubPath | None:
    """The place that a source names, None if it lies on disk or is no such name.

    Example:
        >>> parse_hub_path("hf://datasets/me/pairs@v1/clean/train.parquet")
        HubPath(repo_id='me/pairs', revision='v1', path='clean/train.parquet')
    """
    if Path(source).expanduser().exists():
        return None
    match = _HUB_ID.fullmatch(source) or _URI.fullmatch(source)
    if match is None:
        return None
    revision = match["revision"]
    return HubPath(match["repo_id"], revision and unquote(revision), match["path"] or "")


def parse_model_path(name: str) -> HubPath | None:
    """The same for a model, which may be named ``hf://owner/name``, too.

    Example:
        >>> parse_model_path("hf://models/openai/clip-vit-base-patch32").repo_id
        'openai/clip-vit-base-patch32'
    """
    if Path(name).expanduser().exists():
        return None
    return parse_hub_path(name.removeprefix("hf://").removeprefix("models/"))


def public_name(source: str) -> str:
    """The name of a source as others may know it: on the Hub in full, else the folder's own.

    Folders of this machine are nobody's business.

    Example:
        >>> public_name("me/pairs@v1"), public_name("/home/me/secret/pairs")
        ('me/pairs@v1', 'pairs')
    """
    return source if parse_hub_path(source) else Path(source).expanduser().resolve().name
