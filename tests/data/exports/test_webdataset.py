"""Tars: every byte of those that rows are from, and what `datasets` and `webdataset` read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image, load_dataset

from hf_ecif.data.cleaning import ORIGINAL_TEXT, WEIGHT
from hf_ecif.data.columns import set_column
from hf_ecif.data.exports.rows import ExportRows
from hf_ecif.data.exports.targets import write_export
from tests.support.exports import COUNT, UNREADABLE, picture, read_tar, table, tars


def load(folder: Path) -> Dataset:
    files = sorted(map(str, folder.rglob("*.tar")))
    rows = load_dataset(
        "webdataset", data_files=files, split="train", cache_dir=str(folder.parent / "cache2")
    )
    images = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    return rows


def with_column(rows: ExportRows, name: str, values: list, kind: str = "") -> ExportRows:
    return replace(rows, dataset=set_column(rows.dataset, name, values, kind))


class TestFromTars:
    def test_kept_keys_byte_for_byte(self, tmp_path: Path) -> None:
        rows = tars(tmp_path / "tars")
        done = write_export(rows.select(np.flatnonzero(rows.kept)), "webdataset", tmp_path / "out")
        assert done.files == ["00000.tar", "00001.tar"]
        for name, keys in (("00000", ["000000000", "000000002"]), ("00001", ["000010002"])):
            before, after = (
                read_tar(tmp_path / place / f"{name}.tar") for place in ("tars", "out")
            )
            assert list(after) == [n for n in before if n.partition(".")[0] in keys]
            assert all(after[member] == before[member] for member in after)

    def test_members_that_no_column_had(self, tmp_path: Path) -> None:
        """`datasets` drops what the first samples of a tar do not have."""
        rows = tars(tmp_path / "tars")
        rows = replace(rows, dataset=rows.dataset.remove_columns("json"))
        write_export(rows, "webdataset", tmp_path / "out")
        assert read_tar(tmp_path / "out/00000.tar") == read_tar(tmp_path / "tars/00000.tar")

    def test_new_captions(self, tmp_path: Path) -> None:
        rows = tars(tmp_path / "tars")
        rows = with_column(rows, ORIGINAL_TEXT, [None, "caption 1", *[None] * 4], "string")
        rows = with_column(rows, "txt", ["caption 0", "éin neuer", *["x"] * 4])
        write_export(rows, "webdataset", tmp_path / "out")
        before, after = (read_tar(tmp_path / place / "00000.tar") for place in ("tars", "out"))
        assert after["000000001.txt"].decode() == "éin neuer"
        assert after | {"000000001.txt": b""} == before | {"000000001.txt": b""}

    def test_tars_that_are_gone_are_made_of_the_columns(self, tmp_path: Path) -> None:
        rows = tars(tmp_path / "tars")
        before = {n: c for i in (0, 1) for n, c in read_tar(tmp_path / f"tars/{i:05d}.tar").items()}
        for path in (tmp_path / "tars").iterdir():
            path.unlink()
        write_export(rows, "webdataset", tmp_path / "out")
        after = {n: c for i in (0, 1) for n, c in read_tar(tmp_path / f"out/{i:05d}.tar").items()}
        assert set(after) == set(before)
        for name, content in before.items():
            assert after[name] == content or json.loads(after[name]) == json.loads(content)

    def test_copies_have_keys_of_their_own(self, tmp_path: Path) -> None:
        rows = with_column(tars(tmp_path / "tars"), WEIGHT, [1.0, 0.5, 0, 0, 0, 0], "float32")
        done = write_export(replace(rows, repeats=2), "webdataset", tmp_path / "out")
        read = load(tmp_path / "out")
        assert done.rows == len(read) == 3
        assert read["__key__"][:] == ["000000000", "000000000-1", "000000001"]
        assert read["ecif_weight.txt"][:] == ["1.0", "1.0", "0.5"]


class TestFromATable:
    def test_read_by_datasets(self, tmp_path: Path) -> None:
        rows = table()
        rows = rows.select(np.array([row for row in range(COUNT) if row != UNREADABLE]))
        write_export(rows, "webdataset", tmp_path / "out")
        read = load(tmp_path / "out")
        assert read.column_names == ["png", "txt", "json", "__key__", "__url__"]
        assert [cell["bytes"] for cell in read["png"]] == [
            cell["bytes"] for cell in rows.column("image")
        ]
        assert read["txt"][:] == rows.column("text")
        assert [about["uid"] for about in read["json"]] == rows.column("uid")
        assert read["json"][0]["about"]["size"] == [0, 2]
        assert not any(name.startswith("ecif_") for name in read["json"][0])

    def test_one_field_for_pictures_of_all_kinds(self, tmp_path: Path) -> None:
        """Readers take the fields of the first samples for those of all."""
        rows = table(("PNG", "JPEG"))
        write_export(rows.select(np.flatnonzero(rows.kept)), "webdataset", tmp_path / "out")
        read = load(tmp_path / "out").cast_column("jpg", Image())
        assert {image.size for image in read["jpg"]} == {(7, 9)}

    def test_what_is_no_image_stays(self, tmp_path: Path) -> None:
        write_export(table(), "webdataset", tmp_path / "out")
        assert read_tar(tmp_path / "out/00000.tar")[f"{UNREADABLE:09d}.png"] == b"no image"

    def test_a_second_image_and_missing_values(self, tmp_path: Path) -> None:
        rows = table()
        masks = [None, *({"bytes": picture(row, "BMP"), "path": None} for row in range(1, COUNT))]
        dataset = rows.dataset.add_column("mask.b", masks).cast_column(
            "mask.b", Image(decode=False)
        )
        texts = [None, *rows.column("text")[1:]]
        rows = replace(rows, dataset=set_column(dataset, "text", texts))
        write_export(rows, "webdataset", tmp_path / "out")
        read = read_tar(tmp_path / "out/00000.tar")
        assert "000000000.txt" not in read
        assert "000000000.mask_b.png" not in read
        assert read["000000001.mask_b.png"] == picture(1, "BMP")


def test_by_webdataset_itself(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    rows = table()
    write_export(rows.select(np.flatnonzero(rows.kept)), "webdataset", tmp_path / "out")
    files = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    read = list(wds.WebDataset(files, shardshuffle=False).decode())
    assert [sample["txt"] for sample in read] == ["caption 0", "caption 2", "caption 5"]
    assert [sample["png"] for sample in read] == [picture(row) for row in (0, 2, 5)]
