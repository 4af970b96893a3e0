"""An audit's folder, read back: its rows and its evidence as files of a repository."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, concatenate_datasets

from hf_ecif.data.columns import ADDED_LATER, COLUMNS
from hf_ecif.data.loading import load_splits
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.schema import check_columns, drop_influence_columns, is_influence_column
from hf_ecif.errors import UserError
from hf_ecif.hub.dataset_card import (
    HISTOGRAM,
    REPORT,
    SUMMARY,
    Layout,
    count_rows,
    draw_histogram,
    public_report,
    show_removed,
    write_card,
)
from hf_ecif.hub.markdown import hide_folders, hub_card, local_card
from hf_ecif.utils.files import read_json
from hf_ecif.utils.hub_paths import parse_hub_path
from hf_ecif.utils.progress import ProgressFactory, silent

_SPLIT = re.compile(r"\w+(\.\w+)*")  # what `datasets` takes for the name of a split
_FACTS = ("rows", "kept", "removed", "columns", "noise", "query", "dataset", "split", "fit")


class AuditFolder:
    """What ``hf-ecif audit`` wrote, or ``hf-ecif clean`` or a review made of it.

    Args:
        path: The folder.

    Raises:
        UserError: The audit is not finished, or its files do not agree with its summary.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.summary = path, read_json(path / "summary.json")
        missing = [name for name in _FACTS if name not in self.summary]
        if missing:
            raise UserError(
                f"{path / 'summary.json'} lacks {missing[0]!r}: it is of another version, or no "
                "audit's. Run the audit again."
            )
        self.split: str = self.summary["split"]
        if not _SPLIT.fullmatch(self.split):
            raise UserError(f"{self.split!r} cannot be the name of a split on the Hub.")
        self._check_counts()

    @contextmanager
    def publish_as(
        self,
        repo_id: str,
        *,
        removed: bool,
        other_splits: bool,
        token: str | None = None,
        progress: ProgressFactory = silent,
    ) -> Iterator[tuple[dict[str, Path | bytes], CardMaker]]:
        """The files of a repository, and what makes its card.

        Shards are those of the folder, not copies; other splits are written aside while this lasts.

        Args:
            repo_id: Where they are going to be.
            removed: Whether the removed rows are published.
            other_splits: Whether the other splits of the source are.
            token: To read the source's card; the user's login if absent.
            progress: Makes progress bars.

        Raises:
            UserError: The source cannot be read any more, or is not what was audited.
        """
        with TemporaryDirectory(prefix="hf-ecif-") as aside:
            folders = {self.split: self.path / "kept"}
            if other_splits:
                folders |= self._write_other_splits(Path(aside), progress)
            layout = self._layout(folders, removed)
            files: dict[str, Path | bytes] = {}
            for split, folder in folders.items():
                files |= {f"{layout.folder(split)}/{path.name}": path for path in _shards(folder)}
            if layout.removed:
                place = layout.folder(self.split, removed=True)
                shards = _shards(self.path / "removed")
                files |= {f"{place}/{path.name}": path for path in shards}
            card = CardMaker(self, repo_id, layout, token)
            yield files | self._evidence(layout) | card.files, card

    @property
    def shards(self) -> list[Path]:
        """Files of all rows."""
        return [path for name in ("kept", "removed") for path in _shards(self.path / name)]

    def _layout(self, folders: dict[str, Path], removed: bool) -> Layout:
        kept = self.path / "kept"
        meanings = COLUMNS | ADDED_LATER
        shows_only_published = removed or not self.summary["removed"]
        return Layout(
            splits={split: _count(folder) for split, folder in folders.items()},
            removed=self.summary["removed"] if removed else 0,
            columns={name: meanings[name] for name in _features(kept) if name in meanings},
            counts=count_rows(_shards(kept), _shards(self.path / "removed")),
            has_report=(self.path / "report.html").is_file() and shows_only_published,
        )

    def _evidence(self, layout: Layout) -> dict[str, Path | bytes]:
        files: dict[str, Path | bytes] = {
            SUMMARY: (json.dumps(hide_folders(self.summary), indent=2) + "\n").encode(),
            HISTOGRAM: draw_histogram(self.shards, self.summary["noise"]["threshold"]),
        }
        if layout.has_report:
            page = (self.path / "report.html").read_text(encoding="utf-8")
            files[REPORT] = public_report(page, self.summary).encode()
        return files

    def _check_counts(self) -> None:
        for name in ("kept", "removed"):
            folder, expected = self.path / name, self.summary[name]
            found = _count(folder) if folder.is_dir() else 0
            if found != expected:
                raise UserError(
                    f"{folder} has {found:,} rows, but the audit wrote {expected:,}. Something has "
                    "changed it since: run the audit again."
                )
        parts, rows = self.summary["kept"] + self.summary["removed"], self.summary["rows"]
        if parts != rows:
            raise UserError(
                f"{self.path} has {parts:,} rows kept and removed, but {rows:,} were audited. Run "
                "the audit again."
            )
        if not self.summary["kept"]:
            raise UserError(f"{self.path} has nothing to publish: the audit kept no row.")

    def _write_other_splits(self, aside: Path, progress: ProgressFactory) -> dict[str, Path]:
        """Folders of parquet files, each split with the columns of the kept rows."""
        source = self.summary["dataset"]
        try:
            splits = load_splits(source)
        except UserError as error:
            raise UserError(
                f"The other splits of the source cannot be brought along: {error} Or leave them "
                "out with --no-other-splits."
            ) from error
        found = len(splits[self.split]) if self.split in splits else 0
        if found != self.summary["rows"]:
            raise UserError(
                f"{source} has changed since the audit: its split {self.split!r} has {found:,} "
                f"rows, and had {self.summary['rows']:,}. Audit it again, or leave the other "
                "splits out with --no-other-splits."
            )
        others = {name: rows for name, rows in splits.items() if name != self.split}
        advance = progress("Write other splits", len(others))
        for name, rows in others.items():
            write_shards(self._like_kept(name, rows), aside / name)
            advance(1)
        return {name: aside / name for name in others}

    def _like_kept(self, name: str, rows: Dataset) -> Dataset:
        """The same rows with empty influence columns: a configuration has one set of columns."""
        features = _features(self.path / "kept")
        images, texts = self.summary["columns"]["image"], self.summary["columns"]["text"]
        rows = drop_influence_columns(check_columns(rows, images, texts))
        features[images] = Image(mode=features[images].mode, decode=False)
        own = {column: kind for column, kind in features.items() if not is_influence_column(column)}
        if set(rows.column_names) != set(own):
            odd = sorted(set(rows.column_names) ^ set(own))
            raise UserError(
                f"The split {name!r} has other columns than {self.split!r} ({', '.join(odd)}), and "
                "both cannot be in one configuration. Leave the other splits out with "
                "--no-other-splits."
            )
        rows = rows.select_columns(list(own))
        if rows.features != Features(own):
            rows = rows.cast(Features(own))
        blank = Features({name: kind for name, kind in features.items() if name not in own})
        nulls = [pa.nulls(len(rows), field.type) for field in blank.arrow_schema]
        columns = Dataset(pa.table(nulls, schema=blank.arrow_schema))
        return concatenate_datasets([rows, columns], axis=1).select_columns(list(features))


class CardMaker:
    """Makes the card out of the one in the repository, or else out of the source's own."""

    def __init__(self, audit: AuditFolder, repo_id: str, layout: Layout, token: str | None) -> None:
        self._source, self._repo_id, self._token = audit.summary["dataset"], repo_id, token
        self._summary, self.layout = hide_folders(audit.summary), layout
        self._pictures = (
            show_removed(_shards(audit.path / "removed"), audit.summary["columns"])
            if layout.removed
            else []
        )

    @property
    def files(self) -> dict[str, Path | bytes]:
        """The pictures that the card shows."""
        return {picture.path: picture.content for picture in self._pictures}

    def __call__(self, card: str | None) -> str:
        own = card is not None
        whose = self._repo_id if own else self._source
        try:
            return write_card(
                card if own else self._source_card(),
                self._repo_id,
                self._summary,
                self.layout,
                self._pictures,
                own=own,
            )
        except UserError as error:
            raise UserError(
                f"README.md of {whose}: {error} Mend it, or put a README.md of your own into "
                f"{self._repo_id} first."
            ) from error

    def _source_card(self) -> str | None:
        place = parse_hub_path(self._source)
        return hub_card(place, "dataset", self._token) if place else local_card(self._source)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def _count(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in _shards(folder))


def _features(folder: Path) -> Features:
    return Features.from_arrow_schema(pq.read_schema(_shards(folder)[0]))
