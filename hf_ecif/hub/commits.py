"""Publish a set of files in one commit: all of it or nothing, however often the Hub fails."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_ecif.errors import UserError
from hf_ecif.utils.hub_errors import explain_hub_error, is_transient, retry_after
from hf_ecif.utils.progress import ProgressFactory, silent

README = "README.md"
MANIFEST = "hf_ecif/manifest.json"
TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
PATIENCE = 600.0  # seconds; the longest wait that the Hub may ask for
UPLOADS_AT_ONCE = 8

Files = Mapping[str, Path | bytes]
MakeCard = Callable[[str | None], str]
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where files are published.

    Attributes:
        revision: a branch, made if it is missing; None is the main branch.
        create_pr: open a pull request instead of changing a branch.
        private: make a missing repository private; an existing one must be private.
    """

    repo_id: str
    repo_type: Literal["dataset", "model"]
    revision: str | None = None
    create_pr: bool = False
    private: bool = False


@dataclass(frozen=True)
class Publication:
    """What a publication changed, or would change.

    Attributes:
        commit: id of the commit; None if nothing is published.
        pull_request: address of the pull request; None without one.
        added: paths that are new or changed.
        deleted: paths of an earlier push that are deleted.
        unchanged: number of files that were there already.
        size: bytes of the added files.
    """

    commit: str | None
    pull_request: str | None
    added: tuple[str, ...]
    deleted: tuple[str, ...]
    unchanged: int
    size: int


def publish(
    api: HfApi,
    target: Target,
    files: Files,
    make_card: MakeCard,
    *,
    message: str,
    dry_run: bool = False,
    progress: ProgressFactory = silent,
) -> Publication:
    """Publish files and a card in a repository, in one commit.

    Large files are uploaded first, not yet visible; then one commit adds all files and the card and
    deletes what an earlier push left. A manifest in the repository lists the files of an earlier
    push; no other file is touched. Every try first reads the state of the repository, so that a
    commit whose answer was lost is not made twice, and no file is sent again. If nothing has
    changed, there is no commit.

    Args:
        api: a client with the user's token.
        target: where to publish.
        files: contents by path in the repository, without the card.
        make_card: makes the new README from the one in the repository, if there is one.
        message: message of the commit, and title of the pull request.
        dry_run: report what would change, and change nothing.
        progress: makes progress bars.

    Raises:
        UserError: the Hub refuses, cannot be reached, or still fails at the last try; nothing has
            been published then.
    """
    return retried(
        _Push(api, target, files, make_card, message, dry_run, progress).attempt,
        f"{target.repo_id} was not changed",
    )


@dataclass(frozen=True)
class _Change:
    """Difference between the files in a revision and those to publish."""

    head: str
    additions: list[CommitOperationAdd]
    deletions: list[str]
    unchanged: int

    def __bool__(self) -> bool:
        return bool(self.additions or self.deletions)

    def publication(self, commit: str | None, pull_request: str | None = None) -> Publication:
        return Publication(
            commit,
            pull_request,
            tuple(addition.path_in_repo for addition in self.additions),
            tuple(self.deletions),
            self.unchanged,
            sum(addition.upload_info.size for addition in self.additions),
        )


class _Push:
    """A push, which keeps the hashes of files for the next try."""

    def __init__(
        self,
        api: HfApi,
        target: Target,
        files: Files,
        make_card: MakeCard,
        message: str,
        dry_run: bool,
        progress: ProgressFactory,
    ) -> None:
        self._api, self._target, self._make_card = api, target, make_card
        self._message, self._dry_run, self._progress = message, dry_run, progress
        self._where: dict[str, Any] = {"repo_id": target.repo_id, "repo_type": target.repo_type}
        manifest = {"files": sorted([*files, MANIFEST])}
        contents = {**files, MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()}
        self._additions = {
            path: CommitOperationAdd(path, content) for path, content in contents.items()
        }

    def attempt(self) -> Publication:
        revision = self._find_base()
        if revision is None:
            change = self._compare({}, "")
            return change.publication(None)
        change = self._change_of(revision)
        if not change:
            return change.publication(change.head)
        if self._target.create_pr and (opened := self._find_pull_request()):
            return opened
        if self._dry_run:
            return change.publication(None)
        self._upload(change, revision)
        return self._commit(change, revision)

    def _find_base(self) -> str | None:
        """Revision to start from, made if it is missing; None if it is missing in a dry run."""
        target, info = self._target, self._find_repository()
        if info is None:
            if target.create_pr:
                raise UserError(
                    f"There is no {target.repo_type} {target.repo_id} that you can see, so it "
                    "takes no pull request. Check the name, or push without a pull request first."
                )
            if self._dry_run:
                return None
            self._api.create_repo(**self._where, private=target.private or None, exist_ok=True)
            info = self._api.repo_info(**self._where)
        if target.private and not info.private:
            raise UserError(
                f"{target.repo_id} exists and is public. Make it private in its settings on the "
                "Hub, or push to a new repository."
            )
        return self._find_branch()

    def _find_repository(self) -> Any:
        try:
            return self._api.repo_info(**self._where)
        except RepositoryNotFoundError:
            return None

    def _find_branch(self) -> str | None:
        revision = self._target.revision
        if revision is None:
            return "main"
        try:
            self._api.repo_info(**self._where, revision=revision)
        except RevisionNotFoundError:
            if revision.startswith("refs/"):
                raise
            if self._dry_run:
                return "main"
            self._api.create_branch(**self._where, branch=revision, exist_ok=True)
        return revision

    def _change_of(self, revision: str) -> _Change:
        head = cast(str, self._api.repo_info(**self._where, revision=revision).sha)
        tree = self._api.list_repo_tree(**self._where, revision=head, recursive=True)
        return self._compare({file.path: file for file in tree if isinstance(file, RepoFile)}, head)

    def _compare(self, there: dict[str, RepoFile], head: str) -> _Change:
        def read(path: str) -> str | None:
            if path not in there:
                return None
            file = self._api.hf_hub_download(**self._where, filename=path, revision=head)
            return Path(file).read_text(encoding="utf-8", errors="replace")

        before = _read_manifest(read(MANIFEST), self._target.repo_id)
        self._refuse_mixing(there, before)
        card = CommitOperationAdd(README, self._make_card(read(README)).encode())
        wanted = {**self._additions, README: card}
        changed = [add for path, add in wanted.items() if not _is_same(add, there.get(path))]
        return _Change(
            head,
            changed,
            sorted(path for path in before - wanted.keys() if path in there),
            len(wanted) - len(changed),
        )

    def _refuse_mixing(self, there: dict[str, RepoFile], before: set[str]) -> None:
        """Refuse rows of others in a folder of ours, since they would be loaded as ours."""
        folders = {str(Path(path).parent) for path in self._additions if path.endswith(".parquet")}
        foreign = [
            path
            for path in there
            if path.endswith(".parquet")
            and str(Path(path).parent) in folders
            and path not in before
            and path not in self._additions
        ]
        if foreign:
            raise UserError(
                f"{self._target.repo_id} has rows that no push of hf-ecif put there: {foreign[0]}. "
                "They would be mixed with the new ones. Push to another repository, or delete them."
            )

    def _find_pull_request(self) -> Publication | None:
        """An open pull request with exactly these files, from an earlier push or a lost answer."""
        for discussion in self._api.get_repo_discussions(
            **self._where, discussion_type="pull_request"
        ):
            same = discussion.title == self._message and discussion.status in ("open", "draft")
            if same and not (change := self._change_of(f"refs/pr/{discussion.num}")):
                return change.publication(change.head, discussion.url)
        return None

    def _upload(self, change: _Change, revision: str) -> None:
        """Upload large files, a few at a time so that the progress bar moves."""
        advance = self._progress("Upload files", len(change.additions))
        for start in range(0, len(change.additions), UPLOADS_AT_ONCE):
            part = change.additions[start : start + UPLOADS_AT_ONCE]
            self._api.preupload_lfs_files(
                **self._where,
                additions=part,
                revision=revision,
                create_pr=self._target.create_pr,
                free_memory=False,
            )
            advance(len(part))

    def _commit(self, change: _Change, revision: str) -> Publication:
        deletions = [CommitOperationDelete(path) for path in change.deletions]
        info = self._api.create_commit(
            **self._where,
            operations=[*change.additions, *deletions],
            commit_message=self._message,
            revision=revision,
            parent_commit=change.head,
            create_pr=self._target.create_pr,
        )
        return change.publication(info.oid, info.pr_url)


def _is_same(addition: CommitOperationAdd, there: RepoFile | None) -> bool:
    if there is None or there.size != addition.upload_info.size:
        return False
    if there.lfs is not None:
        return addition.upload_info.sha256.hex() == there.lfs.sha256
    with addition.as_file() as file:
        content = file.read()
    # The object id that git gives a file.
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id


def _read_manifest(text: str | None, repo_id: str) -> set[str]:
    if text is None:
        return set()
    try:
        return set(json.loads(text)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{MANIFEST} in {repo_id} is damaged, so it is not known which files come from an "
            "earlier push. Delete it there, and the files that you do not want."
        ) from error


def retried(attempt: Callable[[], _T], outcome: str) -> _T:
    """Result of ``attempt``, tried again after transient errors, with doubled waits.

    Raises:
        UserError: no try succeeded.
    """
    for tried in range(1, TRIES + 1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:
            asked = retry_after(error) or 0.0
            transient = is_transient(error)
            reason = explain_hub_error(error) or (transient and "The Hub sent no valid answer.")
            if not reason:
                raise
            if not transient or tried == TRIES or asked > PATIENCE:
                tries = f" after {tried} tries" if tried > 1 else ""
                again = " Run the same again to go on: nothing is uploaded twice."
                raise UserError(
                    f"{outcome}{tries}. {reason}{again if transient else ''}"
                ) from error
            # Random waits, so that clients that failed together do not return together.
            wait = min(FIRST_WAIT * 2 ** (tried - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
            wait = max(wait, asked)
            _log.warning("%s Trying again in %.0f s (%d of %d).", reason, wait, tried, TRIES - 1)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")
