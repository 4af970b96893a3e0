"""Captions in lists: apart and together again without a loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ecif.data.columns import set_column
from hf_ecif.data.lists import count_pairs_of, explode, fold, unfold
from hf_ecif.data.loading import load_rows
from hf_ecif.data.pairs import PairOptions, make_pairs
from hf_ecif.data.parquet import parquet_files, write_shards
from tests.support.formats import picture, with_lists

LISTS = [["a", "b"], ["c"], [], None, [None, "d"], ["e"]]
FLAT = ["a", "b", "c", None, None, None, "d", "e"]
HARD = st.lists(st.none() | st.lists(st.none() | st.text(max_size=3), max_size=3), min_size=1)


def scored(lists: list[list[str | None] | None] = LISTS) -> Dataset:
    """Captions apart, with influence columns that tell their number."""
    flat = explode(with_lists(lists), "captions")
    numbers = list(range(len(flat)))
    flat = set_column(flat, "ecif_score", [float(number) for number in numbers], "float32")
    return set_column(flat, "ecif_reason", [f"{number}" for number in numbers], "string")


def test_a_row_for_every_caption() -> None:
    flat = explode(with_lists(LISTS), "captions")
    assert flat["captions"][:] == FLAT
    assert flat["number"][:] == [0, 0, 1, 2, 3, 4, 4, 5]
    assert flat["ecif_row:captions"][:] == flat["number"][:]
    cells = flat.cast_column("image", Image(decode=False))["image"][:]
    assert [cell["bytes"] for cell in cells] == [picture(n) for n in flat["number"][:]]
    assert flat.column_names[:3] == ["image", "captions", "number"]


def test_together_again() -> None:
    folded = fold(scored())
    assert folded["captions"][:] == LISTS
    assert folded["ecif_score"][:] == [[0, 1], [2], [3], [4], [5, 6], [7]]
    assert folded["number"][:] == list(range(6))
    assert folded.features["captions"] == with_lists(LISTS).features["captions"]
    assert fold(with_lists(LISTS)).column_names == ["image", "captions", "number"]


@given(lists=HARD)
@settings(max_examples=8, deadline=None)
def test_nothing_is_lost(lists: list[list[str | None] | None]) -> None:
    flat = scored(lists)
    folded = fold(flat)
    assert folded["captions"][:] == lists
    apart = unfold(folded)
    assert apart.features == flat.features
    columns = [name for name in flat.column_names if name != "image"]
    assert apart.select_columns(columns)[:] == flat.select_columns(columns)[:]


@pytest.mark.parametrize("kept", [[0, 2, 7], [1], [3, 4, 5, 6], []])
def test_both_parts_have_all_captions(kept: list[int]) -> None:
    flat = scored()
    others = [number for number in range(len(flat)) if number not in kept]
    parts = [fold(flat.select(chosen)) for chosen in (kept, others)]
    found = sorted(
        (row["ecif_row:captions"], place if place is not None else -2, score)
        for part in parts
        for row in part.select_columns(["ecif_row:captions", "ecif_place:captions", "ecif_score"])
        for place, score in zip(row["ecif_place:captions"], row["ecif_score"], strict=True)
    )
    assert [score for *_, score in found] == [float(number) for number in range(8)]
    for part in parts:
        for row in part.select_columns(["captions", "ecif_place:captions"]):
            real = [
                place for place in row["ecif_place:captions"] if place is not None and place >= 0
            ]
            assert len(row["captions"] or []) == len(real)


def test_on_disk(tmp_path: Path) -> None:
    flat = scored()
    write_shards(fold(flat), tmp_path / "scored")
    assert count_pairs_of(parquet_files(tmp_path / "scored")) == len(flat)
    read = load_rows(str(tmp_path / "scored"))
    assert read["captions"][:] == FLAT
    assert read["ecif_score"][:] == flat["ecif_score"][:]
    # And as the source of another run, with the columns of the first left out.
    again = make_pairs(read, PairOptions(text_column="captions"))
    assert again.rows["captions"][:] == FLAT
    assert fold(again.rows)["captions"][:] == LISTS


def test_the_folder_of_the_source_is_left_alone(tmp_path: Path) -> None:
    with_lists(LISTS).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    made = make_pairs(load_rows(str(tmp_path / "saved")), PairOptions())
    assert fold(made.rows)["captions"][:] == LISTS
    assert sorted(tmp_path.rglob("*")) == before
