"""Small copies of an audit's pictures, made when they are asked for, and kept for a while."""

from __future__ import annotations

import threading
from collections import OrderedDict

from hf_ecif.app.selection import Audit
from hf_ecif.data.images import small_copy

SIDES = (160, 640)  # pixels of the longer side: in a grid, and looked at closely
MOST_BYTES = 48 * 2**20
AT_ONCE = 3  # pictures decoded at a time, which bounds memory

_NONE = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#8a8f94"
 stroke-width="1"><rect x="3" y="4" width="18" height="16" rx="2"/><path d="M4 17l5-5 3 3 3-4 5 6M4
 21L20 3"/></svg>"""


class Pictures:
    """Copies of pictures, the last ones kept up to a number of bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], tuple[bytes, str]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()
        self._decoding = threading.Semaphore(AT_ONCE)

    def get(self, audit: Audit, row: int, side: int) -> tuple[bytes, str]:
        """A picture and its type; a drawing of a crossed-out one where there is none."""
        key = (str(audit.folder), row, side)
        with self._lock:
            if (found := self._kept.pop(key, None)) is not None:
                self._kept[key] = found
                return found
        with self._decoding:
            content, _ = small_copy(audit.rows.cell(row), side)
        found = (content, "image/webp") if content else (_NONE, "image/svg+xml")
        with self._lock:
            if key not in self._kept:
                self._kept[key] = found
                self._size += len(found[0])
            while self._size > MOST_BYTES:
                _, (dropped, _) = self._kept.popitem(last=False)
                self._size -= len(dropped)
        return found
