"""The Hub as a server on the loopback interface, that can be told to fail."""

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from threading import Thread
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.support.hub.calls import Call, Endpoint, State, User, refusal
from tests.support.hub.routes import ROUTES
from tests.support.hub.store import Commit, HubError, Store

ANN = "hf_annMayWriteAndRead"
ANN_READ_ONLY = "hf_annMayOnlyRead"
BOB = "hf_bobMayWriteAndRead"
TOKENS = {ANN: User("ann", True), ANN_READ_ONLY: User("ann", False), BOB: User("bob", True)}

ROUTE_NAMES = {name for name, *_ in ROUTES}
KINDS = ("500", "503", "429", "cut", "stale", "cut_after")


@dataclass
class Seen:
    """One request as it came, and the status of the answer (0: the connection was cut)."""

    method: str
    route: str
    url: str
    user: str | None
    has_token: bool
    body: bytes
    status: int = 0


class HubServer:
    """A Hub with the users ann and bob, whose tokens are `ANN`, `ANN_READ_ONLY` and `BOB`.

    Attributes:
        url: Its address, known before it starts and the same for all its life.
        requests: All that was asked since the last `reset`, oldest first.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.requests: list[Seen] = []
        self._failures: list[_Failure] = []
        self._server: uvicorn.Server | None = None
        self._folder = TemporaryDirectory(prefix="hub-")
        routes = [
            Route(path, self._respond(name, endpoint), methods=[method], name=name)
            for name, method, path, endpoint in ROUTES
        ]
        unknown = self._respond("unknown", _unknown)
        routes.append(Route("/{path:path}", unknown, methods=["GET", "POST", "PUT", "DELETE"]))
        self._router = Router(routes, redirect_slashes=False)

    def start(self) -> None:
        """Answer from now on, in a thread. A server starts once."""
        self.reset()
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        arguments = {"sockets": [self._socket]}
        self._thread = Thread(target=self._server.run, kwargs=arguments, daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)

    def stop(self) -> None:
        """Answer no longer, and forget all."""
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join()
        self._folder.cleanup()

    def reset(self) -> None:
        """Forget all repositories, requests and failures."""
        folder = Path(mkdtemp(dir=self._folder.name))
        self._state = State(Store(folder), self.url)
        self.requests.clear()
        self._failures.clear()

    def fail(self, route: str, *, kind: str, times: int = 1, after: int = 0) -> None:
        """Let coming requests fail.

        Args:
            route: The name of a route, such as "create", "preupload", "lfs_batch", "lfs_put",
                "commit", "tree", "resolve" or "info".
            kind: "500", "503" or "429" (with `Retry-After: 0`) is the status of the answer.
                "cut" closes the connection and does nothing, "cut_after" does what was asked and
                then closes it. "stale" answers a commit with 412.
            times: So many requests fail.
            after: So many requests are let through before.
        """
        if route not in ROUTE_NAMES:
            raise ValueError(f"no route {route!r}; there are {', '.join(sorted(ROUTE_NAMES))}")
        if kind not in KINDS or (kind == "stale" and route != "commit"):
            raise ValueError(f"route {route!r} cannot fail as {kind!r}")
        self._failures.append(_Failure(route, kind, times, after))

    def commits(
        self, repo_id: str, repo_type: str = "dataset", revision: str = "main"
    ) -> list[Commit]:
        """The history of a revision, newest first.

        Raises:
            KeyError: If there is no such repository.
        """
        repository = self._state.store.repositories[repo_type, repo_id]
        return list(repository.resolve(revision).history())

    def files(
        self, repo_id: str, repo_type: str = "dataset", revision: str = "main"
    ) -> dict[str, bytes]:
        """The content of each file at a revision, by path.

        Raises:
            KeyError: If there is no such repository.
        """
        head = self.commits(repo_id, repo_type, revision)[0]
        contents = self._state.store.contents
        return {path: contents.path(file.sha256).read_bytes() for path, file in head.files.items()}

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A slash in a revision comes as %2F and is no separator: match the path as it was sent.
        scope["path"] = scope["raw_path"].decode("ascii")

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start" and "seen" in scope["state"]:
                scope["state"]["seen"].status = message["status"]
            await send(message)

        await self._router(scope, receive, send_and_note)

    def _respond(self, route: str, endpoint: Endpoint) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            body = await request.body()
            token = request.headers.get("authorization", "").removeprefix("Bearer ")
            call = Call(self._state, request, body, TOKENS.get(token))
            name = call.user.name if call.user else None
            url = str(request.url)
            request.state.seen = Seen(request.method, route, url, name, bool(token), body)
            self.requests.append(request.state.seen)
            kind = self._failure(route)
            if kind is not None and kind != "cut_after":
                return _failed(kind)
            response = _answer(endpoint, call, bad_token=bool(token) and call.user is None)
            return _Cut() if kind == "cut_after" else response

        return respond

    def _failure(self, route: str) -> str | None:
        """How the next request to `route` is to fail, if it is."""
        for failure in self._failures:
            if failure.route != route:
                continue
            if failure.after:
                failure.after -= 1
                return None
            if failure.times:
                failure.times -= 1
                return failure.kind
        return None


@dataclass
class _Failure:
    route: str
    kind: str
    times: int
    after: int


class _Protocol(H11Protocol):
    """HTTP that shows its connection to the application."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class _Cut(Response):
    """No answer: the connection is closed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["transport"].abort()
        while (await receive())["type"] != "http.disconnect":
            pass


def _answer(endpoint: Endpoint, call: Call, bad_token: bool) -> Response:
    try:
        if bad_token:
            raise HubError(401, "Invalid credentials in Authorization header")
        return endpoint(call)
    except HubError as error:
        return refusal(error)


def _failed(kind: str) -> Response:
    match kind:
        case "cut":
            return _Cut()
        case "stale":
            message = "A commit has happened since. Please refresh and try again."
            return refusal(HubError(412, message))
        case "429":
            return refusal(HubError(429, "Too many requests"), **{"Retry-After": "0"})
        case status:
            return refusal(HubError(int(status), "The Hub failed, as it was told to"))


def _unknown(call: Call) -> Response:
    raise HubError(404, f"There is no such route here: {call.request.url.path}")
