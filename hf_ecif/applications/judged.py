"""An audit of more rows than it learns from: these are judged part by part, and kept on disk.

A part is a file of influence columns; one that is there is not judged again. When all are there,
what can only be told of all rows together is added: which are duplicates of each other. What is
held in memory for that are two numbers for every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif.applications.analysis import Analysis
from hf_ecif.data.findings import KINDS
from hf_ecif.data.parquet import is_whole
from hf_ecif.data.summary import DuplicateCounts, Duplicates
from hf_ecif.detection.annotate import FEATURES, column_values, spread_columns
from hf_ecif.detection.explain import SharedRows
from hf_ecif.detection.suggestions import describe_groups, first_like
from hf_ecif.engine.neighbours import link
from hf_ecif.influence.rows import Rows
from hf_ecif.utils import distributed
from hf_ecif.utils.files import aside
from hf_ecif.utils.formatting import Bools, Floats
from hf_ecif.utils.progress import ProgressFactory

PART_ROWS = 4096
IMAGE_KEY, CAPTION_KEY = "image_key", "caption_key"
COLUMNS_FILE = "columns.arrow"
_SCHEMA = FEATURES.arrow_schema
_PART_SCHEMA = pa.schema(
    [*_SCHEMA, pa.field(IMAGE_KEY, pa.int64()), pa.field(CAPTION_KEY, pa.int64())]
)


@dataclass(frozen=True)
class GroupCounts:
    """Rows of a group, those that are flagged, and those that are borderline."""

    rows: int = 0
    flagged: int = 0
    borderline: int = 0


@dataclass(frozen=True)
class JudgedRows:
    """All rows of a data set, judged.

    Attributes:
        columns: `COLUMNS` of all rows, mapped into memory.
        scored: rows that could be read.
        unreadable: the others, by the reason.
        flagged: rows that look misaligned.
        borderline: rows whose flag is uncertain.
        findings: rows by kind, and those whose captions are cut off.
        suggested: rows with a suggested caption.
        expected_right: how many of these captions are right, by their probabilities.
        duplicates: rows with the same image or caption; None where nobody asked for them.
        groups: counts by the name of the group, where there are groups.
    """

    columns: Dataset
    scored: int
    unreadable: dict[str, int]
    flagged: int
    borderline: int
    findings: dict[str, int]
    suggested: int
    expected_right: float
    duplicates: Duplicates | None
    groups: dict[str, GroupCounts]

    def flags_and_suspicion(self) -> tuple[Bools, Floats, NDArray[np.int64]]:
        """Flags and suspicion of the readable rows, and their row numbers."""
        table = self.columns.select_columns(["ecif_flag", "ecif_suspicion"]).with_format("arrow")[:]
        readable = table["ecif_flag"].is_valid()
        kept = table.filter(readable)
        return (
            np.asarray(kept["ecif_flag"]),
            np.asarray(kept["ecif_suspicion"], dtype=np.float64),
            np.flatnonzero(np.asarray(readable)),
        )


def judge_rows(found: Analysis, folder: Path, progress: ProgressFactory) -> JudgedRows | None:
    """Verdicts on all rows; those that were learned from have theirs already.

    All processes judge, each some parts; the main one puts them together, the others return None.

    Args:
        found: what was learned from some of the rows.
        folder: for the parts, one that all processes share; it may hold some of them.
        progress: makes progress bars.
    """
    parts = _Parts(found, folder)
    mine = parts.ranges[distributed.rank() :: distributed.count()]
    advance = progress("Judge rows", sum(map(len, mine)))
    with distributed.alone():
        for part in mine:
            parts.judge(part)
            advance(len(part))
    distributed.collect(None)  # until all have
    return _put_together(found, parts, progress) if distributed.is_main() else None


@dataclass(frozen=True)
class _Parts:
    """The parts of a data set, as files."""

    found: Analysis
    folder: Path

    @property
    def ranges(self) -> list[range]:
        """Rows of every part."""
        count = len(self.found.opened.dataset)
        return [range(start, min(start + PART_ROWS, count)) for start in range(0, count, PART_ROWS)]

    def path(self, part: range) -> Path:
        """Where a part is kept."""
        return self.folder / f"rows-{part.start:012d}.parquet"

    def judge(self, part: range) -> None:
        """Write a part, unless it is there."""
        path = self.path(part)
        if is_whole(path):
            return
        inside, own = self._inside(part)
        outside = np.setdiff1d(np.arange(part.start, part.stop), inside)
        tables = [own, self._judge(outside)] if len(outside) else [own]
        order = np.argsort(np.concatenate([inside, outside]), kind="stable")
        with aside(path) as partial:
            pq.write_table(pa.concat_tables(tables).take(pa.array(order)), partial)

    def _judge(self, numbers: NDArray[np.int64]) -> pa.Table:
        """Verdicts on rows that were not learned from."""
        found, learned = self.found, self.found.learned
        columns, model = found.opened.like.columns, found.opened.model
        cells = found.opened.dataset.select(numbers)
        rows = model.read_any(cells, columns.image, columns.text)
        if not len(rows):
            return _table(rows, {name: [] for name in FEATURES})
        names = found.beside.groups
        groups = names and [names[row] for row in numbers[rows.positions.numpy()].tolist()]
        judged = learned.judge(rows, groups or ())
        return _table(judged.rows, learned.columns(judged))

    def _inside(self, part: range) -> tuple[NDArray[np.int64], pa.Table]:
        """Rows of a part that were learned from: their numbers and verdicts."""
        assert self.found.sample is not None
        numbers = self.found.sample.numpy()
        start, stop = np.searchsorted(numbers, [part.start, part.stop]).tolist()
        return numbers[start:stop], self._sample.slice(start, stop - start)

    @cached_property
    def _sample(self) -> pa.Table:
        """Verdicts on all rows that were learned from."""
        found, evidence = self.found, self.found.evidence
        assert found.sample is not None
        rows = _renumbered(found.rows, found.sample)
        if evidence is not None:  # duplicates are looked for among all rows
            own = found.rows.positions.numpy()
            evidence = replace(evidence, same_image=own, same_caption=own, duplicate=own)
        values = column_values(
            rows,
            found.scores,
            found.scores_as_given,
            found.signals,
            found.detection,
            found.opened.model.config.relative,
            evidence,
            found.findings,
        )
        return _table(rows, values)


def _renumbered(rows: Rows, sample: Tensor) -> Rows:
    """The rows of a sample, numbered among themselves."""
    place = {int(number): row for row, number in enumerate(sample.tolist())}
    positions = torch.tensor([place[row] for row in rows.positions.tolist()])
    reasons = {place[row]: reason for row, reason in rows.reasons.items()}
    return replace(rows, positions=positions, reasons=reasons, total=len(sample))


def _table(rows: Rows, values: Mapping[str, list[Any]]) -> pa.Table:
    """Columns of all rows, readable or not, with the keys of the readable ones."""
    columns = spread_columns(rows, values)
    columns[IMAGE_KEY] = rows.spread(rows.keys.images.tolist())
    columns[CAPTION_KEY] = rows.spread(rows.keys.captions.tolist())
    return pa.Table.from_pydict(columns, schema=_PART_SCHEMA)


# ------------------------------------------------------------------------------- all together


def _put_together(found: Analysis, parts: _Parts, progress: ProgressFactory) -> JudgedRows:
    """Columns of all rows in one file, with what is told of all of them together."""
    alike = _Alike.read(parts) if found.evidence is not None else None
    path, tally = parts.folder / COLUMNS_FILE, _Tally(found.beside.groups)
    advance = progress("Put rows together", len(found.opened.dataset))
    with aside(path) as partial, pa.ipc.new_stream(str(partial), _SCHEMA) as writer:
        for part in parts.ranges:
            table = pq.read_table(parts.path(part), schema=_PART_SCHEMA)
            table = table.drop_columns([IMAGE_KEY, CAPTION_KEY])
            if alike is not None:
                table = alike.add(table, part)
            tally.add(table, part)
            writer.write_table(table.cast(_SCHEMA))
            advance(len(part))
    duplicates = None if alike is None else alike.describe()
    return tally.conclude(Dataset.from_file(str(path)), duplicates)


@dataclass(frozen=True)
class _Alike:
    """Which rows have equal images or captions.

    Attributes:
        readable: ``(n,)``, numbers of the readable rows.
        image: ``(n,)``, first row with the image of each, among them.
        caption: likewise, with the caption.
        either: likewise, linked by either.
    """

    readable: NDArray[np.int64]
    image: NDArray[np.int64]
    caption: NDArray[np.int64]
    either: NDArray[np.int64]

    @classmethod
    def read(cls, parts: _Parts) -> _Alike:
        """From the keys of all rows."""
        names = [IMAGE_KEY, CAPTION_KEY]
        tables = (pq.read_table(parts.path(part), columns=names) for part in parts.ranges)
        keys = pa.concat_tables(tables)
        there = np.asarray(keys[IMAGE_KEY].is_valid())
        image, caption = (
            first_like(torch.tensor(keys[name].drop_null().to_numpy())) for name in names
        )
        own = torch.arange(len(image))
        either = link(len(image), iter([(own, image), (own, caption)]))
        readable = np.flatnonzero(there)
        return cls(readable, *(readable[first.numpy()] for first in (image, caption, either)))

    def add(self, table: pa.Table, part: range) -> pa.Table:
        """Groups of duplicates, and clauses of the reasons that name them."""
        start, stop = np.searchsorted(self.readable, [part.start, part.stop]).tolist()
        here = self.readable[start:stop] - part.start
        groups = np.full(len(part), -1)
        groups[here] = np.where(self._shared[start:stop], self.either[start:stop], -1)
        duplicates = pa.array(groups, mask=groups < 0)
        reasons = table["ecif_reason"].to_pylist()
        flags = np.asarray(table["ecif_flag"].fill_null(False))
        for number, row in zip(range(start, stop), here.tolist(), strict=True):
            if flags[row]:
                named = [clause for kind in self._kinds for clause in kind.of(number)]
                reasons[row] = "; ".join([reasons[row], *named])
        changed = {
            "ecif_duplicate_group": duplicates,
            "ecif_reason": pa.array(reasons, pa.string()),
        }
        for name, column in changed.items():
            table = table.set_column(table.column_names.index(name), name, column)
        return table

    def describe(self) -> Duplicates:
        """How many they are, by what is alike."""
        kinds = {"image": self.image, "caption": self.caption, "either": self.either}
        return Duplicates(
            **{kind: DuplicateCounts(**describe_groups(first)) for kind, first in kinds.items()}
        )

    @cached_property
    def _shared(self) -> Bools:
        """``(n,)``, which rows have others like them."""
        _, number, sizes = np.unique(self.either, return_inverse=True, return_counts=True)
        return np.asarray(sizes[number] > 1)

    @cached_property
    def _kinds(self) -> tuple[SharedRows, SharedRows]:
        return SharedRows.of_both(self.image, self.caption, self.readable)


class _Tally:
    """Counts over the parts."""

    def __init__(self, groups: Sequence[str | None] | None) -> None:
        self._groups = groups
        self._of_groups: dict[str, GroupCounts] = {}
        self._counts: Counter[str] = Counter()
        self._findings: Counter[str] = Counter()
        self._unreadable: Counter[str] = Counter()
        self._expected = 0.0

    def add(self, table: pa.Table, part: range) -> None:
        """Count the rows of a part."""
        readable = table["ecif_flag"].is_valid()
        flag, near = (
            np.asarray(table[name].fill_null(False)) for name in ("ecif_flag", "ecif_borderline")
        )
        self._counts["scored"] += pc.sum(readable).as_py()
        self._counts["flagged"] += int(flag.sum())
        self._counts["borderline"] += int(near.sum())
        self._counts["suggested"] += int(np.asarray(table["ecif_suggested_text"].is_valid()).sum())
        self._expected += pc.sum(table["ecif_suggested_probability"]).as_py() or 0.0
        self._findings.update(table["ecif_finding"].drop_null().to_pylist())
        self._findings["truncated"] += pc.sum(table["caption_truncated"]).as_py() or 0
        self._unreadable.update(table.filter(pc.invert(readable))["ecif_reason"].to_pylist())
        for row in np.flatnonzero(np.asarray(readable)).tolist() if self._groups else ():
            self._count_group(part.start + row, bool(flag[row]), bool(near[row]))

    def conclude(self, columns: Dataset, duplicates: Duplicates | None) -> JudgedRows:
        """What was counted."""
        counts = self._counts
        return JudgedRows(
            columns=columns,
            scored=counts["scored"],
            unreadable=dict(self._unreadable),
            flagged=counts["flagged"],
            borderline=counts["borderline"],
            findings={kind: self._findings[kind] for kind in (*KINDS, "truncated")},
            suggested=counts["suggested"],
            expected_right=self._expected,
            duplicates=duplicates,
            groups=self._of_groups,
        )

    def _count_group(self, row: int, flag: bool, near: bool) -> None:
        assert self._groups is not None
        name = self._groups[row]
        if name is not None:
            so_far = self._of_groups.get(name, GroupCounts())
            self._of_groups[name] = GroupCounts(
                so_far.rows + 1, so_far.flagged + flag, so_far.borderline + near
            )


def with_columns(dataset: Dataset, columns: Dataset) -> Dataset:
    """Rows with their influence columns beside them, all mapped into memory."""
    whole = dataset.flatten_indices() if dataset._indices is not None else dataset
    return concatenate_datasets([whole.with_format(None), columns], axis=1)
