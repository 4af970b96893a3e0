"""Names of places on the Hub: ``owner/name@revision`` and ``hf://datasets/owner/name/folder``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

_NAME = r"(?P<repo_id>[\w-][\w.-]*/[\w-][\w.-]*)"
_HUB_ID = re.compile(rf"{_NAME}(@(?P<revision>\S+))?(?P<path>)")
# A revision holds a slash only as one of the Hub's own references, or encoded.
_URI = re.compile(
    rf"hf://datasets/{_NAME}(@(?P<revision>refs/\w+/\w+|[^/\s]+))?(?:/(?P<path>.*?))?/?"
)

_PART = r"[^\s/'\"`,;:()<>]+"
_PATH = re.compile(rf"(?<![\w/.:~<-])~?(?:/{_PART})*/(?P<name>{_PART})/?")


class HubPath(NamedTuple):
    """A place in a repository of the Hub.

    Attributes:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; None is the main branch.
        path: a file or a folder inside; empty is the whole repository.
    """

    repo_id: str
    revision: str | None
    path: str


def parse_hub_path(source: str) -> HubPath | None:
    """The place on the Hub that a source names; None if it lies on disk or has another form.

    Examples:
        >>> parse_hub_path("hf://datasets/me/pairs@v1/clean/train.parquet")
        HubPath(repo_id='me/pairs', revision='v1', path='clean/train.parquet')
    """
    return None if is_local(source) else _match(source)


def parse_model_path(name: str) -> HubPath | None:
    """The place on the Hub that a model's name gives, which may be ``hf://owner/name``, too.

    Examples:
        >>> parse_model_path("hf://models/openai/clip-vit-base-patch32").repo_id
        'openai/clip-vit-base-patch32'
    """
    return None if is_local(name) else _match(name.removeprefix("hf://").removeprefix("models/"))


def is_local(source: str) -> bool:
    """Whether a source means a place on this disk, be it there or not.

    A typing mistake in a path should be told at once, and not be looked for on the Hub. Where a
    folder is called like an owner there, ``hf://`` still names what is on the Hub.

    Examples:
        >>> is_local("./pairs"), is_local("runs/demo/kept"), is_local("me/pairs@refs/pr/1")
        (True, True, False)
    """
    if source.startswith("hf://"):
        return False
    path, name = Path(source).expanduser(), source.partition("@")[0]
    if path.exists() or source.startswith((".", "/", "~")):
        return True
    return name.count("/") > 1 or ("/" in name and path.parent.is_dir())


def public_name(source: str) -> str:
    """Name of a source that may be published: in full on the Hub, else the folder's last part.

    Paths of this machine stay private.

    Examples:
        >>> public_name("me/pairs@v1"), public_name("/home/me/secret/pairs")
        ('me/pairs@v1', 'pairs')
    """
    return source if parse_hub_path(source) else Path(source).expanduser().resolve().name


def hide_folders(value: Any) -> Any:
    """Values in which paths of this machine are replaced by folder names, at any depth."""
    if isinstance(value, dict):
        return {name: hide_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [hide_folders(part) for part in value]
    if not isinstance(value, str) or os.sep not in value or len(value) > 1000:
        return value
    source, comma, split = value.partition(", split ")
    path = Path(source).expanduser()
    local = path.is_absolute() or path.exists() or source.startswith(".")
    return f"{public_name(source) if local else source}{comma}{split}"


def hide_paths(text: str) -> str:
    """A sentence in which absolute paths of this machine are replaced by their last part.

    >>> hide_paths("3 images of /home/me/pairs, split test, are in https://hf.co/me/pairs, too")
    '3 images of pairs, split test, are in https://hf.co/me/pairs, too'
    """
    return _PATH.sub(lambda match: match["name"], text)


def _match(source: str) -> HubPath | None:
    match = _HUB_ID.fullmatch(source) or _URI.fullmatch(source)
    if match is None:
        return None
    revision = match["revision"]
    return HubPath(match["repo_id"], revision and unquote(revision), match["path"] or "")
