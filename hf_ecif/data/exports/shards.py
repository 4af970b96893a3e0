"""Which tars rows are from, and which they go to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePosixPath

from hf_ecif.data.columns import URL
from hf_ecif.data.exports.rows import ExportRows

ROWS_PER_TAR = 10_000


@dataclass(frozen=True)
class Shard:
    """A tar to write.

    Attributes:
        name: its path below the output, without an ending.
        source: the tar that the rows are from; None if they are from none.
        rows: their places among the rows that are exported.
    """

    name: str
    source: str | None
    rows: list[int]


def shards_of(rows: ExportRows) -> list[Shard]:
    """Tars by the names of those that the rows are from, or else of ten thousand rows each."""
    if URL not in rows.names:
        starts = range(0, len(rows), ROWS_PER_TAR)
        return [
            Shard(f"{number:05d}", None, [*range(start, min(start + ROWS_PER_TAR, len(rows)))])
            for number, start in enumerate(starts)
        ]
    found: dict[str, list[int]] = {}
    for row, source in enumerate(rows.column(URL)):
        found.setdefault(source or "", []).append(row)
    names = _names(list(found))
    return [Shard(names[source], source, places) for source, places in found.items()]


def _names(sources: list[str]) -> dict[str, str]:
    """Short names: the file's, or where two would be equal, the path from where they part."""
    paths = {source: _parts(source) for source in sources}
    names = {source: path[-1] for source, path in paths.items()}
    if len(set(names.values())) < len(sources):
        folders = zip(*(path[:-1] for path in paths.values()), strict=False)
        shared = len([*takewhile(lambda parts: len(set(parts)) == 1, folders)])
        names = {source: "/".join(path[shared:]) for source, path in paths.items()}
    if len(set(names.values())) < len(sources):
        names = {source: f"{number:05d}" for number, source in enumerate(sources)}
    return names


def _parts(source: str) -> tuple[str, ...]:
    """Parts of a path below the output, whatever a table calls its tars; without an ending."""
    path = PurePosixPath(source.partition("::")[0])
    *folders, file = [part for part in path.parts if part not in ("/", "..")] or [""]
    return (*folders, file.split(".tar")[0] or "rows")
