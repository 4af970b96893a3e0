"""Repositories as the Hub keeps them: commits of files, branches, tags and pull requests.

Contents are files in a folder, named by their SHA-256; everything else is in memory. Nothing in
here knows of HTTP, and nothing is safe to call from two threads at once.
"""

import hashlib
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from itertools import count
from pathlib import Path, PurePosixPath

MAIN = "refs/heads/main"
LARGE = 10_000_000
LFS_PATTERNS = (
    *("*.arrow", "*.parquet", "*.npy", "*.npz", "*.safetensors", "*.bin", "*.pt", "*.zip", "*.gz"),
    *("*.tar", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.bmp", "*.tiff"),
)
GIT_ATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS)


class HubError(Exception):
    """What the Hub answers instead of a result: an HTTP status, a code and a sentence."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class File:
    """One version of a file.

    `oid` is what git calls it: for a large file that is the name of the pointer, not the content.
    """

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one moment, by path."""

    id: str
    parents: tuple["Commit", ...]
    files: Mapping[str, File]
    title: str
    message: str
    author: str
    date: datetime

    def history(self) -> Iterable["Commit"]:
        """This commit and its first parents, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parents[0] if commit.parents else None

    def under(self, folder: str) -> dict[str, File]:
        """The files in `folder` and in its folders; `""` is the root."""
        start = f"{folder}/" if folder else ""
        return {path: file for path, file in self.files.items() if path.startswith(start)}

    def last_change(self, path: str) -> "Commit":
        """The commit that last changed a file, or any file of a folder."""
        mine = {p: f for p, f in self.files.items() if p == path or p.startswith(f"{path}/")}
        last = self
        for commit in self.history():
            if {
                p: f for p, f in commit.files.items() if p in mine or p.startswith(f"{path}/")
            } != mine:
                break
            last = commit
        return last


@dataclass
class Discussion:
    """A discussion; one with a `base` is a pull request, that started from that commit."""

    number: int
    title: str
    author: str
    date: datetime
    status: str
    base: Commit | None = None
    merged_as: str | None = None
    events: list[dict] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"

    def add_event(self, kind: str, author: str, data: dict) -> dict:
        event = {
            "id": f"{self.number:012x}{len(self.events):012x}",
            "type": kind,
            "createdAt": timestamp(now()),
            "author": {"name": author},
            "data": data,
        }
        self.events.append(event)
        return event

    def add_comment(self, author: str, text: str) -> dict:
        data = {"edited": False, "hidden": False, "latest": {"raw": text}}
        return self.add_event("comment", author, data)


class Contents:
    """The bytes of all files of all repositories."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def add(self, data: bytes) -> str:
        """Store `data` and return its SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        return sha256


class Repository:
    """The commits of one repository and the names that point at them."""

    def __init__(self, kind: str, name: str, author: str, private: bool, extra: dict) -> None:
        self.kind, self.name, self.private, self.extra = kind, name, private, extra
        self.refs: dict[str, str] = {}
        self.discussions: dict[int, Discussion] = {}
        self.uploaded: dict[str, int] = {}  # size of each large file, by SHA-256
        self._commits: dict[str, Commit] = {}
        self._numbers = count(1)
        self.created = now()
        self.owner = author

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full reference or the start of a commit's name.

        Raises:
            HubError: 404 if there is none.
        """
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self._commits[self.refs[ref]]
        found = [commit for oid, commit in self._commits.items() if oid.startswith(revision)]
        if len(revision) < 7 or len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def branch(self, revision: str) -> str:
        """The full name of a branch or of the reference of a pull request.

        Raises:
            HubError: 404 if there is no such revision, 400 if it does not move.
        """
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        self.resolve(revision)
        raise HubError(400, f"{revision} is not a branch, so nothing can be committed to it")

    def add_ref(self, ref: str, target: Commit) -> None:
        """Raises: HubError: 409 if it exists."""
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = target.id

    def drop_ref(self, ref: str) -> None:
        """Raises: HubError: 404 if it does not exist, 403 for the main branch."""
        if ref == MAIN:
            raise HubError(403, "The main branch cannot be deleted")
        if self.refs.pop(ref, None) is None:
            raise HubError(404, f"No such reference: {ref}", "RevisionNotFound")

    def commit(
        self,
        ref: str,
        parents: tuple[Commit, ...],
        files: Mapping[str, File],
        author: str,
        **text: str,
    ) -> Commit:
        """Store a commit and let `ref` point at it."""
        date = now()
        lines = [f"parent {p.id}" for p in parents] + [f"{p} {f.oid}" for p, f in files.items()]
        lines += [ref, author, date.isoformat(), str(len(self._commits)), *text.values()]
        oid = hashlib.sha1("\n".join(lines).encode()).hexdigest()
        made = Commit(oid, parents, dict(sorted(files.items())), author=author, date=date, **text)
        self._commits[oid] = made
        self.refs[ref] = oid
        return made

    def discuss(self, title: str, author: str, base: Commit | None = None) -> Discussion:
        """Open a discussion or, with a `base`, a pull request whose reference points at it."""
        number = next(self._numbers)
        status = "open" if base is None else "draft"
        discussion = Discussion(number, title, author, now(), status, base)
        self.discussions[number] = discussion
        if base is not None:
            self.refs[discussion.ref] = base.id
        return discussion

    def discussion(self, number: int) -> Discussion:
        """Raises: HubError: 404 if there is none of this number."""
        if number not in self.discussions:
            raise HubError(404, f"No discussion {number}")
        return self.discussions[number]

    def conflicts(self, pull: Discussion) -> list[str]:
        """The paths that the pull request and the main branch changed differently."""
        ours, theirs = self.resolve(MAIN).files, self.resolve(pull.ref).files
        base = pull.base.files if pull.base else {}
        return [
            path
            for path in sorted({*ours, *theirs, *base})
            if ours.get(path) != theirs.get(path)
            and base.get(path) not in (ours.get(path), theirs.get(path))
        ]

    def merge(self, pull: Discussion, author: str) -> Commit:
        """Bring the changes of a pull request to the main branch.

        Raises:
            HubError: 409 if both changed a file, 400 if it is no open pull request.
        """
        if pull.base is None or pull.status not in ("open", "draft"):
            raise HubError(400, f"#{pull.number} is not an open pull request")
        if conflicts := self.conflicts(pull):
            raise HubError(409, f"Conflicting files: {', '.join(conflicts)}")
        main, head = self.resolve(MAIN), self.resolve(pull.ref)
        changed = {
            path
            for path in {*head.files, *pull.base.files}
            if head.files.get(path) != pull.base.files.get(path)
        }
        files = {path: file for path, file in main.files.items() if path not in changed}
        files |= {path: file for path, file in head.files.items() if path in changed}
        title = f"{pull.title} (#{pull.number})"
        made = self.commit(MAIN, (main, head), files, author, title=title, message="")
        pull.status, pull.merged_as = "merged", made.id
        pull.add_event("status-change", author, {"status": "merged"})
        return made


class Store:
    """All repositories of a Hub, their contents in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.contents = Contents(folder)
        self.repositories: dict[tuple[str, str], Repository] = {}

    def create(self, kind: str, name: str, author: str, private: bool, extra: dict) -> Repository:
        """A new repository with what the Hub puts in first: which files are large.

        Raises:
            HubError: 409 if there is one of this kind and name.
        """
        if (kind, name) in self.repositories:
            raise HubError(409, f"You already created this {kind} repo: {name}")
        repository = Repository(kind, name, author, private, extra)
        files = {".gitattributes": self.regular_file(GIT_ATTRIBUTES.encode())}
        repository.commit(MAIN, (), files, author, title="initial commit", message="")
        self.repositories[kind, name] = repository
        return repository

    def regular_file(self, data: bytes) -> File:
        return File(self.contents.add(data), len(data), git_oid(data), lfs=False)

    def large_file(self, repository: Repository, sha256: str) -> File:
        """A file whose content came before.

        Raises:
            HubError: 400 if it did not come.
        """
        if sha256 not in repository.uploaded:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = repository.uploaded[sha256]
        return File(sha256, size, git_oid(pointer(sha256, size)), lfs=True)

    def apply(
        self, repository: Repository, files: Mapping[str, File], operations: Iterable[dict]
    ) -> dict[str, File]:
        """`files` after the operations of a commit, in their order.

        Raises:
            HubError: 404 if what is to be deleted does not exist, 400 for anything not known.
        """
        result = dict(files)
        for operation in operations:
            value = operation["value"]
            path = checked_path(value["path"])
            match operation["key"]:
                case "file":
                    result[path] = self.regular_file(decoded(value))
                case "lfsFile":
                    result[path] = self.large_file(repository, value["oid"])
                case "deletedFile" if path in result:
                    del result[path]
                case "deletedFolder" if any(p.startswith(f"{path}/") for p in result):
                    result = {p: f for p, f in result.items() if not p.startswith(f"{path}/")}
                case "deletedFile" | "deletedFolder":
                    message = f"A file with this name doesn't exist: {path}"
                    raise HubError(404, message, "EntryNotFound")
                case key:
                    raise HubError(400, f"Unknown operation in a commit: {key}")
        return result


def is_large(path: str, size: int) -> bool:
    """Whether a file has to be uploaded apart from the commit."""
    name = PurePosixPath(path).name
    return size > LARGE or any(fnmatch(name, pattern) for pattern in LFS_PATTERNS)


def pointer(sha256: str, size: int) -> bytes:
    """What git stores in place of a large file."""
    version = "https://git-lfs.github.com/spec/v1"
    return f"version {version}\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def checked_path(path: str) -> str:
    """Raises: HubError: 400 if `path` leaves the repository."""
    path = path.rstrip("/")
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.split("/")):
        raise HubError(400, f"Invalid path: {path!r}")
    return path


def now() -> datetime:
    return datetime.now(UTC)


def timestamp(date: datetime) -> str:
    """A date as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03d}Z"


def decoded(value: dict) -> bytes:
    """The content of a regular file in a commit."""
    if value.get("encoding") == "base64":
        return b64decode(value["content"], validate=True)
    return value["content"].encode()
