"""Scores, uids, keys and issues, as those who read such tables find them."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_ecif.data.cleaning import WEIGHT
from hf_ecif.data.columns import set_column
from hf_ecif.data.exports.rows import ExportRows
from hf_ecif.data.exports.targets import FORMATS, write_export
from hf_ecif.errors import UserError
from tests.support.exports import COUNT, FLAGGED, UNREADABLE, table, tars, uid

KEPT = [row for row in range(COUNT) if row not in (*FLAGGED, UNREADABLE)]


def only_kept(rows: ExportRows) -> ExportRows:
    return rows.select(np.flatnonzero(rows.kept))


def weighted(rows: ExportRows, weights: list[float]) -> ExportRows:
    return replace(rows, dataset=set_column(rows.dataset, WEIGHT, weights, "float32"))


class TestParquetIds:
    def test_all_but_the_images(self, tmp_path: Path) -> None:
        rows = table()
        done = write_export(rows, "parquet-ids", tmp_path / "out")
        read = pq.read_table(tmp_path / "out/ids.parquet")
        assert read.column_names == ["ecif_row", "ecif_kept", *rows.names[1:]]
        assert read["ecif_row"].to_pylist() == list(range(COUNT))
        assert read["ecif_kept"].to_pylist() == rows.kept.tolist()
        for name in rows.names[1:]:
            assert read[name].to_pylist() == rows.column(name)
        assert (done.rows, done.notes) == (
            COUNT,
            ["Left out, since they hold images or bytes: image."],
        )

    def test_a_row_as_often_as_its_weight_says(self, tmp_path: Path) -> None:
        rows = replace(weighted(table(), [1, 0, 0.5, 0.1, 0.26, 0.24]), repeats=4)
        write_export(rows, "parquet-ids", tmp_path / "out")
        read = pq.read_table(tmp_path / "out/ids.parquet")["ecif_row"].to_pylist()
        assert read == [0, 0, 0, 0, 2, 2, 4, 5]

    def test_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"'ecif_weight', which they do not have.*strategy=we"):
            write_export(replace(table(), repeats=2), "parquet-ids", tmp_path / "out")


class TestUids:
    def test_sorted_pairs_of_numbers(self, tmp_path: Path) -> None:
        write_export(only_kept(table()), "uids", tmp_path / "out")
        read = np.load(tmp_path / "out/uids.npy")
        assert (read.dtype, read.shape) == (np.dtype("u8,u8"), (len(KEPT),))
        assert [f"{high:016x}{low:016x}" for high, low in read] == sorted(map(uid, KEPT))

    def test_of_the_json_in_tars(self, tmp_path: Path) -> None:
        write_export(only_kept(tars(tmp_path / "tars")), "uids", tmp_path / "out")
        read = np.load(tmp_path / "out/uids.npy")
        assert [f"{high:016x}{low:016x}" for high, low in read] == sorted(map(uid, KEPT))

    def test_found_as_their_reader_finds_them(self, tmp_path: Path) -> None:
        """By binary search; as many as there are between both ends are written."""
        rows = replace(weighted(table(), [1, 0, 0.5, 0, 0, 0]), repeats=2)
        write_export(rows, "uids", tmp_path / "out")
        read = np.load(tmp_path / "out/uids.npy", mmap_mode="r")

        def copies(row: int) -> int:
            name = uid(row)
            wanted = np.array([(int(name[:16], 16), int(name[16:], 16))], read.dtype)[0]
            ends = (np.searchsorted(read, wanted, side) for side in ("right", "left"))
            return int(next(ends) - next(ends))

        assert [copies(row) for row in range(COUNT)] == [2, 0, 1, 0, 0, 0]

    def test_equal_ones_stand_once(self, tmp_path: Path) -> None:
        rows = table()
        same = replace(rows, dataset=set_column(rows.dataset, "uid", [uid(0)] * COUNT))
        done = write_export(same, "uids", tmp_path / "out")
        assert (done.rows, len(np.load(tmp_path / "out/uids.npy"))) == (1, 1)
        assert done.notes == ["5 rows have the uid of another one, which is written once."]

    def test_what_is_none(self, tmp_path: Path) -> None:
        rows = replace(table(), id_column="text")
        with pytest.raises(UserError, match=r"^Row 0: text = 'caption 0' is no uid.*`id_column`"):
            write_export(rows, "uids", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(UserError, match=r"no column 'id'.*are: image, text, uid, about"):
            write_export(replace(table(), id_column="id"), "uids", tmp_path / "out")


class TestKeys:
    def test_a_list_for_each_tar(self, tmp_path: Path) -> None:
        done = write_export(only_kept(tars(tmp_path / "tars")), "keys", tmp_path / "out")
        assert done.files == ["00000.txt", "00001.txt"]
        read = [(tmp_path / "out" / name).read_text().split() for name in done.files]
        assert read == [["000000000", "000000002"], ["000010002"]]

    def test_tars_of_one_name(self, tmp_path: Path) -> None:
        rows = tars(tmp_path / "tars")
        urls = [f"/data/{'ab'[row % 2]}/00000.tar" for row in range(COUNT)]
        done = write_export(
            replace(rows, dataset=set_column(rows.dataset, "__url__", urls)),
            "keys",
            tmp_path / "out",
        )
        assert done.files == ["a/00000.txt", "b/00000.txt"]

    @pytest.mark.parametrize("url", ["../../../evil.tar", "/etc/..", "", "hf://x/../..//"])
    def test_no_name_leads_out_of_the_folder(self, tmp_path: Path, url: str) -> None:
        rows = tars(tmp_path / "tars")
        urls = [url, *["/data/../../b/00000.tar", "/data/00000.tar"] * 3][:COUNT]
        rows = replace(rows, dataset=set_column(rows.dataset, "__url__", urls))
        done = write_export(rows, "keys", tmp_path / "deep/out")
        inside = set((tmp_path / "deep/out").rglob("*.txt"))
        assert len(inside) == len(done.files) == 3
        assert {*tmp_path.rglob("*.txt")} == inside

    def test_of_a_table(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"not read from tars. Export parquet-ids, or uids"):
            write_export(table(), "keys", tmp_path / "out")


def test_issues_of_cleanlab(tmp_path: Path) -> None:
    write_export(table(), "cleanlab", tmp_path / "out")
    with (tmp_path / "out/issues.csv").open(newline="", encoding="utf-8") as file:
        issues = list(csv.DictReader(file))
    by_row = {int(issue["row"]): issue for issue in issues}
    assert [row for row in by_row if by_row[row]["is_mismatch_issue"] == "True"] == [*FLAGGED]
    assert [row for row in by_row if by_row[row]["is_unreadable_issue"] == "True"] == [UNREADABLE]
    assert float(by_row[1]["mismatch_score"]) == pytest.approx(0.1)
    assert by_row[1]["predicted_label"] == "a better one"
    assert by_row[0]["predicted_label"] == by_row[0]["given_label"] == "caption 0"
    compile((tmp_path / "out/open.py").read_text(), "open.py", "exec")


@pytest.mark.parametrize("to", [name for name, one in FORMATS.items() if not one.repeats])
def test_tools_that_show_a_row_once(tmp_path: Path, to: str) -> None:
    with pytest.raises(UserError, match=rf"`repeats=2`: {to} has each row once.*parquet-ids, uids"):
        write_export(replace(table(), repeats=2), to, tmp_path / "out")
