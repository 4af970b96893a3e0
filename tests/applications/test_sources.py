"""Data and query of every kind become pairs in columns of the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import datasets.config
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from hf_ecif.applications import given
from hf_ecif.applications.given import open_given
from hf_ecif.applications.requests import Sources
from hf_ecif.applications.sources import Opened, open_beside, open_sources
from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from tests.support import formats
from tests.support.formats import CAPTIONS, COLOURS, PLACES, rows


@pytest.fixture(autouse=True)
def _no_model(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows alone are looked at here."""
    monkeypatch.setattr(InfluenceModel, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def opened(dataset: Path | str, query: Path | None = None, **options: Any) -> Opened:
    asked = query and str(query)
    sources = Sources(model="m", dataset=str(dataset), query=asked, **options)
    return open_sources(sources, InfluenceConfig())


def in_memory(dataset: Any, query: Any = None, **options: Any) -> Opened:
    return open_given("m", dataset, query, **options).opened


def save(folder: Path, **splits: Dataset) -> Path:
    DatasetDict(splits).save_to_disk(folder)
    return folder


def query_of(found: Opened) -> Mapping[str, Any]:
    assert found.query_set is not None
    return cast(Mapping[str, Any], found.query_set[:])


class TestQuery:
    def test_other_names_are_found_and_become_those_of_the_data(self, tmp_path: Path) -> None:
        renamed = rows().rename_columns({"image": "photo", "text": "sentence"})
        query = save(tmp_path / "query", validation=renamed)
        found = opened(PLACES["csv_of_open_clip"](tmp_path / "data"), query)
        assert found.sources.columns == ("filepath", "title")
        assert query_of(found)["title"] == CAPTIONS
        assert found.query_columns is not None
        assert found.query_columns.names == ("photo", "sentence")

    def test_they_can_be_given(self, tmp_path: Path) -> None:
        renamed = rows(text=CAPTIONS[::-1], other=CAPTIONS)
        query = save(tmp_path / "query", validation=renamed.rename_column("image", "photo"))
        found = opened(
            save(tmp_path / "data", train=rows()),
            query,
            query_image_column="photo",
            query_text_column="other",
        )
        assert query_of(found)["text"] == CAPTIONS
        assert query_of(found)["other"] == CAPTIONS[::-1]  # has made place
        with pytest.raises(
            UserError, match=r"`query=.*`: There is no text column 'x'.*`query_text"
        ):
            opened(tmp_path / "data", query, query_text_column="x")

    def test_the_only_split_is_meant_and_told_of(self, tmp_path: Path) -> None:
        rows().to_parquet(tmp_path / "q.parquet")
        found = opened(save(tmp_path / "data", test=rows()), tmp_path / "q.parquet")
        assert (found.sources.split, found.sources.query_split) == ("test", "train")

    def test_options_of_a_query_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="`query_split=test` means nothing without `query`"):
            opened(tmp_path, query_split="test")


class TestWhoseFault:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        return save(tmp_path / "data", train=rows(), extra=rows())

    def test_of_the_data(self, data: Path) -> None:
        with pytest.raises(UserError, match=r"`dataset=.*`: there is no split 'dev'"):
            opened(data, split="dev")
        with pytest.raises(UserError, match=r"`dataset=.*`: There is no image column 'photo'"):
            opened(data, image_column="photo")

    def test_of_the_query(self, data: Path) -> None:
        with pytest.raises(UserError, match=r"`query=.*`: there are several splits"):
            opened(data, data)

    def test_of_a_test(self, data: Path) -> None:
        found = opened(data)
        with pytest.raises(UserError, match=r"`test=.*`: there is no split 'dev'"):
            open_beside(found, "test", str(data), "dev", "test")

    def test_in_memory(self) -> None:
        with pytest.raises(UserError, match=r"^`dataset`: There is no image column 'photo'"):
            in_memory(rows(), image_column="photo")
        with pytest.raises(UserError, match=r"^`query`: There are no columns .* texts"):
            in_memory(rows(), rows().remove_columns("text"))


class TestClasses:
    def test_a_query_of_classes_gets_the_sentence_and_one_of_captions_does_not(self) -> None:
        for query, expected in (
            (formats.classes(), [f"a {colour} one" for colour in COLOURS]),
            (rows(), CAPTIONS),
        ):
            found = in_memory(formats.classes(), query, template="a {} one")
            assert query_of(found)["ecif_caption"] == expected
        assert isinstance(found.original.features["label"], ClassLabel)
        assert found.reading.text == "label"
        assert found.reading.template == "a {} one"


class TestParts:
    def test_the_first_rows_and_rows_at_random(self, tmp_path: Path) -> None:
        data = save(tmp_path / "data", train=rows(text=[f"{n}" for n in range(40)]))
        assert opened(data, limit=3).dataset["text"][:] == ["0", "1", "2"]
        drawn = opened(data, limit=20, sample=5).dataset["text"][:]
        assert drawn == sorted(drawn, key=int)
        assert len(set(drawn)) == 5
        assert max(map(int, drawn)) < 20
        assert opened(data, limit=20, sample=5).dataset["text"][:] == drawn
        other = open_sources(
            Sources(model="m", dataset=str(data), limit=20, sample=5), InfluenceConfig(seed=1)
        )
        assert other.dataset["text"][:] != drawn
        assert opened(data, limit=100, sample=100).dataset.num_rows == 40

    def test_a_run_is_not_gone_on_with_by_others(self, tmp_path: Path) -> None:
        data = save(tmp_path / "data", train=rows())
        manifests = [
            opened(data, **options).manifest()
            for options in ({}, {"limit": 3}, {"sample": 3}, {"template": "a {}"})
        ]
        assert all(manifests.count(one) == 1 for one in manifests)

    def test_of_splits_in_memory(self) -> None:
        splits = DatasetDict(train=rows(), test=rows())
        assert len(in_memory(splits, split="train[:2]+test").dataset) == 8
        with pytest.raises(UserError, match=r"`split=train\[:x\]`: there is no part"):
            in_memory(splits, split="train[:x]")

    def test_of_a_stream(self) -> None:
        stream = rows().to_iterable_dataset()
        found = open_given("m", stream, limit=4)
        assert (len(found.opened.dataset), found.notes) == (4, ())
        cut = open_given("m", stream, max_rows=4)
        assert "more rows than the first 4" in cut.notes[0]


class TestLists:
    def test_a_pair_for_every_caption(self) -> None:
        lists = [["a", "b"], ["c"]]
        found = in_memory(formats.with_lists(lists), formats.with_lists(lists))
        assert found.dataset["captions"][:] == ["a", "b", "c"]
        assert query_of(found)["captions"] == ["a", "b", "c"]


def test_rows_in_memory_keep_their_format() -> None:
    formatted = rows().with_format("numpy")
    assert in_memory(formatted).original.format["type"] == "numpy"
    assert given.MOST_STREAMED == 10_000
