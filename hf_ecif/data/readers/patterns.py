"""Names that stand for several files: braces, ``::`` and globs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from glob import has_magic, iglob
from pathlib import Path

from hf_ecif.errors import UserError

MOST_FILES = 1_000_000  # so that a slip of the pen does not fill the memory
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ADDRESS = re.compile(r"(?!hf:)(\w+):.*", re.DOTALL)


def is_pattern(source: str) -> bool:
    """Whether a name can only stand for several files."""
    if Path(source).expanduser().exists():
        return False
    return "::" in source or bool(_BRACES.search(source)) or has_magic(source)


def expand_braces(source: str) -> Iterator[str]:
    """Every name that a pattern with ``::`` and braces stands for, in order.

    >>> list(expand_braces("a/{08..10}.tar::b/{x,y}.tar"))
    ['a/08.tar', 'a/09.tar', 'a/10.tar', 'b/x.tar', 'b/y.tar']
    """
    for part in source.split("::"):
        match = _BRACES.search(part)
        if match is None:
            yield part
            continue
        for choice in _choices(match[1]):
            yield from expand_braces(part[: match.start()] + choice + part[match.end() :])


def find_files(source: str) -> list[Path]:
    """Files that a pattern stands for.

    Raises:
        UserError: some of the files do not exist, or it names a command or an address.
    """
    found: list[Path] = []
    missing: list[str] = []
    for name in expand_braces(source):
        _refuse_addresses(name)
        path = Path(name).expanduser()
        if path.exists():
            found.append(path)
            continue
        matched = [Path(one) for one in sorted(iglob(str(path), recursive=True))]
        found += [one for one in matched if one.is_file()]
        if not matched:
            missing.append(name)
        if len(found) + len(missing) > MOST_FILES:
            raise UserError(f"the pattern stands for more than {MOST_FILES:,} files.")
    if not missing:
        return found
    if not found:
        raise UserError(f"no file is called like this: {_few(missing)}.")
    raise UserError(
        f"{len(missing):,} of {len(found) + len(missing):,} files do not exist: {_few(missing)}. "
        "Correct the pattern, or get them."
    )


def _choices(inside: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        yield from inside.split(",")
        return
    first, last = numbers.groups()
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{width}d}"


def _refuse_addresses(name: str) -> None:
    match = _ADDRESS.fullmatch(name)
    if match is None:
        return
    if match[1] == "pipe":
        raise UserError("commands (pipe:) are never run. Copy the files here first, and name them.")
    raise UserError(
        f"addresses ({match[1]}:) are not read. Copy the files here first and name them, or give "
        "a place on the Hub (hf://datasets/owner/name/folder)."
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
