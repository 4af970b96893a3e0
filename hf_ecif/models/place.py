"""Where a checkpoint is, which files it has, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from hf_ecif.errors import UserError
from hf_ecif.utils.files import read_json
from hf_ecif.utils.hub_errors import is_unreachable
from hf_ecif.utils.hub_paths import HubPath, parse_model_path

OPEN_CLIP_PREFIX = "hf-hub:"  # before names of the Hub, where open_clip reads them


@dataclass(frozen=True)
class Place:
    """A folder, or a repository of the Hub.

    Attributes:
        name: what the user gave, for messages.
        path: a folder, or ``owner/name``.
        on_hub: whether it is a repository.
        revision: on the Hub; None for its main branch, and of a folder.
        token: access token of the Hub.
        listed: files of the repository; None where the Hub did not tell.
        is_copy: whether the folder is the copy of an earlier run, since the Hub is out of reach.
        argument: what the user gave it as, for messages.
    """

    name: str
    path: str
    on_hub: bool = False
    revision: str | None = None
    token: str | bool | None = None
    listed: frozenset[str] | None = None
    is_copy: bool = False
    argument: str = "model"

    @property
    def folder(self) -> Path | None:
        """Folder on this disk; None on the Hub."""
        return None if self.on_hub else Path(self.path)

    @property
    def options(self) -> dict[str, Any]:
        """Given options, as arguments of the loaders."""
        given = {"revision": self.revision, "token": self.token}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def files(self) -> frozenset[str]:
        """Files here and in the folders here, by their paths; empty where nobody knows."""
        if self.folder is None:
            return self.listed or frozenset()
        here = (*self.folder.glob("*"), *self.folder.glob("*/*"))
        return frozenset(path.relative_to(self.folder).as_posix() for path in here)

    def find(self, file: str) -> Path | None:
        """A file on this disk, downloaded if need be; None where it is not there."""
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.path, file, **self.options))
        except (EntryNotFoundError, HFValidationError):
            return None

    def read(self, file: str) -> dict[str, Any]:
        """Values of a JSON file; empty where it is not there, or nobody knows."""
        path = self.find(file) if file in self.files else None
        return read_json(path) if path else {}

    def has(self, file: str) -> bool:
        """Whether a file is there, or may be where nobody knows."""
        return file in self.files or (self.on_hub and self.listed is None)

    def under(self, folder: str) -> Place:
        """A folder in this place, downloaded if need be."""
        if not folder or folder == ".":
            return self
        root = self.path
        if self.folder is None:
            root = snapshot_download(self.path, allow_patterns=f"{folder}/*", **self.options)
        return replace(self, path=str(Path(root, folder)), on_hub=False, revision=None, listed=None)

    def refuse(self, what: str) -> UserError:
        """Error that says what this place is, and what would work."""
        return UserError(f"`{self.argument}={self.name!r}` cannot be loaded: {what}")


def locate(
    name: str,
    revision: str | None = None,
    token: str | bool | None = None,
    argument: str = "model",
) -> Place:
    """The place that a name means, and the copy of an earlier run where the Hub is out of reach.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        token: access token of the Hub; the user's login if absent.
        argument: what the user gave the name as, for messages.

    Raises:
        UserError: two revisions are given.
    """
    named = name.removeprefix(OPEN_CLIP_PREFIX)
    place = parse_model_path(named)
    if place is None:
        path = str(Path(named).expanduser())
        return Place(name, path, revision=revision, token=token, argument=argument)
    if revision is not None and place.revision is not None:
        raise UserError(
            f"`{argument}={name!r}` names the revision {place.revision!r}, and "
            f"`revision={revision!r}` is given, too. Leave one of them out."
        )
    place = place._replace(revision=revision or place.revision)
    here = Place(name, place.repo_id, True, place.revision, token, argument=argument)
    return _ask(here, place)


def _ask(here: Place, place: HubPath) -> Place:
    """The place with its files, or the folder of an earlier run in the cache.

    Without an answer the loaders would ask the Hub for minutes, and fail.
    """
    try:
        info = HfApi(token=here.token).model_info(place.repo_id, revision=place.revision)
    except Exception as error:  # of any other kind: loading says what it is
        copy = _find_copy(place) if is_unreachable(error) else None
        if copy is None:
            return here
        return replace(here, path=copy, on_hub=False, revision=None, is_copy=True)
    return replace(here, listed=frozenset(file.rfilename for file in info.siblings or ()))


def _find_copy(place: HubPath) -> str | None:
    try:
        return snapshot_download(place.repo_id, revision=place.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
