"""Repositories, their revisions and their files in the Hub's HTTP API.

Every endpoint takes a `Call` and returns a response or raises a `HubError`. Endpoints run one
after another, so a commit is never half seen.
"""

import json
import secrets
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs

import yaml
from starlette.responses import FileResponse, JSONResponse, Response

from tests.support.hub.calls import Call, Upload, refusal
from tests.support.hub.store import (
    Commit,
    File,
    HubError,
    checked_path,
    is_large,
    pointer,
    timestamp,
)


def whoami(call: Call) -> Response:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    role = "write" if call.user.may_write else "read"
    token = {"displayName": "tests", "role": role}
    return JSONResponse(
        {
            "type": "user",
            "id": sha256(call.user.name.encode()).hexdigest()[:24],
            "name": call.user.name,
            "fullname": call.user.name.title(),
            "avatarUrl": "",
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def create(call: Call) -> Response:
    user, asked = call.writer(), call.json
    kind = asked.get("type") or "model"
    name = f"{asked.get('organization') or user.name}/{asked['name']}"
    call.check_owns(name)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    url = call.state.web_url(kind, name)
    extra = {"sdk": asked["sdk"]} if kind == "space" else {}
    try:
        call.state.store.create(kind, name, user.name, private, extra)
    except HubError as error:
        return JSONResponse({"error": str(error), "url": url}, error.status)
    return JSONResponse({"url": url, "name": name})


def delete(call: Call) -> Response:
    user, asked = call.writer(), call.json
    name = f"{asked.get('organization') or user.name}/{asked['name']}"
    call.request.path_params.update(kind=asked.get("type") or "model", repo=name)
    repository, _ = call.writable()
    del call.state.store.repositories[repository.kind, name]
    return JSONResponse({})


def validate_yaml(call: Call) -> Response:
    errors, warnings = [], []
    parts = call.json["content"].replace("\r\n", "\n").split("---\n")
    if parts[0] or len(parts) < 3:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    else:
        try:
            if not isinstance(yaml.safe_load(parts[1]), dict | None):
                errors.append({"message": "metadata must be a mapping"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
    return JSONResponse({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def info(call: Call) -> Response:
    repository = call.readable()
    commit = repository.resolve(call.request.path_params.get("revision", "main"))
    siblings = [sibling(p, f, call.asks("blobs")) for p, f in commit.files.items()]
    return JSONResponse(
        {
            **repository.extra,
            "_id": sha256(repository.name.encode()).hexdigest()[:24],
            "id": repository.name,
            "author": repository.owner,
            "sha": commit.id,
            "createdAt": timestamp(repository.created),
            "lastModified": timestamp(commit.date),
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
    )


def auth_check(call: Call) -> Response:
    call.readable()
    return JSONResponse({})


def preupload(call: Call) -> Response:
    repository = call.contributed()[0]
    files = repository.resolve(call.revision).files
    answers = []
    for asked in call.json["files"]:
        path = checked_path(asked["path"])
        mode = "lfs" if is_large(path, asked["size"]) else "regular"
        known = {"oid": files[path].etag} if path in files else {}
        answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **known})
    return JSONResponse({"files": answers})


def lfs_batch(call: Call) -> Response:
    repository = call.readable()
    call.writer()
    objects = []
    for asked in call.json["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in repository.uploaded:
            key = secrets.token_hex(16)
            call.state.uploads[key] = Upload(repository, asked["oid"], asked["size"])
            answer["actions"] = {"upload": {"href": f"{call.state.url}/lfs/{key}"}}
        objects.append(answer)
    return JSONResponse({"transfer": "basic", "objects": objects})


def lfs_put(call: Call) -> Response:
    upload = call.state.uploads.get(call.key)
    if upload is None:
        raise HubError(403, "This address was not given out for an upload")
    if len(call.body) != upload.size or sha256(call.body).hexdigest() != upload.sha256:
        raise HubError(400, "The content is not what was announced")
    call.state.store.contents.add(call.body)
    upload.repository.uploaded[upload.sha256] = upload.size
    return Response()


def commit(call: Call) -> Response:
    repository, user = call.contributed()
    header, *operations = (json.loads(line) for line in call.body.splitlines() if line)
    text = {"title": header["value"]["summary"], "message": header["value"]["description"]}
    ref = repository.branch(call.revision)
    head = repository.resolve(ref)
    parent = header["value"].get("parentCommit")
    if call.asks("create_pr"):
        head = repository.resolve(parent) if parent else head
    elif parent and not head.id.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = call.state.store.apply(repository, head.files, operations)
    web = call.state.web_url(repository.kind, repository.name)
    answer: dict[str, Any] = {"success": True}
    if call.asks("create_pr"):
        pull = repository.discuss(text["title"], user.name, base=head)
        pull.add_comment(user.name, text["message"])
        pull.status, ref = "open", pull.ref
        answer["pullRequestUrl"] = f"{web}/discussions/{pull.number}"
    made = repository.commit(ref, (head,), files, user.name, **text)
    for pull in repository.discussions.values():
        if pull.ref == ref and pull.base is not None:
            pull.add_event("commit", user.name, {"subject": made.title, "oid": made.id})
    return JSONResponse({**answer, "commitUrl": f"{web}/commit/{made.id}", "commitOid": made.id})


def add_branch(call: Call) -> Response:
    repository, _ = call.writable()
    if call.revision.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {call.revision}")
    start = repository.resolve(call.json.get("startingPoint", "main"))
    repository.add_ref(f"refs/heads/{call.revision}", start)
    return JSONResponse({})


def drop_branch(call: Call) -> Response:
    call.writable()[0].drop_ref(f"refs/heads/{call.revision}")
    return JSONResponse({})


def add_tag(call: Call) -> Response:
    repository, _ = call.writable()
    repository.add_ref(f"refs/tags/{call.json['tag']}", repository.resolve(call.revision))
    return JSONResponse({})


def drop_tag(call: Call) -> Response:
    call.writable()[0].drop_ref(f"refs/tags/{call.revision}")
    return JSONResponse({})


def tree(call: Call) -> Response:
    at = call.readable().resolve(call.revision)
    folder = call.request.path_params.get("path", "").rstrip("/")
    files = at.under(folder)
    if folder and not files:
        raise HubError(404, f"{folder} does not exist on {call.revision}", "EntryNotFound")
    paths = set(files) | {parent for path in files for parent in parents(path, folder)}
    if not call.asks("recursive"):
        depth = len(folder.split("/")) if folder else 0
        paths = {path for path in paths if path.count("/") == depth}
    return JSONResponse([row(at, path, call.asks("expand")) for path in sorted(paths)])


def paths_info(call: Call) -> Response:
    at = call.readable().resolve(call.revision)
    form = parse_qs(call.body.decode())
    asked = [path.strip("/") for path in form.get("paths", [])]
    expand = form.get("expand") == ["true"]
    known = [path for path in asked if path in at.files or at.under(path)]
    return JSONResponse([row(at, path, expand) for path in known])


def resolve(call: Call) -> Response:
    at = call.readable().resolve(call.revision)
    file = at.files.get(call.path)
    headers = {"X-Repo-Commit": at.id}
    if file is None:
        return refusal(HubError(404, "Entry not found", "EntryNotFound"), **headers)
    headers["ETag"] = f'"{file.oid}"'
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    content = call.state.store.contents.path(file.sha256)
    return FileResponse(content, headers=headers, media_type="application/octet-stream")


def commits(call: Call) -> Response:
    return JSONResponse(
        [
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.message,
                "date": timestamp(commit.date),
                "authors": [{"user": commit.author}],
            }
            for commit in call.readable().resolve(call.revision).history()
        ]
    )


def refs(call: Call) -> Response:
    repository = call.readable()

    def named(start: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": target}
            for ref, target in repository.refs.items()
            if ref.startswith(start)
        ]

    answer = {"branches": named("refs/heads/"), "tags": named("refs/tags/"), "converts": []}
    if call.asks("include_prs"):
        answer["pullRequests"] = named("refs/pr/")
    return JSONResponse(answer)


def unknown_repository(call: Call) -> Response:
    """The answer for a name without a user: there are no such repositories here."""
    raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")


def sibling(path: str, file: File, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": path}
    return {"rfilename": path, "size": file.size, "blobId": file.oid, **lfs_part(file, "sha256")}


def row(at: Commit, path: str, expand: bool) -> dict[str, Any]:
    """A file or a folder in a listing."""
    file = at.files.get(path)
    if file is None:
        content = [f"{p} {f.oid}" for p, f in at.under(path).items()]
        oid = sha256("\n".join(content).encode()).hexdigest()[:40]
        answer = {"type": "directory", "oid": oid, "size": 0, "path": path}
    else:
        answer = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        answer |= lfs_part(file, "oid")
    if expand:
        last = at.last_change(path)
        answer["lastCommit"] = {"id": last.id, "title": last.title, "date": timestamp(last.date)}
    return answer


def lfs_part(file: File, name_of_hash: str) -> dict[str, Any]:
    if not file.lfs:
        return {}
    length = len(pointer(file.sha256, file.size))
    return {"lfs": {name_of_hash: file.sha256, "size": file.size, "pointerSize": length}}


def parents(path: str, folder: str) -> list[str]:
    """The folders between `folder` and a file in it."""
    parts = path.split("/")
    first = len(folder.split("/")) if folder else 0
    return ["/".join(parts[:end]) for end in range(first + 1, len(parts))]
