import io
import json
import os
import struct
import time
import zlib
from pathlib import Path

import datasets.config
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from hf_ecif.data.images import fingerprint_rows, image_bytes, read_pair
from hf_ecif.data.loading import Source, fingerprint_source, load_rows
from hf_ecif.data.schema import check_columns, drop_influence_columns
from hf_ecif.errors import UserError

LIMIT = 1_000_000


def encode(image: PILImage.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cell(content: bytes | None = None, path: str | None = None) -> dict:
    return {"bytes": content, "path": path}


def png_of_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any number of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


RED = encode(PILImage.new("RGB", (4, 4), "red"))
BLUE = encode(PILImage.new("RGB", (4, 4), "blue"))


def rows(captions: tuple[str, ...] = ("a", "b")) -> Dataset:
    return Dataset.from_dict(
        {"image": [cell(RED), cell(BLUE)], "text": list(captions)},
        features=Features({"image": Image(), "text": Value("string")}),
    )


@pytest.fixture(autouse=True)
def offline_with_own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "0.png").write_bytes(RED)
    (folder / "1.png").write_bytes(BLUE)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,red\n1.png,blue\n")
    return folder


class TestLoadRows:
    def test_saved_dataset_is_train(self, tmp_path):
        rows().save_to_disk(tmp_path / "saved")
        assert load_rows(str(tmp_path / "saved"), "train")["text"][:] == ["a", "b"]

    def test_saved_dict_has_its_splits(self, tmp_path):
        saved = DatasetDict({"train": rows(), "validation": rows(("c", "d"))})
        saved.save_to_disk(tmp_path / "saved")
        assert load_rows(str(tmp_path / "saved"), "validation")["text"][:] == ["c", "d"]

    def test_reading_a_saved_dataset_leaves_the_folder_alone(self, tmp_path):
        columns = {"image": [RED, BLUE], "text": ["a", "b"]}
        Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
        before = sorted(tmp_path.rglob("*"))
        check_columns(load_rows(str(tmp_path / "saved"), "train"), "image", "text")
        assert sorted(tmp_path.rglob("*")) == before

    def test_saved_dataset_knows_its_split(self, tmp_path):
        rows().to_parquet(tmp_path / "test.parquet")
        load_rows(str(tmp_path), "test").save_to_disk(tmp_path / "saved")
        assert load_rows(str(tmp_path / "saved"), "test").num_rows == 2
        with pytest.raises(UserError, match="Choose one of: test"):
            load_rows(str(tmp_path / "saved"), "train")

    def test_parquet_folder_maps_file_names_to_splits(self, tmp_path):
        rows().to_parquet(tmp_path / "train.parquet")
        rows(("c", "d")).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
        assert load_rows(str(tmp_path), "train")["text"][:] == ["a", "b"]
        assert load_rows(str(tmp_path), "validation")["text"][:] == ["c", "d"]

    @pytest.mark.parametrize(
        ("name", "split"),
        [
            ("test.parquet", "test"),
            ("validation-00000-of-00001.parquet", "validation"),
            ("pairs.parquet", "train"),
        ],
    )
    def test_parquet_file(self, tmp_path, name, split):
        rows().to_parquet(tmp_path / name)
        assert load_rows(str(tmp_path / name), split).num_rows == 2

    def test_folder_named_like_a_loader(self, tmp_path, monkeypatch):
        (tmp_path / "imagefolder").mkdir()
        rows().to_parquet(tmp_path / "imagefolder" / "train.parquet")
        monkeypatch.chdir(tmp_path)
        assert load_rows("imagefolder", "train").num_rows == 2

    def test_image_folder_with_csv(self, image_folder):
        loaded = check_columns(load_rows(str(image_folder), "train"), "image", "text")
        assert loaded["text"][:] == ["red", "blue"]
        assert image_bytes(loaded[0]["image"]) == RED

    def test_image_folder_with_jsonl(self, image_folder):
        (image_folder / "metadata.csv").unlink()
        lines = [{"file_name": "0.png", "text": "red"}, {"file_name": "1.png", "text": "blue"}]
        (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert load_rows(str(image_folder), "train")["text"][:] == ["red", "blue"]

    def test_missing_split_lists_the_others(self, tmp_path):
        rows().to_parquet(tmp_path / "train.parquet")
        rows().to_parquet(tmp_path / "test.parquet")
        with pytest.raises(UserError, match=r"no split 'dev'\. Choose one of: train, test\."):
            load_rows(str(tmp_path), "dev")

    @pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "nothing", "x.parquet"])
    def test_missing_path(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"no such file or folder.*save_to_disk.*Hub id"):
            load_rows(name, "train")

    @pytest.mark.parametrize("source", ["nobody/nothing", "nobody/nothing@v1"])
    def test_unreachable_hub(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=rf"{source}: no such folder, and the Hub does not"):
            load_rows(source, "train")

    def test_no_rows_saved(self, tmp_path):
        saved = DatasetDict({"train": rows().select([]), "test": rows()})
        saved.save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match="'train' has no rows"):
            load_rows(str(tmp_path / "saved"), "train")
        assert load_rows(str(tmp_path / "saved"), "test").num_rows == 2

    def test_no_rows_parquet(self, tmp_path):
        rows().select([]).to_parquet(tmp_path / "train.parquet")
        rows().to_parquet(tmp_path / "test.parquet")
        with pytest.raises(UserError, match="'train' has no rows"):
            load_rows(str(tmp_path), "train")
        assert load_rows(str(tmp_path), "test").num_rows == 2

    def test_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_rows(str(tmp_path), "train")

    def test_damaged_parquet_names_the_cause(self, tmp_path):
        (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
        with pytest.raises(UserError, match=r"train\.parquet: cannot be read\. .*magic"):
            load_rows(str(tmp_path / "train.parquet"), "train")

    def test_damaged_save(self, tmp_path):
        rows().save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).unlink()
        with pytest.raises(UserError, match="no rows, or has lost its files"):
            load_rows(str(tmp_path / "saved"), "train")

    def test_other_file(self, tmp_path):
        (tmp_path / "pairs.txt").write_text("a")
        with pytest.raises(UserError, match=r"A single file must be parquet, arrow, csv"):
            load_rows(str(tmp_path / "pairs.txt"), "train")

    def test_scripts_do_not_run(self, tmp_path):
        folder = tmp_path / "pairs"
        folder.mkdir()
        (folder / "pairs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(UserError, match="scripts are no longer supported"):
            load_rows(str(folder), "train")
        assert not (tmp_path / "ran").exists()


class TestCheckColumns:
    @pytest.mark.parametrize(("image", "text"), [("picture", "text"), ("image", "caption")])
    def test_missing_column_lists_the_others(self, image, text):
        with pytest.raises(UserError, match=r"The columns are: image, text\. Name"):
            check_columns(rows(), image, text)

    def test_text_must_be_string(self):
        numbers = Dataset.from_dict({"image": [RED], "text": [1]})
        with pytest.raises(UserError, match="'text' must hold strings"):
            check_columns(numbers, "image", "text")

    @pytest.mark.parametrize("value", [1, [1.0], {"bytes": "text"}, {"x": b""}])
    def test_image_must_be_image(self, value):
        other = Dataset.from_dict({"image": [value], "text": ["a"]})
        with pytest.raises(UserError, match="'image' must hold images"):
            check_columns(other, "image", "text")

    @pytest.mark.parametrize("kind", ["binary", "large_binary"])
    def test_bytes_become_images(self, kind):
        features = Features({"image": Value(kind), "text": Value("string")})
        raw = Dataset.from_dict({"image": [RED, None], "text": ["a", "b"]}, features=features)
        checked = check_columns(raw, "image", "text")
        assert checked.features["image"] == Image(decode=False)
        assert checked["image"][:] == [cell(RED), None]

    @pytest.mark.parametrize("value", [{"bytes": RED}, {"bytes": RED, "path": None}])
    def test_structs_become_images(self, value):
        raw = Dataset.from_dict({"image": [value], "text": ["a"]})
        if "path" in value:
            raw = raw.cast(
                Features(
                    {
                        "image": {"bytes": Value("binary"), "path": Value("string")},
                        "text": Value("string"),
                    }
                )
            )
        assert check_columns(raw, "image", "text")[0]["image"] == cell(RED)

    def test_paths_become_images(self, tmp_path):
        path = tmp_path / "red.png"
        path.write_bytes(RED)
        raw = Dataset.from_dict({"image": [str(path)], "text": ["a"]})
        checked = check_columns(raw, "image", "text")
        assert checked[0]["image"] == cell(path=str(path))
        assert read_pair(checked[0]["image"], "a", LIMIT).reason is None

    def test_selected_rows_stay_selected(self):
        checked = check_columns(rows().select([1]), "image", "text")
        assert checked[0] == {"image": cell(BLUE), "text": "b"}


def test_a_second_run_starts_clean():
    scored = rows()
    for name in ("ecif_score", "ecif_flag", "clip_score", "neg_clip_loss"):
        scored = scored.add_column(name, [0.0, 1.0])
    assert drop_influence_columns(scored).column_names == ["image", "text"]
    assert drop_influence_columns(rows()).column_names == ["image", "text"]


class TestReadPair:
    def test_good(self):
        pair = read_pair(cell(RED), "a cat", LIMIT)
        assert (pair.image.mode, pair.image.size) == ("RGB", (4, 4))
        assert (pair.text, pair.reason) == ("a cat", None)

    @pytest.mark.parametrize("image", [None, {}, cell(), cell(b""), cell(path="")])
    def test_image_missing(self, image):
        pair = read_pair(image, "a", LIMIT)
        assert (pair.image, pair.reason) == (None, "image missing")

    @pytest.mark.parametrize(
        ("text", "reason"),
        [(None, "caption missing"), ("", "caption empty"), (" \n", "caption empty")],
    )
    def test_caption(self, text, reason):
        pair = read_pair(cell(RED), text, LIMIT)
        assert (pair.image, pair.text, pair.reason) == (None, text or "", reason)

    @pytest.mark.parametrize("content", [b"not an image", b"\x89PNG\r\n\x1a\n", RED[:40], b"II*\0"])
    def test_unreadable(self, content):
        assert read_pair(cell(content), "a", LIMIT).reason.startswith("image unreadable: ")

    def test_unknown_format(self):
        assert read_pair(cell(b"%!PS-Adobe-3.0 EPSF-3.0"), "a", LIMIT).reason == (
            "image unreadable: not a known image format"
        )

    def test_truncated_jpeg(self):
        noise = PILImage.effect_noise((64, 64), 50)
        content = encode(noise, "JPEG")
        pair = read_pair(cell(content[: len(content) // 2]), "a", LIMIT)
        assert pair.reason.startswith("image unreadable: image file is truncated")

    @pytest.mark.parametrize("path", ["/no/such/x.png", "https://example.com/x.png"])
    def test_no_local_file(self, path):
        reason = read_pair(cell(path=path), "a", LIMIT).reason
        assert reason == "image unreadable: no local file 'x.png'"

    def test_decompression_bomb(self):
        bomb = png_of_header(40_000, 40_000)
        assert len(bomb) < 200
        pair = read_pair(cell(bomb), "a", LIMIT)
        assert pair.reason == "image of 40000 x 40000 pixels is over the limit of 1000000"

    def test_the_limit_is_a_limit_of_pixels(self):
        assert read_pair(cell(RED), "a", 16).reason is None
        assert read_pair(cell(RED), "a", 15).reason == (
            "image of 4 x 4 pixels is over the limit of 15"
        )

    def test_narrow_images_are_judged_by_their_size_in_the_model(self):
        def resized(width, height):
            return 224 * width // min(width, height), 224 * height // min(width, height)

        line = png_of_header(60_000, 1)
        reason = read_pair(cell(line), "a", LIMIT, resized).reason
        assert reason == (
            "image of 60000 x 1 pixels is too narrow: the model's processor would make it "
            "13440000 x 224"
        )
        assert read_pair(PILImage.new("RGB", (1, 600)), "a", LIMIT, resized).reason.startswith(
            "image of 1 x 600 pixels is too narrow"
        )
        assert read_pair(PILImage.new("RGB", (800, 10)), "a", LIMIT, resized).reason is None

    def test_no_pixels(self):
        content = b"P6 0 5 255\n"
        reason = read_pair(cell(content), "a", LIMIT).reason
        assert reason.startswith("image ")
        reason = read_pair(PILImage.new("RGB", (0, 5)), "a", LIMIT).reason
        assert reason == "image of 0 x 5 pixels has no pixels"

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
            (b"\xef\xbb\xbf \n<?xml version='1.0'?><!-- drawn --><svg/>", "SVG"),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
            (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        ],
    )
    def test_formats_that_are_no_pixels_or_not_ours(self, content, kind):
        reason = read_pair(cell(content), "a", LIMIT).reason
        assert reason == f"image unreadable: {kind}; convert it to PNG or JPEG"

    def test_avif_by_another_name_is_read(self):
        content = encode(PILImage.new("RGB", (8, 4)), "AVIF")
        assert read_pair(cell(content), "a", LIMIT).reason is None

    def test_inflated_text_chunk(self):
        note = PngInfo()
        note.add_text("note", "a" * 50_000_000, zip=True)
        content = encode(PILImage.new("RGB", (4, 4)), pnginfo=note)
        assert len(content) < 100_000
        assert read_pair(cell(content), "a", LIMIT).reason.startswith("image unreadable: ")

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_is_white(self, mode):
        drawing = PILImage.new("RGBA", (2, 1), (0, 0, 0, 0))
        drawing.putpixel((1, 0), (0, 0, 0, 255))
        content = encode(drawing.convert(mode) if mode != "P" else drawing.quantize(4))
        image = read_pair(cell(content), "a", LIMIT).image
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]

    def test_transparent_colour_is_white(self):
        content = encode(PILImage.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))
        assert read_pair(cell(content), "a", LIMIT).image.getpixel((0, 0)) == (255, 255, 255)

    def test_exif_orientation(self):
        exif = PILImage.Exif()
        exif[0x0112] = 6
        content = encode(PILImage.new("RGB", (8, 4)), "JPEG", exif=exif)
        assert read_pair(cell(content), "a", LIMIT).image.size == (4, 8)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_damaged_exif_is_ignored(self, kind):
        content = encode(PILImage.new("RGB", (8, 4)), kind, exif=b"Exif\0\0garbage")
        assert read_pair(cell(content), "a", LIMIT).image.size == (8, 4)

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
    def test_first_frame(self, kind):
        frames = [PILImage.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert read_pair(cell(content), "a", LIMIT).image.getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PPM", "TIFF", "WEBP"])
    def test_formats(self, kind):
        content = encode(PILImage.new("RGB", (8, 8), "red"), kind)
        assert read_pair(cell(content), "a", LIMIT).image.size == (8, 8)

    @pytest.mark.parametrize("options", [{}, {"transparency": 7}])
    def test_sixteen_bits_are_scaled(self, options):
        content = encode(PILImage.new("I;16", (1, 1), 257 * 100), **options)
        assert read_pair(cell(content), "a", LIMIT).image.getpixel((0, 0)) == (100, 100, 100)

    def test_cmyk(self):
        content = encode(PILImage.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
        assert read_pair(cell(content), "a", LIMIT).image.getpixel((0, 0)) == (255, 255, 255)


class TestImageBytes:
    def test_bytes_and_files(self, tmp_path):
        (tmp_path / "red.png").write_bytes(RED)
        assert image_bytes(cell(BLUE, "red.png")) == BLUE
        assert image_bytes(cell(path=str(tmp_path / "red.png"))) == RED

    def test_other_files_are_not_read(self, tmp_path):
        (tmp_path / "secret.png").write_text("password")
        assert image_bytes(cell(path=str(tmp_path / "secret.png"))) is None

    @pytest.mark.parametrize("image", [None, cell(), cell(path="/no/such.png")])
    def test_nothing_there(self, image):
        assert image_bytes(image) is None


class TestFingerprint:
    def test_same_after_saving_and_reloading(self, tmp_path):
        first = fingerprint_rows(rows())
        rows().save_to_disk(tmp_path / "saved")
        rows().to_parquet(tmp_path / "train.parquet")
        assert fingerprint_rows(load_from_disk(str(tmp_path / "saved"))) == first
        assert fingerprint_rows(load_rows(str(tmp_path / "train.parquet"), "train")) == first
        assert fingerprint_rows(check_columns(rows(), "image", "text")) == first

    def test_same_wherever_the_images_lie(self, image_folder, tmp_path):
        first = fingerprint_rows(load_rows(str(image_folder), "train"))
        os.rename(image_folder, tmp_path / "moved")
        moved = load_rows(str(tmp_path / "moved"), "train")
        assert fingerprint_rows(moved) == first
        moved.save_to_disk(tmp_path / "saved")
        assert fingerprint_rows(load_rows(str(tmp_path / "saved"), "train")) == first

    def test_differs_with_the_content(self):
        first = fingerprint_rows(rows())
        assert fingerprint_rows(rows(("a", "c"))) != first
        assert fingerprint_rows(rows().select([1, 0])) != first
        assert fingerprint_rows(rows().select([0])) != first
        assert fingerprint_rows(rows().rename_column("text", "caption")) != first

    def test_row_borders_count(self):
        one = Dataset.from_dict({"text": ["ab", "c"]})
        other = Dataset.from_dict({"text": ["a", "bc"]})
        assert fingerprint_rows(one) != fingerprint_rows(other)


class TestFingerprintOfSource:
    @pytest.mark.parametrize("place", ["saved", "splits", "train.parquet", "folder"])
    def test_is_that_of_the_files(self, tmp_path, place):
        def write(captions):
            source = tmp_path / place
            if place == "saved":
                rows(captions).save_to_disk(source)
            elif place == "splits":
                DatasetDict(train=rows(captions)).save_to_disk(source)
            else:
                file = source / "train.parquet" if place == "folder" else source
                file.parent.mkdir(exist_ok=True)
                rows(captions).to_parquet(file)

        write(("a", "b"))
        first = fingerprint_source(Source(str(tmp_path / place)))
        assert fingerprint_source(Source(str(tmp_path / place))) == first
        time.sleep(0.01)  # the times of files are coarse
        write(("a", "c"))
        assert fingerprint_source(Source(str(tmp_path / place))) != first

    def test_of_nothing(self):
        with pytest.raises(UserError, match="no such file or folder"):
            fingerprint_source(Source("no/such/folder"))
