"""A data set on the Hub: rows, report and card of an audit as files of a repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
from datasets import Dataset, Features, Image, concatenate_datasets

from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.columns import ADDED_LATER, COLUMNS, PLACE
from hf_ecif.data.loading import load_splits
from hf_ecif.data.parquet import count_rows_of, parquet_files, without_places, write_shards
from hf_ecif.data.schema import as_images, is_ours
from hf_ecif.data.summary import Summary
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
from hf_ecif.hub.markdown import hub_card, local_card
from hf_ecif.utils.files import to_json
from hf_ecif.utils.hub_paths import hide_folders, parse_hub_path
from hf_ecif.utils.progress import ProgressFactory, silent

_SPLIT = re.compile(r"\w+(\.\w+)*")  # what `datasets` accepts as the name of a split


class DatasetRepo:
    """Repository of an audit, or of a cleaning or a review of one.

    Args:
        path: folder that ``hf-ecif audit``, ``hf-ecif clean`` or a review has written.

    Raises:
        UserError: the audit is not finished, or its files disagree with its summary.
    """

    def __init__(self, path: Path) -> None:
        self.audit = AuditFolder(path)
        self.summary = self.audit.read_summary()
        self.split = _parts_of(self.summary.split)[0]
        if not _SPLIT.fullmatch(self.split):
            raise UserError(f"{self.split!r} cannot be the name of a split on the Hub.")
        self.audit.check_counts(self.summary)
        if not self.summary.kept:
            raise UserError(f"{path} has nothing to publish: the audit kept no row.")

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
        """Files of a repository, and what makes its card.

        Shards are those of the folder, not copies, unless they tell where tars lie; other splits
        exist in a temporary folder while the context is open.

        Args:
            repo_id: repository of the files.
            removed: whether the removed rows are published.
            other_splits: whether the other splits of the source are published.
            token: token to read the source's card; the user's login if absent.
            progress: makes progress bars.

        Raises:
            UserError: the source cannot be read any more, or has changed since the audit.
        """
        with TemporaryDirectory(prefix="hf-ecif-") as aside:
            shards = {self.split: self.audit.shards("kept")}
            if other_splits:
                shards |= self._write_other_splits(Path(aside), progress)
            layout = self._layout(shards, removed)
            places = {layout.folder(split): paths for split, paths in shards.items()}
            if layout.removed:
                places[layout.folder(self.split, removed=True)] = self.audit.shards("removed")
            files: dict[str, Path | bytes] = {
                f"{place}/{path.name}": path
                for place, paths in places.items()
                for path in without_places(paths, Path(aside, "public", place))
            }
            card = CardMaker(self, repo_id, layout, token)
            yield files | self._evidence(layout) | card.files, card

    def _layout(self, shards: dict[str, list[Path]], removed: bool) -> Layout:
        meanings = COLUMNS | ADDED_LATER
        shows_only_published = removed or not self.summary.removed
        return Layout(
            splits={split: count_rows_of(paths) for split, paths in shards.items()},
            removed=self.summary.removed if removed else 0,
            columns={
                name: meanings[name] for name in self.audit.features("kept") if name in meanings
            },
            counts=count_rows(self.audit.shards("kept"), self.audit.shards("removed")),
            has_report=self.audit.report.is_file() and shows_only_published,
        )

    def _evidence(self, layout: Layout) -> dict[str, Path | bytes]:
        shards = self.audit.shards("kept") + self.audit.shards("removed")
        told = to_json(hide_folders(self.summary.to_dict()), indent=2)
        files: dict[str, Path | bytes] = {
            SUMMARY: f"{told}\n".encode(),
            HISTOGRAM: draw_histogram(shards, self.summary.noise.threshold),
        }
        if layout.has_report:
            page = self.audit.report.read_text(encoding="utf-8")
            files[REPORT] = public_report(page, self.summary).encode()
        return files

    def _write_other_splits(self, aside: Path, progress: ProgressFactory) -> dict[str, list[Path]]:
        """Parquet files by split, with the columns of the kept rows."""
        source = self.summary.dataset
        try:
            splits = load_splits(source, self.summary.reading.config)
        except UserError as error:
            raise UserError(
                f"The other splits of the source cannot be published: {error} Or leave them "
                "out with `other_splits=False`."
            ) from error
        found = len(splits[self.split]) if self.split in splits else 0
        if self._is_whole and found != self.summary.rows:
            raise UserError(
                f"{source} has changed since the audit: its split {self.split!r} has {found:,} "
                f"rows, and had {self.summary.rows:,}. Audit it again, or leave the other "
                "splits out with `other_splits=False`."
            )
        audited = _parts_of(self.summary.split)
        others = {name: rows for name, rows in splits.items() if name not in audited}
        advance = progress("Write other splits", len(others))
        for name, rows in others.items():
            write_shards(self._like_kept(name, rows), aside / name)
            advance(1)
        return {name: parquet_files(aside / name) for name in others}

    @property
    def _is_whole(self) -> bool:
        """Whether every row of the split was one pair of the audit."""
        reading, columns = self.summary.reading, self.audit.features("kept")
        has_lists = any(name.startswith(PLACE) for name in columns)
        is_part = reading.limit or reading.sample or self.split != self.summary.split
        return not (has_lists or is_part)

    def _like_kept(self, name: str, rows: Dataset) -> Dataset:
        """The rows with empty influence columns, since a configuration has one set of columns."""
        features = self.audit.features("kept")
        images = self.summary.columns.image
        rows = as_images(rows, images).cast_column(images, Image(decode=False))
        rows = rows.remove_columns([name for name in rows.column_names if is_ours(name)])
        features[images] = Image(mode=features[images].mode, decode=False)
        own = {column: kind for column, kind in features.items() if not is_ours(column)}
        if set(rows.column_names) != set(own):
            odd = sorted(set(rows.column_names) ^ set(own))
            raise UserError(
                f"The split {name!r} has other columns than {self.split!r} ({', '.join(odd)}), and "
                "both cannot be in one configuration. Leave the other splits out with "
                "`other_splits=False`."
            )
        rows = rows.select_columns(list(own))
        if rows.features != Features(**own):
            rows = rows.cast(Features(**own))
        blank = Features(**{name: kind for name, kind in features.items() if name not in own})
        nulls = [pa.nulls(len(rows), field.type) for field in blank.arrow_schema]
        columns = Dataset(pa.table(nulls, schema=blank.arrow_schema))
        return concatenate_datasets([rows, columns], axis=1).select_columns(list(features))


def _parts_of(split: str) -> list[str]:
    """Names of splits in what was read: one, a part of one, or several.

    >>> _parts_of("train[:50%]+test")
    ['train', 'test']
    """
    return [part.partition("[")[0] for part in split.split("+")]


class CardMaker:
    """Makes the new card from the one in the repository, or else from the source's."""

    def __init__(self, repo: DatasetRepo, repo_id: str, layout: Layout, token: str | None) -> None:
        self._source, self._repo_id, self._token = repo.summary.dataset, repo_id, token
        self._summary = Summary.from_dict(hide_folders(repo.summary.to_dict()))
        self.layout = layout
        self._pictures = (
            show_removed(repo.audit.shards("removed"), repo.summary.columns)
            if layout.removed
            else []
        )

    @property
    def files(self) -> dict[str, Path | bytes]:
        """Pictures that the card shows, by path in the repository."""
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
                f"README.md of {whose}: {error} Correct it, or put a README.md of your own into "
                f"{self._repo_id} first."
            ) from error

    def _source_card(self) -> str | None:
        place = parse_hub_path(self._source)
        return hub_card(place, "dataset", self._token) if place else local_card(self._source)
