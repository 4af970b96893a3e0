"""The splits of a source: by name, in part, together, in memory or as a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import xxhash
from datasets import (
    Dataset,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
)

from hf_ecif.errors import UserError

PARTS = "A part is asked for as train[:10%] or train[100:200], several splits as train+test."
_FAR = 2**60  # rows, more than any stream has


class PartUnknownError(UserError):
    """A part that depends on the number of rows, of a stream."""


class Splits(Protocol):
    """What every reader gives.

    Attributes:
        format: name of the format that was read.
        names: of the splits, known before any row is read.
        sizes: rows of each split, or anything that is zero where there are none.
        bases: folders that paths in the rows may be relative to.
    """

    @property
    def format(self) -> str: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def bases(self) -> Sequence[Path]: ...

    def open(self, split: str) -> Dataset:
        """Rows of one split, by index."""
        ...

    def stream(self, split: str) -> IterableDataset:
        """Rows of one split, one after the other."""
        ...

    def fingerprint(self) -> str:
        """Hash of which files are read, without reading their rows."""
        ...


@dataclass(frozen=True)
class Built:
    """Splits that a builder of `datasets` makes.

    Attributes:
        builder: the builder.
        format: name of the format.
        bases: see `Splits`.
    """

    builder: Any
    format: str
    bases: Sequence[Path] = ()

    @property
    def names(self) -> Sequence[str]:
        return [str(name) for name in self.builder.config.data_files or self.sizes]

    @property
    def is_far(self) -> bool:
        """Whether its files would have to be downloaded."""
        files = self.builder.config.data_files or {}
        return any(str(file).startswith("hf://") for part in files.values() for file in part)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        # Not by load_dataset, which fails if any of the splits is empty.
        self.builder.download_and_prepare()
        known = self.builder.info.splits or {}
        return {str(info.name): info.num_examples for info in known.values()}

    def open(self, split: str) -> Dataset:
        assert self.sizes  # prepares
        return cast(Dataset, self.builder.as_dataset(split))

    def stream(self, split: str) -> IterableDataset:
        return cast(IterableDataset, self.builder.as_streaming_dataset(split))

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.builder.config_id} {self.builder.hash}".encode())


@dataclass(frozen=True)
class Tables:
    """Splits that are data sets already, or become one when they are opened.

    Attributes:
        format: name of the format.
        sizes: see `Splits`.
        load: opens a split by its name.
        key: what tells these files from others and from other versions of them.
        bases: see `Splits`.
    """

    format: str
    sizes: Mapping[str, int]
    load: Callable[[str], Dataset]
    key: bytes
    bases: Sequence[Path] = field(default=())

    @property
    def names(self) -> Sequence[str]:
        return list(self.sizes)

    def open(self, split: str) -> Dataset:
        return self.load(split)

    def stream(self, split: str) -> IterableDataset:
        return self.load(split).to_iterable_dataset()

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.key)


def choose_split(names: Sequence[str], split: str | None, usual: str) -> str:
    """The split that is meant where none was asked for: the usual one, or the only one.

    Raises:
        UserError: there are several, and none is the usual one.
    """
    if split is not None:
        return split
    if usual in names or not names:
        return usual
    if len(names) == 1:
        return names[0]
    raise UserError(f"there are several splits. Choose one of: {', '.join(names)}.")


def open_split(splits: Splits, split: str) -> Dataset:
    """Rows of a split, of a part of one, or of several.

    Args:
        splits: the splits of a source.
        split: a name, or as for `load_dataset`: ``train[:10%]``, ``train+test``.

    Raises:
        UserError: there is no such split or part, or it has no rows.
    """
    wanted = _named(split, list(splits.sizes))
    opened = {}
    for name in wanted:
        _require_rows(name, splits.sizes[name])
        opened[name] = splits.open(name)
        _require_rows(name, len(opened[name]))
    return cut(split, opened)


def cut(split: str, opened: Mapping[str, Dataset]) -> Dataset:
    """Rows of a split, a part or several, out of data sets by the names of their splits.

    Raises:
        UserError: there is no such part, or it has no rows.
    """
    if split in opened:
        return opened[split]
    _named(split, list(opened))
    sizes = {name: len(rows) for name, rows in opened.items()}
    parts = [
        opened[one.splitname].select(range(one.from_, one.to) if one.from_ < one.to else [])
        for one in _ranges(split, sizes)
    ]
    rows = _joined(split, parts)
    _require_rows(split, len(rows))
    return rows


def stream_split(splits: Splits, split: str) -> IterableDataset:
    """Rows of a split as a stream; parts of it by absolute numbers alone.

    Raises:
        UserError: there is no such split or part, or its size would have to be known.
    """
    wanted = _named(split, splits.names)
    if split in wanted:
        return splits.stream(split)
    if "%" in split or "-" in split.partition("[")[2]:
        raise PartUnknownError(
            f"the part {split!r} depends on the number of rows, which a stream does not know. "
            "Name it by rows from the start, train[:1000]."
        )
    parts = []
    for one in _ranges(split, dict.fromkeys(wanted, _FAR)):
        rows = splits.stream(one.splitname).skip(one.from_)
        parts.append(rows if one.to == _FAR else rows.take(one.to - one.from_))
    return _joined(split, parts)


def _named(split: str, names: Sequence[str]) -> list[str]:
    """Names in an expression, all of which there are."""
    if split in names:
        return [split]
    wanted = [part.partition("[")[0].strip() for part in split.split("+")]
    for name in wanted:
        if name not in names:
            remedy = f" {PARTS}" if name != split or name == "all" else ""
            raise UserError(
                f"there is no split {name!r}. Choose one of: {', '.join(names)}.{remedy}"
            )
    return list(dict.fromkeys(wanted))


def _ranges(split: str, sizes: Mapping[str, int]) -> Sequence[Any]:
    try:
        return cast(Sequence[Any], ReadInstruction.from_spec(split).to_absolute(dict(sizes)))
    except (ValueError, AssertionError) as error:
        raise UserError(f"there is no part {split!r}: {error} {PARTS}") from None


def _joined(split: str, parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets(list(parts))
    except ValueError as error:
        raise UserError(
            f"the splits of {split!r} have different columns, and cannot be read together. {error}"
        ) from None


def _require_rows(split: str, count: int) -> None:
    if not count:
        raise UserError(
            f"the split {split!r} has no rows, or has lost its files. Choose one that has some."
        )
