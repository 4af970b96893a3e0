"""Discussions and pull requests in the Hub's HTTP API."""

from typing import Any

from starlette.responses import JSONResponse, Response

from tests.support.hub.calls import Call
from tests.support.hub.store import MAIN, Discussion, Repository, timestamp


def listing(call: Call) -> Response:
    repository, query = call.readable(), call.request.query_params
    kind, status = query.get("type", "all"), query.get("status", "all")
    found = [
        described(repository, one)
        for one in sorted(repository.discussions.values(), key=lambda one: -one.number)
        if kind == "all" or (kind == "pull_request") == (one.base is not None)
        if status == "all" or (status == "open") == (one.status in ("open", "draft"))
        if query.get("author", one.author) == one.author
    ]
    return JSONResponse({"discussions": found, "count": len(found), "start": 0})


def discuss(call: Call) -> Response:
    repository, user, asked = call.readable(), call.writer(), call.json
    base = repository.resolve(MAIN) if asked["pullRequest"] else None
    made = repository.discuss(asked["title"], user.name, base)
    made.add_comment(user.name, asked["description"])
    return JSONResponse({"num": made.number, "pullRequest": asked["pullRequest"]})


def discussion(call: Call) -> Response:
    repository = call.readable()
    one = repository.discussion(call.number)
    answer = {**described(repository, one), "events": one.events}
    if one.base is not None:
        answer["changes"] = {"base": MAIN, "mergeCommitId": one.merged_as}
        answer["filesWithConflicts"] = [] if one.merged_as else repository.conflicts(one)
    return JSONResponse(answer)


def comment(call: Call) -> Response:
    one, user = call.readable().discussion(call.number), call.writer()
    return JSONResponse({"newMessage": one.add_comment(user.name, call.json["comment"])})


def change_status(call: Call) -> Response:
    repository, user = call.writable()
    one = repository.discussion(call.number)
    one.status = call.json["status"]
    if "comment" in call.json:
        one.add_comment(user.name, call.json["comment"])
    event = one.add_event("status-change", user.name, {"status": one.status})
    return JSONResponse({"newStatus": event})


def merge(call: Call) -> Response:
    repository, user = call.writable()
    one = repository.discussion(call.number)
    repository.merge(one, user.name)
    if "comment" in call.json:
        one.add_comment(user.name, call.json["comment"])
    return JSONResponse({})


def described(repository: Repository, one: Discussion) -> dict[str, Any]:
    return {
        "num": one.number,
        "title": one.title,
        "author": {"name": one.author},
        "createdAt": timestamp(one.date),
        "status": one.status,
        "isPullRequest": one.base is not None,
        "repo": {"name": repository.name, "type": repository.kind},
    }
