"""Whatever people have: every form in which pairs lie is found by what is there, and read whole."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from datasets import Dataset, DatasetDict, Image

from hf_ecif.data.images import image_bytes
from hf_ecif.data.loading import Source, find_rows, fingerprint_source, load_rows, stream_rows
from hf_ecif.data.pairs import MadePairs, PairOptions, make_pairs
from hf_ecif.data.readers.patterns import expand_braces
from hf_ecif.data.schema import check_columns
from hf_ecif.errors import UserError
from tests.support import formats
from tests.support.formats import CAPTIONS, PLACES, picture


@pytest.fixture(autouse=True)
def _offline_with_own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pairs(source: Path | str, split: str | None = None, **options: Any) -> MadePairs:
    made = make_pairs(load_rows(str(source), split), PairOptions(**options))
    return made._replace(rows=check_columns(made.rows, *made.columns.names))


def content(made: MadePairs) -> list[tuple[bytes | None, str]]:
    """Images and captions in the order of the captions, whatever the images were encoded as."""
    return sorted(
        (
            (image_bytes(row[made.columns.image]), row[made.columns.text].removesuffix(" é"))
            for row in made.rows
        ),
        key=lambda pair: pair[1],
    )


class TestPlaces:
    @pytest.mark.parametrize("name", PLACES)
    def test_all_pairs_are_read(self, tmp_path: Path, monkeypatch: Any, name: str) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")  # paths are relative to their table
        found = content(pairs(PLACES[name](tmp_path / "pairs")))
        assert [text for _, text in found] == sorted(CAPTIONS)
        encoded = [
            {picture(CAPTIONS.index(text), kind) for kind in ("PNG", "JPEG", "WEBP")}
            for _, text in found
        ]
        assert all(image in known for (image, _), known in zip(found, encoded, strict=True))

    @pytest.mark.parametrize("name", ["one_tar", "tsv", "parquet_folder", "sidecar_txt", "saved"])
    def test_as_a_stream(self, tmp_path: Path, name: str) -> None:
        stream = stream_rows(Source(str(PLACES[name](tmp_path / "pairs"))))
        read = Dataset.from_list(list(stream), features=stream.features)
        made = make_pairs(read, PairOptions())
        assert sorted(made.rows[made.columns.text][:]) == sorted(CAPTIONS)

    @pytest.mark.parametrize("name", ["one_tar", "csv_of_open_clip", "sidecar_txt"])
    def test_the_fingerprint_is_that_of_the_files(self, tmp_path: Path, name: str) -> None:
        source = Source(str(PLACES[name](tmp_path / "pairs")))
        before = fingerprint_source(source)
        assert fingerprint_source(source) == before
        time.sleep(0.01)  # the times of files are coarse
        for path in (tmp_path / "pairs").rglob("*"):
            path.touch()
        assert fingerprint_source(source) != before


class TestTars:
    def test_all_files_of_a_row_are_kept(self, tmp_path: Path) -> None:
        rows = load_rows(str(PLACES["one_tar"](tmp_path)))
        assert rows.column_names == ["jpg", "txt", "json", "__key__", "__url__"]
        assert rows[2]["__key__"] == "000000002"
        assert '"status": "success"' in rows[2]["json"]
        assert check_columns(rows, "jpg", "txt")[2]["jpg"]["path"] == "000000002.jpg"

    def test_a_row_without_a_caption_or_an_image(self, tmp_path: Path) -> None:
        files = formats.shard(range(6))
        del files["000000001.txt"], files["000000004.jpg"]
        formats.write_tar(tmp_path / "x.tar", files)
        rows = check_columns(load_rows(str(tmp_path)), "jpg", "txt")
        assert len(rows) == 6
        assert rows[1]["txt"] is None
        assert rows[4]["jpg"] is None

    def test_two_images_in_a_row_stay_two(self, tmp_path: Path) -> None:
        files = {}
        for number in range(3):
            files[f"{number}.jpg"] = picture(number, "JPEG")
            files[f"{number}.png"] = picture(number)
        formats.write_tar(tmp_path / "x.tar", files)
        rows = load_rows(str(tmp_path))
        assert isinstance(rows.features["png"], Image)
        assert check_columns(rows.add_column("t", ["a"] * 3), "png", "t")[1]["png"]["bytes"] == (
            picture(1)
        )

    def test_an_empty_tar_beside_others(self, tmp_path: Path) -> None:
        formats.write_tar(tmp_path / "a.tar", {})
        formats.write_tar(tmp_path / "b.tar", formats.shard(range(6)))
        assert len(load_rows(str(tmp_path))) == 6

    def test_nothing_but_an_empty_tar(self, tmp_path: Path) -> None:
        formats.write_tar(tmp_path / "a.tar", {})
        with pytest.raises(UserError, match="no file in the tars"):
            load_rows(str(tmp_path / "a.tar"))

    def test_a_damaged_tar_is_named(self, tmp_path: Path) -> None:
        formats.write_tar(tmp_path / "a.tar", formats.shard(range(6)))
        whole = (tmp_path / "a.tar").read_bytes()
        (tmp_path / "a.tar").write_bytes(whole[:2000])
        with pytest.raises(UserError, match=r"a\.tar is damaged"):
            load_rows(str(tmp_path))

    def test_captions_in_latin_1(self, tmp_path: Path) -> None:
        formats.write_tar(tmp_path / "x.tar", {"0.png": picture(0), "0.txt": "é".encode("latin-1")})
        assert load_rows(str(tmp_path))["txt"][:] == ["é"]

    @pytest.mark.parametrize("name", ["img.{}.v2", "v1.{}"])
    def test_dots_in_names(self, tmp_path: Path, name: str) -> None:
        files = {}
        for number, text in enumerate(CAPTIONS):
            files[f"{name.format(number)}.png"] = picture(number)
            files[f"{name.format(number)}.txt"] = text.encode()
        formats.write_tar(tmp_path / "x.tar", files)
        rows = load_rows(str(tmp_path))
        assert rows["txt"][:] == CAPTIONS
        assert rows["__key__"][:] == [name.format(number) for number in range(6)]

    def test_files_of_a_row_apart(self, tmp_path: Path) -> None:
        files = formats.shard(range(6))
        apart = sorted(files, key=lambda name: name.rpartition(".")[2])
        formats.write_tar(tmp_path / "x.tar", {name: files[name] for name in apart})
        with pytest.raises(UserError, match="do not follow each other"):
            load_rows(str(tmp_path))

    def test_splits_by_folders(self, tmp_path: Path) -> None:
        formats.write_tar(tmp_path / "train/0.tar", formats.shard(range(4)))
        formats.write_tar(tmp_path / "val/0.tar", formats.shard(range(4, 6)))
        assert len(load_rows(str(tmp_path))) == 4
        assert len(load_rows(str(tmp_path), "validation")) == 2

    def test_of_other_files_one_is_told(self, tmp_path: Path, caplog: Any) -> None:
        files = {f"{n:02d}.png": picture(n) for n in range(30)} | {"29.mask": b"x"}
        formats.write_tar(tmp_path / "x.tar", files)
        with caplog.at_level(logging.WARNING, logger="hf_ecif"):
            assert len(load_rows(str(tmp_path))) == 30
        assert "has mask, which the first rows" in caplog.text


class TestPatterns:
    def test_braces(self) -> None:
        assert list(expand_braces("{9..11}{a,b}")) == ["9a", "9b", "10a", "10b", "11a", "11b"]
        assert list(expand_braces("s-{000..002}.tar")) == ["s-000.tar", "s-001.tar", "s-002.tar"]
        assert list(expand_braces("plain")) == ["plain"]

    def test_missing_files_are_counted_and_named(self, tmp_path: Path) -> None:
        formats.img2dataset(tmp_path)
        with pytest.raises(UserError, match=r"2 of 4 files do not exist: .*00002\.tar"):
            load_rows(f"{tmp_path}/{{00000..00003}}.tar")
        with pytest.raises(UserError, match="no file is called like this"):
            load_rows(f"{tmp_path}/*.jpg")

    @pytest.mark.parametrize("source", ["pipe:curl x::b.tar", "s3://bucket/{0..1}.tar"])
    def test_commands_and_addresses_are_refused(self, source: str) -> None:
        with pytest.raises(UserError, match=r"never run|addresses \(s3:\) are not read"):
            load_rows(source)

    def test_a_folder_may_be_called_like_a_pattern(self, tmp_path: Path) -> None:
        formats.img2dataset(tmp_path / "a[1]{2}")
        assert len(load_rows(str(tmp_path / "a[1]{2}"))) == 6
        assert len(load_rows(str(tmp_path / "a[1]{2}" / "00000.tar"))) == 3

    def test_files_of_several_kinds(self, tmp_path: Path) -> None:
        formats.img2dataset(tmp_path)
        with pytest.raises(UserError, match="several kinds: webdataset, parquet"):
            load_rows(f"{tmp_path}/00000.{{tar,parquet}}")


class TestTables:
    def test_quoted_separators_and_lines(self, tmp_path: Path) -> None:
        captions = ['a, "b"', "c\nd", "e;f\tg", "None", "NA", "null"]
        for separator in ",;\t":
            path = formats.table(
                tmp_path / str(ord(separator)), separator=separator, captions=captions
            )
            assert load_rows(str(path))["title"][:] == captions

    def test_quotes_that_never_close(self, tmp_path: Path) -> None:
        formats.pictures(tmp_path, ["0.png", "1.png"])
        (tmp_path / "train.tsv").write_text('filepath\ttitle\n0.png\t"5 inch\n1.png\ta 7" disc\n')
        assert load_rows(str(tmp_path / "train.tsv"))["title"][:] == ['"5 inch', 'a 7" disc']

    def test_a_missing_picture_is_a_row_all_the_same(self, tmp_path: Path) -> None:
        path = formats.table(tmp_path)
        (tmp_path / "images/2.png").unlink()
        made = pairs(path)
        assert len(made.rows) == 6
        assert image_bytes(made.rows[2][made.columns.image]) is None

    def test_tables_in_several_folders(self, tmp_path: Path) -> None:
        formats.table(tmp_path / "a")
        formats.table(tmp_path / "b", separator=";", encoding="utf-16")
        made = pairs(tmp_path)
        images = [image_bytes(row[made.columns.image]) for row in made.rows]
        assert len(images) == 12
        assert None not in images

    def test_an_empty_table(self, tmp_path: Path) -> None:
        (tmp_path / "train.csv").write_text("\n")
        with pytest.raises(UserError, match="the table is empty"):
            load_rows(str(tmp_path / "train.csv"))

    def test_without_a_header_no_row_is_lost(self, tmp_path: Path) -> None:
        names = formats.pictures(tmp_path)
        lines = [f'{name},"{text}"' for name, text in zip(names, CAPTIONS, strict=True)]
        (tmp_path / "train.csv").write_text("\n".join(lines))
        with pytest.raises(UserError, match=r"first line of train\.csv must name the columns"):
            load_rows(str(tmp_path / "train.csv"))

    def test_a_header_alone(self, tmp_path: Path) -> None:
        (tmp_path / "train.csv").write_text("image,text\n")
        with pytest.raises(UserError, match=r"train\.csv has no rows"):
            load_rows(str(tmp_path / "train.csv"))

    def test_other_columns_of_paths_stay_text(self, tmp_path: Path) -> None:
        names = formats.pictures(tmp_path)
        formats.parquet(tmp_path, names, text=CAPTIONS, mask=names)
        rows = load_rows(str(tmp_path))
        assert isinstance(rows.features["image"], Image)
        assert rows["mask"][:] == names


class TestSidecars:
    def test_suffixes_names_and_pictures_alone(self, tmp_path: Path) -> None:
        names = ["A b.PNG", "ü/1.JPG", "2.webp", "3.png"]
        formats.pictures(tmp_path, names)
        for name, suffix in zip(names[:3], (".TXT", ".caption", ".txt"), strict=True):
            (tmp_path / name).with_suffix(suffix).write_text(f"caption of {name}\n")
        rows = load_rows(str(tmp_path))
        told = dict(zip(rows["file_name"][:], rows["text"][:], strict=True))
        assert told == {name: f"caption of {name}" for name in names[:3]} | {"3.png": None}


class TestCells:
    def test_what_else_a_struct_holds_becomes_a_column(self, tmp_path: Path) -> None:
        made = pairs(PLACES["structs_with_another_key"](tmp_path))
        assert made.rows["image.width"][:] == [4] * 6

    def test_addresses(self, tmp_path: Path) -> None:
        addresses = [f"https://example.com/{n}.jpg" for n in range(6)]
        with pytest.raises(UserError, match=r"holds addresses, such as .*img2dataset"):
            pairs(formats.parquet(tmp_path / "named", addresses))
        formats.parquet(tmp_path / "found", [None] * 6, url=addresses, caption=CAPTIONS)
        with pytest.raises(UserError, match=r"'url' holds addresses"):
            pairs(tmp_path / "found")

    def test_base64_in_a_column_of_any_name(self, tmp_path: Path) -> None:
        texts = [formats.in_base64(number) for number in range(6)]
        formats.parquet(tmp_path, texts, words=CAPTIONS)
        rows = load_rows(str(tmp_path)).rename_column("image", "blob")
        assert make_pairs(rows, PairOptions()).columns.names == ("blob", "words")

    def test_text_that_is_no_base64_is_kept(self, tmp_path: Path) -> None:
        texts = [formats.in_base64(0), "no picture", None, *map(formats.in_base64, (3, 4, 5))]
        made = pairs(formats.parquet(tmp_path, texts))
        images = [image_bytes(row["image"]) for row in made.rows]
        assert images == [picture(0), b"no picture", None, *map(picture, (3, 4, 5))]

    def test_nested(self, tmp_path: Path) -> None:
        nested = [
            {"image": cell, "about": {"text": text}}
            for cell, text in zip(formats.cells(), CAPTIONS, strict=True)
        ]
        Dataset.from_dict({"data": nested}).to_parquet(tmp_path / "train.parquet")
        made = pairs(tmp_path, image_column="data.image", text_column="data.about.text")
        assert content(made) == sorted(
            zip(map(picture, range(6)), CAPTIONS, strict=True), key=lambda pair: pair[1]
        )

    def test_in_json(self, tmp_path: Path) -> None:
        made = pairs(PLACES["one_tar"](tmp_path), text_column="json.caption")
        assert made.rows["json.caption"][:] == CAPTIONS
        assert made.source.text == "json.caption"


def test_paths_in_a_saved_folder_leave_it_as_it_is(tmp_path: Path) -> None:
    names = formats.pictures(tmp_path / "saved")
    Dataset.from_dict({"image": names, "text": CAPTIONS}).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    found = content(pairs(tmp_path / "saved"))
    assert found == sorted(zip(map(picture, range(6)), CAPTIONS, strict=True), key=lambda p: p[1])
    assert sorted(tmp_path.rglob("*")) == before


class TestCoco:
    def test_a_list_of_captions_an_image(self, tmp_path: Path) -> None:
        folder = PLACES["coco"](tmp_path)
        path = tmp_path / "annotations/captions_val2017.json"
        known = json.loads(path.read_text())
        known["annotations"].append({"id": 9, "image_id": 7, "caption": "once more"})
        known["annotations"].pop(0)
        path.write_text(json.dumps(known))
        rows = load_rows(str(folder))
        assert rows["captions"][:3] == [[], [CAPTIONS[1], "once more"], [CAPTIONS[2]]]
        assert rows["image_id"][:2] == ["0", "7"]
        found = find_rows(Source(str(path)))
        assert found.split == "validation"
        cells = found.rows.cast_column("image", Image(decode=False))["image"][:]
        assert all(map(image_bytes, cells))


class TestClasses:
    def test_names_are_captions_and_the_column_stays(self) -> None:
        made = make_pairs(formats.classes(), PairOptions())
        assert made.columns.text == "ecif_caption"
        assert made.rows["ecif_caption"][:] == list(formats.COLOURS)
        assert made.rows.features["label"] == formats.classes().features["label"]

    def test_in_a_sentence(self) -> None:
        rows = formats.rows(kind=[*formats.COLOURS[:4], None, ""])
        for given, options in (
            (formats.classes(), PairOptions(template="a {} one")),
            (rows, PairOptions(text_column="kind", template="a {} one")),
        ):
            captions = make_pairs(given, options).rows["ecif_caption"][:]
            assert captions[:4] == [f"a {colour} one" for colour in formats.COLOURS[:4]]
        assert captions[4:] == [None, ""]  # to be told of as missing and empty

    def test_a_sentence_without_a_place(self) -> None:
        with pytest.raises(UserError, match=r"`template=a photo`: must hold \{\}"):
            PairOptions(template="a photo")


class TestSplits:
    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        saved = {"train": formats.rows(), "test": formats.rows().select(range(2))}
        DatasetDict(saved).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    @pytest.mark.parametrize(
        ("split", "count"),
        [("train[:50%]", 3), ("train[4:]", 2), ("train+test", 8), ("train[-1:]+test[:1]", 2)],
    )
    def test_parts_and_sums(self, source: str, split: str, count: int) -> None:
        assert len(load_rows(source, split)) == count

    def test_parts_of_a_builder(self, tmp_path: Path) -> None:
        formats.rows().to_parquet(tmp_path / "train.parquet")
        assert load_rows(str(tmp_path), "train[1:3]")["text"][:] == CAPTIONS[1:3]

    @pytest.mark.parametrize("split", ["all", "train[:x]", "train[:50%", "train[7:9]", "dev[:1]"])
    def test_what_there_is_not(self, source: str, split: str) -> None:
        with pytest.raises(UserError, match=r"there is no (split|part)|has no rows"):
            load_rows(source, split)

    def test_the_only_split_is_meant(self, tmp_path: Path) -> None:
        formats.rows().to_parquet(tmp_path / "test.parquet")
        found = find_rows(Source(str(tmp_path / "test.parquet"), usual="validation"))
        assert (found.split, len(found.rows)) == ("test", 6)

    def test_one_of_several_must_be_chosen(self, source: str) -> None:
        with pytest.raises(UserError, match=r"several splits\. Choose one of: train, test"):
            find_rows(Source(source, usual="validation"))

    def test_parts_of_a_stream(self, source: str) -> None:
        texts = [row["text"] for row in stream_rows(Source(source, "train[1:3]+test"))]
        assert texts == [*CAPTIONS[1:3], *CAPTIONS[:2]]
        with pytest.raises(UserError, match="depends on the number of rows"):
            stream_rows(Source(source, "train[:50%]"))

    def test_splits_of_other_columns(self, tmp_path: Path) -> None:
        saved = {"train": formats.rows(), "test": formats.rows(text=[1, 2])}
        DatasetDict(saved).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match="have different columns"):
            load_rows(str(tmp_path / "saved"), "train+test")


class TestConfigurations:
    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        for name, part in (("en", range(4)), ("de", range(4, 6))):
            (tmp_path / name).mkdir()
            formats.rows().select(part).to_parquet(tmp_path / name / "train.parquet")
        files = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("en", "de"))
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
        return str(tmp_path)

    def test_one_is_chosen(self, source: str) -> None:
        assert len(load_rows(source, config_name="de")) == 2

    @pytest.mark.parametrize("name", [None, "fr"])
    def test_they_are_listed(self, source: str, name: str | None) -> None:
        with pytest.raises(UserError, match=r"Choose one with `config_name`: en, de\."):
            load_rows(source, config_name=name)

    def test_of_what_has_none(self, tmp_path: Path) -> None:
        path = PLACES["one_tar"](tmp_path)
        for source in (path, tmp_path):
            with pytest.raises(UserError, match="`config_name=en`"):
                load_rows(str(source), config_name="en")


class TestFormats:
    def test_a_name_that_does_not_tell(self, tmp_path: Path) -> None:
        formats.write_tar(tmp_path / "shard.bin", formats.shard(range(6)))
        with pytest.raises(UserError, match="`format` names what it is"):
            load_rows(str(tmp_path / "shard.bin"))
        assert len(load_rows(str(tmp_path / "shard.bin"), format="webdataset")) == 6

    def test_one_of_several_kinds_in_a_folder(self, tmp_path: Path) -> None:
        formats.img2dataset(tmp_path)
        assert load_rows(str(tmp_path), format="parquet").column_names == ["key", "caption", "url"]
        assert find_rows(Source(str(tmp_path))).format == "webdataset"

    def test_a_folder_without_such_files(self, tmp_path: Path) -> None:
        formats.img2dataset(tmp_path)
        with pytest.raises(UserError, match="`format=arrow`: there are no such files"):
            load_rows(str(tmp_path), format="arrow")


class TestWhereNothingIs:
    @pytest.mark.parametrize("name", ["nobody/pairs.tar", "no such.parquet", "a/b/c", "pairs"])
    def test_no_hub_is_asked_for_a_path(self, monkeypatch: Any, tmp_path: Path, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("hf_ecif.data.readers.find.open_repository", None)
        with pytest.raises(UserError, match="no such file or folder"):
            load_rows(name)

    def test_what_was_perhaps_meant(self, tmp_path: Path) -> None:
        formats.img2dataset(tmp_path / "pairs_2024")
        with pytest.raises(UserError, match=r"Did you mean .*pairs_2024\?"):
            load_rows(str(tmp_path / "pairs_2042"))

    def test_a_hub_that_is_not_there_is_asked_once(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        asked = []

        def fail(*_: Any, **__: Any) -> None:
            asked.append(datasets.config.HF_HUB_OFFLINE)
            raise ConnectionError

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
        start = time.perf_counter()
        with pytest.raises(UserError, match="The Hub cannot be reached"):
            load_rows("nobody/nothing")
        assert asked == [False]
        assert time.perf_counter() - start < 10
        assert not datasets.config.HF_HUB_OFFLINE


class TestCache:
    def test_one_that_cannot_be_written(self, tmp_path: Path, monkeypatch: Any) -> None:
        formats.rows().to_parquet(tmp_path / "train.parquet")
        (tmp_path / "cache").write_text("a file where a folder should be")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        with pytest.raises(UserError, match=r"cannot write its copy .* set HF_DATASETS_CACHE"):
            load_rows(str(tmp_path))

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: Any) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        formats.rows().to_parquet(tmp_path / "train.parquet")
        monkeypatch.setattr("datasets.DatasetBuilder.download_and_prepare", full)
        with pytest.raises(UserError, match=r"No space left on device\)\. Make room"):
            load_rows(str(tmp_path))
