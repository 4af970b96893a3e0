"""What a name stands for, found by what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from datasets import Dataset, concatenate_datasets

from hf_ecif.config import RowFormat
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.embeddings import is_embeddings
from hf_ecif.data.readers.builders import build, build_files, by_split, split_of
from hf_ecif.data.readers.coco import is_coco, open_coco
from hf_ecif.data.readers.embeddings import open_embeddings
from hf_ecif.data.readers.hub import open_repository
from hf_ecif.data.readers.patterns import find_files, is_pattern
from hf_ecif.data.readers.saved import is_saved, open_saved
from hf_ecif.data.readers.sidecars import PICTURES, has_sidecars, open_sidecars
from hf_ecif.data.readers.splits import Splits, Tables
from hf_ecif.data.readers.tables import csv_options, loader_of, require_header
from hf_ecif.data.readers.webdataset import require_whole
from hf_ecif.errors import UserError
from hf_ecif.utils.hub_paths import parse_hub_path

SOURCES = (
    "Give a folder written by save_to_disk; a file or a folder of parquet, arrow, csv, tsv or JSON "
    "lines; tars of WebDataset (a folder, a file, shards/{00000..00012}.tar); pictures with "
    "metadata.csv or with their captions beside them; arrays of embeddings; or a Hub id "
    "(owner/name or owner/name@revision, hf://datasets/owner/name/folder)."
)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def open_source(source: str, config: str | None = None, format: RowFormat | None = None) -> Splits:
    """Splits of a source on disk or on the Hub.

    Args:
        source: see `SOURCES`.
        config: which configuration, of a folder or a repository that declares several.
        format: what the files are, where it is not to be found by what is there.

    Raises:
        UserError: there is no such source, or it is of another format.
    """
    path, place = Path(source).expanduser(), parse_hub_path(source)
    if place is not None and (source.startswith("hf://") or not _is_file_name(source)):
        return open_repository(place, config)
    if is_embeddings(path) and format is None:
        return open_embeddings(path, config)
    if path.is_dir():
        return _open_folder(_rows_in(path), config, format)
    if not path.is_file() and not is_pattern(source):
        raise UserError(f"no such file or folder.{_similar(path)} {SOURCES}")
    if config is not None:
        raise UserError(f"`config_name={config}`: single files have no configurations.")
    return _open_files([path] if path.is_file() else find_files(source), format)


def _is_file_name(source: str) -> bool:
    """Whether what has the form owner/name looks like the path of a file."""
    return loader_of(source) is not None or source.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _similar(path: Path) -> str:
    """What else there is that was perhaps meant."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _rows_in(folder: Path) -> Path:
    """Folder to read; of an audit its scored rows, which it also holds as kept and removed."""
    audit = AuditFolder(folder)
    if audit.has_rows and audit.has_summary:
        return audit.scored
    if audit.is_cleaning:
        raise UserError("this is a cleaning's folder. Name its folder kept, or removed.")
    return folder


def _open_files(files: Sequence[Path], format: RowFormat | None) -> Splits:
    """Splits of files that were named, all of one kind."""
    if all(file.suffix.lower() == ".zip" for file in files) and format is None:
        names = by_split(files, files[0].parent)
        return build(str(files[0].parent.resolve()), data_files=names)
    loaders = list(dict.fromkeys(format or _loader(file) for file in files))
    if len(loaders) > 1:
        raise UserError(
            f"the files are of several kinds: {', '.join(loaders)}. Name those of one kind."
        )
    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    if len(files) == 1:
        root = files[0].absolute().parent
    return _build(loaders[0], [file.absolute() for file in files], root)


def _loader(file: Path) -> str:
    name = file.name.lower()
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    loader = loader_of(file)
    if loader is None:
        raise UserError(
            f"{file.name} is no table and no tar. A single file must be parquet, arrow, csv, tsv, "
            "JSON lines or a tar; `format` names what it is, where its name does not."
        )
    return loader


def _open_folder(folder: Path, config: str | None, format: RowFormat | None) -> Splits:
    there = _Folder(folder)
    kind = format or there.guess()
    if config is not None and kind is not None:
        raise UserError(f"`config_name={config}`: there are no configurations in this folder.")
    if kind is None:
        # Resolved, since "csv" and the like are also names of loaders.
        return build(str(folder.resolve()), config, bases=there.bases)
    if kind == "saved":
        return open_saved(folder)
    if kind == "sidecars":
        return open_sidecars(folder)
    if kind == "imagefolder":
        return build(kind, data_dir=str(folder.resolve()))
    files = there.of_kind(kind)
    if not files:
        raise UserError(f"`format={kind}`: there are no such files in the folder.")
    return _build(kind, files, folder)


def _build(kind: str, files: Sequence[Path], root: Path) -> Splits:
    if kind in ("saved", "sidecars", "imagefolder"):
        raise UserError(f"`format={kind}` is of folders. Name the folder.")
    if kind == "csv":
        return _open_csv(files, root)
    if kind == "json" and all(map(is_coco, files)):
        # Annotations lie in a folder of their own, and pictures in others beside it.
        return open_coco(files, root, [*_bases(files, root), *_bases((), root.parent)])
    if kind == "webdataset":
        require_whole(files)
        return build_files(kind, files, root)
    return build_files(kind, files, root, bases=_bases(files, root))


def _open_csv(files: Sequence[Path], root: Path) -> Tables:
    """Splits of tables, each of which may be written in its own way."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.relative_to(root)), []).append(file)

    def load(split: str) -> Dataset:
        parts = []
        for file in splits[split]:
            require_header(file)
            part = build_files("csv", [file], file.parent, **csv_options(file))
            if not any(part.sizes.values()):
                raise UserError(f"the table {file.name} has no rows.")
            parts.append(part.open(next(iter(part.names))))
        rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
        # As `datasets` calls the column, where it reads such a table itself.
        is_metadata = all(file.name in METADATA for file in splits[split])
        if is_metadata and "file_name" in rows.column_names and "image" not in rows.column_names:
            rows = rows.rename_column("file_name", "image")
        return rows

    states = "".join(f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files)
    sizes = {split: len(of_split) for split, of_split in splits.items()}
    return Tables("csv", sizes, load, states.encode(), _bases(files, root))


def _bases(files: Sequence[Path], root: Path) -> list[Path]:
    """Folders that the paths in tables may be relative to, the likeliest first.

    These are the folders of the tables, the one above all, those in it, and the present one.
    """
    own = list(dict.fromkeys(file.absolute().parent for file in files))
    return list(dict.fromkeys([*own[:1000], root.absolute(), *_folders_in(root), Path.cwd()]))


def _folders_in(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.absolute().iterdir() if path.is_dir())[:100]
    except OSError:  # one that may not be listed
        return []


@dataclass(frozen=True)
class _Folder:
    """A folder, and what its files are.

    Attributes:
        path: of the folder.
    """

    path: Path

    def guess(self) -> str | None:
        """Format of the files; None for what `datasets` makes of them."""
        if is_saved(self.path):
            return "saved"
        if self._declares_configs:
            return None
        if self.of_name(METADATA):
            return None if all(map(_is_plain, self.of_name(METADATA[:1]))) else "csv"
        if self._is_of_tars:
            return "webdataset"
        if self._has_pictures and has_sidecars(self.path):
            return "sidecars"
        kinds = {loader_of(file) for file in self.files} - {None}
        is_shouted = any(file.suffix.isupper() for file in self.files if loader_of(file))
        if kinds == {"csv"} or ((self._has_pictures or is_shouted) and len(kinds) == 1):
            return next(iter(kinds))
        return None

    @cached_property
    def files(self) -> list[Path]:
        """All files in it and below, in order; hidden ones are left out."""
        return sorted(self._walk())

    def of_kind(self, kind: str) -> list[Path]:
        """Files of a format; of csv, the metadata alone, where there are any."""
        if kind == "webdataset":
            return [file for file in self.files if file.suffix.lower() == ".tar"]
        tables = [file for file in self.files if loader_of(file) == kind]
        return [file for file in tables if file.name in METADATA] or tables

    def of_name(self, names: Sequence[str]) -> list[Path]:
        """Files with one of these names."""
        return [file for file in self.files if file.name in names]

    @property
    def bases(self) -> list[Path]:
        """See `Splits`."""
        return _bases([file for file in self.files if loader_of(file)], self.path)

    @cached_property
    def _has_pictures(self) -> bool:
        return any(file.suffix.lower() in PICTURES for file in self.files)

    @property
    def _is_of_tars(self) -> bool:
        """Whether its tables, if there are any, only tell of its tars, as img2dataset's do."""
        tars = {file.with_suffix("") for file in self.files if file.suffix.lower() == ".tar"}
        tables = (file for file in self.files if loader_of(file) in ("parquet", "arrow", "csv"))
        return bool(tars) and all(table.with_suffix("") in tars for table in tables)

    @property
    def _declares_configs(self) -> bool:
        """Whether it says in its README, as a repository of the Hub, what its files are."""
        card = self.path / "README.md"
        if not card.is_file():
            return (self.path / ".huggingface.yaml").is_file()
        parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
        try:
            head = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
        except yaml.YAMLError:
            return False
        return isinstance(head, dict) and "configs" in head

    def _walk(self) -> Iterator[Path]:
        for place, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (Path(place, name) for name in names if not name.startswith("."))


def _is_plain(table: Path) -> bool:
    """Whether `datasets` reads a csv as it stands: with commas, in UTF-8."""
    try:
        options = csv_options(table)
    except UserError:
        return True
    return (options["sep"], options["encoding"]) == (",", "utf-8")
