"""Addresses of the review's page: its script and style, rows, pictures, and decisions.

    GET  review/static/FILE
    GET  review/DESK/table              all rows as columns, binary; see `review_rows.table`
    GET  review/DESK/rows?rows=3,4      some rows in words
    GET  review/DESK/column/NAME        one more column to sort or filter by, binary
    GET  review/DESK/search?text=...    rows whose captions hold a text, binary
    GET  review/DESK/similar/ROW        rows that are like one
    GET  review/DESK/neighbours/ROW     the same by the model's embeddings, which it loads first
    GET  review/DESK/pictures           which rows have one picture, binary
    GET  review/DESK/image/ROW?side=640 a picture
    GET  review/DESK/steps?since=7      decisions since a number
    POST review/DESK/steps              more decisions; answers with those since a number
    POST review/DESK/import             decisions from a file

DESK is a name that cannot be guessed, and only the page that was given it knows it; what is posted
must be JSON from this page's own origin. Errors name no place on this machine.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from hf_ecif.app import review_rows
from hf_ecif.app.desk import DESKS, Desk
from hf_ecif.app.pictures import SIDES, Pictures
from hf_ecif.data.review_log import steps_of
from hf_ecif.errors import UserError

STATIC = Path(__file__).parent / "static"
MOST_ROWS = 200  # of one question for rows
MOST_STEPS = 1_000  # of one post
MOST_BYTES = 8 * 2**20  # of one post
MOST_IMPORTED = 32 * 2**20
_log = logging.getLogger(__name__)


def review_routes() -> list[BaseRoute]:
    """Routes to serve beside the app."""
    pictures = Pictures()

    def image(request: Request) -> Response:
        desk = _desk(request)
        row = _row(request, desk)
        side = SIDES[1] if request.query_params.get("side") == str(SIDES[1]) else SIDES[0]
        content, kind = pictures.get(desk.audit, row, side)
        # What a stranger uploads must not stay in a browser.
        cache = "no-store" if desk.is_upload else "private, max-age=3600"
        return Response(content, media_type=kind, headers={"Cache-Control": cache})

    routes = [
        _get("table", _table),
        _get("rows", _rows),
        _get("column/{name:path}", _column),
        _get("search", _search),
        _get("similar/{row}", _similar),
        _get("neighbours/{row}", _neighbours),
        _get("pictures", _pictures),
        _get("image/{row}", image),
        _get("steps", _steps),
        Route("/{desk}/steps", _post(_take_steps, MOST_BYTES), methods=["POST"]),
        Route("/{desk}/import", _post(_take_file, MOST_IMPORTED), methods=["POST"]),
    ]
    static = Mount("/static", StaticFiles(directory=STATIC))
    app = Starlette(
        routes=[static, *routes],
        exception_handlers={HTTPException: _refused, UserError: _refused, Exception: _failed},
    )
    return [Mount("/review", app)]


def _get(path: str, answer: Callable[[Request], Response]) -> Route:
    return Route(f"/{{desk}}/{path}", answer, methods=["GET"])


def _post(take: Callable[[Desk, Any], Any], most: int) -> Callable[[Request], Any]:
    """A handler of JSON that this page's own script posts."""

    async def handle(request: Request) -> Response:
        desk = _desk(request)
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise HTTPException(403, "Only the page itself may decide.")
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise HTTPException(415, "Decisions are posted as JSON.")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise HTTPException(413, f"At most {most // 2**20} MiB are taken at a time.")
        try:
            values = json.loads(body)
        except ValueError:
            raise HTTPException(400, "This is no JSON.") from None
        return _json(await run_in_threadpool(take, desk, values))

    return handle


def _table(request: Request) -> Response:
    desk = _desk(request)
    steps, upto = desk.log.since(0)
    facts = {
        "key": desk.audit.key,
        "steps": steps,
        "upto": upto,
        "shared": desk.shared,
        "is_upload": desk.is_upload,
    }
    return _binary(review_rows.table(desk.audit, facts))


def _rows(request: Request) -> Response:
    desk = _desk(request)
    try:
        numbers = [int(row) for row in request.query_params.get("rows", "").split(",") if row]
    except ValueError:
        raise HTTPException(400, "Rows are numbers.") from None
    return _json(review_rows.details(desk.audit, numbers[:MOST_ROWS]))


def _column(request: Request) -> Response:
    header, values = review_rows.column(_desk(request).audit, request.path_params["name"])
    return _binary(review_rows.packed(header, {"values": values}))


def _search(request: Request) -> Response:
    text = request.query_params.get("text", "")[:200]
    found = review_rows.search(_desk(request).audit, text)
    return _binary(review_rows.packed({}, {"values": found}))


def _similar(request: Request) -> Response:
    desk = _desk(request)
    return _json(review_rows.similar(desk.audit, _row(request, desk)))


def _neighbours(request: Request) -> Response:
    from hf_ecif.app.fitted_audit import find_neighbours, prepare  # with torch, which few need

    desk = _desk(request)
    agreeing, contradicting = find_neighbours(prepare(desk.folder), _row(request, desk))
    sections = (
        ("with similar images and similar captions", agreeing),
        ("with similar images and other captions", contradicting),
    )
    return _json([{"how": how, "rows": rows} for how, rows in sections if rows])


def _pictures(request: Request) -> Response:
    found = review_rows.pictures(str(_desk(request).audit.folder))
    return _binary(review_rows.packed({}, {"values": found}))


def _steps(request: Request) -> Response:
    desk = _desk(request)
    try:
        number = int(request.query_params.get("since", "0"))
    except ValueError:
        raise HTTPException(400, "`since` is a number.") from None
    steps, upto = desk.log.since(number)
    return _json({"steps": steps, "upto": upto})


def _take_steps(desk: Desk, values: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(values.get("steps"), list):
        raise HTTPException(400, "Decisions come as a list, `steps`.")
    if len(values["steps"]) > MOST_STEPS:
        raise HTTPException(413, f"At most {MOST_STEPS:,} decisions are taken at a time.")
    since = values.get("since", 0)
    desk.log.append(values["steps"])
    steps, upto = desk.log.since(since if isinstance(since, int) else 0)
    return {"steps": steps, "upto": upto}


def _take_file(desk: Desk, values: Any) -> Any:
    text = values.get("text") if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise HTTPException(400, "A file comes as `text`.")
    steps = steps_of(text, f"import-{secrets.token_hex(6)}")
    return {"new": desk.log.append(steps), "found": len(steps)}


def _desk(request: Request) -> Desk:
    desk = DESKS.get(request.path_params["desk"])
    if desk is None:
        raise HTTPException(410, "This page is no longer open here. Reload it.")
    return desk


def _row(request: Request, desk: Desk) -> int:
    text = request.path_params["row"]
    if not text.isascii() or not text.isdigit() or int(text) >= len(desk.audit.rows):
        raise HTTPException(404, "There is no such row.")
    return int(text)


def _json(values: Any) -> Response:
    return JSONResponse(values, headers={"Cache-Control": "no-store"})


def _binary(content: bytes) -> Response:
    kind = "application/octet-stream"
    return Response(content, media_type=kind, headers={"Cache-Control": "no-store"})


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    desk = DESKS.get(request.path_params.get("desk", ""))
    message = str(error).replace(f"{desk.folder}/", "") if desk and desk.shared else str(error)
    return JSONResponse({"error": message}, 400)


def _failed(_: Request, error: Exception) -> Response:
    _log.error("The review failed.", exc_info=error)
    if isinstance(error, OSError):
        return JSONResponse({"error": "The decisions cannot be written: is the disk full?"}, 507)
    return JSONResponse({"error": "Something unexpected went wrong here."}, 500)
