"""One request to the Hub: what it asks for, who asks, and what that user may do."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.support.hub.store import HubError, Repository, Store


class User(NamedTuple):
    """Who asks, as the token says."""

    name: str
    may_write: bool


class Upload(NamedTuple):
    """A large file that may be sent to an address of its own, without a token."""

    repository: Repository
    sha256: str
    size: int


@dataclass
class State:
    """Everything the Hub remembers."""

    store: Store
    url: str
    uploads: dict[str, Upload] = field(default_factory=dict)

    def web_url(self, kind: str, name: str) -> str:
        """Where people look at a repository."""
        return f"{self.url}/{name}" if kind == "model" else f"{self.url}/{kind}s/{name}"


@dataclass(frozen=True)
class Call:
    """One request, with its body read and its sender known (None: no token)."""

    state: State
    request: Request
    body: bytes
    user: User | None

    def __getattr__(self, name: str) -> Any:
        """The parts of the path: `kind`, `repo`, `revision`, `path`, `number`, `key`."""
        try:
            return self.request.path_params[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else {}

    def asks(self, name: str) -> bool:
        """Whether an option is set in the query."""
        return self.request.query_params.get(name, "").lower() in ("1", "true")

    def readable(self) -> Repository:
        """The repository of the path.

        Raises:
            HubError: 404 or, without a token, 401, if it does not exist or is another's secret.
        """
        kind = self.request.path_params.get("kind", "model")
        repository = self.state.store.repositories.get((kind, self.repo))
        if repository is None or (repository.private and not self._owns(repository.name)):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writer(self) -> User:
        """The sender, who may write somewhere.

        Raises:
            HubError: 401 without a token, 403 with one that only reads.
        """
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self.user.may_write:
            raise HubError(403, "Forbidden: this token has no write permission")
        return self.user

    def writable(self) -> tuple[Repository, User]:
        """The repository of the path and its owner, who asks."""
        repository, user = self.readable(), self.writer()
        self.check_owns(repository.name)
        return repository, user

    def contributed(self) -> tuple[Repository, User]:
        """The repository of the path, and the sender, who may commit to the revision.

        All who can read may open a pull request, and add to their own.
        """
        repository, user = self.readable(), self.writer()
        own = any(
            one.ref == self.revision and one.author == user.name
            for one in repository.discussions.values()
        )
        if not own and not self.asks("create_pr"):
            self.check_owns(repository.name)
        return repository, user

    def check_owns(self, repo_id: str) -> None:
        """Raises: HubError: 403 if the sender may not write to this repository."""
        if not self._owns(repo_id):
            raise HubError(403, f"Forbidden: you do not have write access to {repo_id}")

    def _owns(self, repo_id: str) -> bool:
        return self.user is not None and repo_id.split("/")[0] == self.user.name


Endpoint = Callable[[Call], Response]


def refusal(error: HubError, **headers: str) -> Response:
    """The answer to a request that failed."""
    # A header carries no line breaks and only Latin letters.
    headers["X-Error-Message"] = str(error).encode("ascii", "replace").decode()
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": str(error)}, error.status, headers)
