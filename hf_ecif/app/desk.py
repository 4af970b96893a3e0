"""Desks at which audits are reviewed: who may see which rows, and where decisions are kept.

A page that opens an audit gets a *desk*, under a name that cannot be guessed; the addresses of
pictures, captions and decisions carry it. On one's own machine all desks of an audit share one file
of decisions, beside the audit or, where that cannot be written, in the user's state folder. Where
strangers share a machine, each has a file of their own.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from hf_ecif.app.selection import Audit, open_audit
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.review import Review
from hf_ecif.data.review_log import ReviewLog

MOST_DESKS = 5_000
MOST_BYTES = 8 * 2**20  # of the decisions of a stranger, on one audit
MOST_FILES = 2_000  # of strangers


@dataclass(frozen=True)
class Place:
    """Where an app keeps decisions.

    Attributes:
        shared: whether strangers share this machine.
        own: folder of the audit that the app was started with; all others are uploads.
        keep: folder of decisions, for an audit that is itself kept nowhere; None for beside it.
    """

    shared: bool
    own: str
    keep: Path | None = None


@dataclass(frozen=True)
class Desk:
    """An audit that is open in a page.

    Attributes:
        folder: that of the audit.
        log: decisions on it.
        shared: whether strangers share this machine.
        is_upload: whether its rows are to be forgotten with the session.
    """

    folder: str
    log: ReviewLog
    shared: bool
    is_upload: bool

    @property
    def audit(self) -> Audit:
        """The audit, open."""
        return open_audit(self.folder)

    def is_of(self, audit: Audit) -> bool:
        """Whether it is that audit's."""
        return self.audit.folder == audit.folder

    def review(self) -> Review:
        """Decisions and threshold; one that was chosen for another threshold is forgotten."""
        review, audit = self.log.review(), self.audit
        if self.log.own_threshold is None or audit.is_own(self.log.own_threshold):
            return review
        return Review(review.log, None, review.notes)


class Desks:
    """Open desks by their names."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Desk] = OrderedDict()
        self._logs: WeakValueDictionary[Path, ReviewLog] = WeakValueDictionary()
        self._lock = threading.Lock()

    def open(self, folder: str, visitor: str, place: Place) -> str:
        """The name of a new desk for an audit.

        Args:
            folder: that of the audit.
            visitor: a secret of the browser, by which a stranger's decisions are found again.
            place: where decisions are kept.
        """
        audit, token = open_audit(folder), secrets.token_urlsafe(24)
        is_upload = place.shared and folder != place.own
        path = _path(audit, visitor, place)
        with self._lock:
            if (log := self._logs.get(path)) is None:
                most = MOST_BYTES if place.shared else None
                log = self._logs[path] = ReviewLog(path, audit.key, len(audit.rows), most)
            self._open[token] = Desk(folder, log, place.shared, is_upload)
            while len(self._open) > MOST_DESKS:
                self._open.popitem(last=False)
        return token

    def get(self, token: str | None) -> Desk | None:
        """The desk of that name, if it is open."""
        return self._open.get(token) if token else None

    def close(self, token: str | None) -> None:
        """Forget a name."""
        with self._lock:
            if token:
                self._open.pop(token, None)


DESKS = Desks()


def state_folder() -> Path:
    """Folder of what this user's programs keep from one run to the next."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "hf_ecif"


def _path(audit: Audit, visitor: str, place: Place) -> Path:
    """File of the decisions on an audit."""
    if place.shared:
        folder = place.keep or state_folder() / "visitors"
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder)
        who = hashlib.sha256(visitor.encode()).hexdigest()[:24]
        return folder / f"{audit.key}-{who}.jsonl"
    beside = AuditFolder(audit.folder).decisions
    if place.keep is None and _can_write(beside):
        return beside.resolve()
    return (place.keep or state_folder() / "reviews") / f"{audit.key}.jsonl"


def _can_write(path: Path) -> bool:
    return os.access(path if path.exists() else path.parent, os.W_OK)


def _make_room(folder: Path) -> None:
    """Delete the files of the strangers who have been away longest, if there are very many."""
    files = sorted(folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    for file in files[: max(0, len(files) - MOST_FILES)]:
        file.unlink(missing_ok=True)
