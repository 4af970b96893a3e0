import io
from pathlib import Path

import datasets.config
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from hf_ecif.cleaning import ROWS_PER_GROUP, clean, write_shards
from hf_ecif.errors import UserError

FEATURES = Features(
    {
        "image": Image(decode=False),
        "text": Value("string"),
        "ecif_flag": Value("bool"),
        "ecif_reason": Value("string"),
    }
)


def encode(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def scored(flags: list, reasons: list) -> Dataset:
    count = len(flags)
    columns = {
        "image": [{"bytes": encode("red"), "path": None}] * count,
        "text": [str(row) for row in range(count)],
        "ecif_flag": flags,
        "ecif_reason": reasons,
    }
    return Dataset.from_dict(columns, features=FEATURES)


def reload(folder: Path) -> Dataset:
    return load_dataset(str(folder), split="train")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


class TestClean:
    def test_flagged_and_unscored_rows_are_removed(self):
        result = clean(scored([False, True, None, False], [None, "harmful", "image missing", None]))
        assert result.kept["text"][:] == ["0", "3"]
        assert result.removed["text"][:] == ["1", "2"]
        assert result.removed["ecif_reason"][:] == ["harmful", "image missing"]

    @pytest.mark.parametrize(("flag", "reason"), [(True, "harmful"), (False, None)])
    def test_empty_parts_keep_their_schema(self, flag, reason):
        result = clean(scored([flag] * 3, [reason] * 3))
        assert {result.kept.num_rows, result.removed.num_rows} == {0, 3}
        assert result.kept.features == result.removed.features == FEATURES

    def test_nothing_to_clean(self):
        result = clean(scored([], []))
        assert result.kept.features == result.removed.features == FEATURES

    @pytest.mark.parametrize("column", ["ecif_flag", "ecif_reason"])
    def test_missing_column(self, column):
        with pytest.raises(UserError, match=f"no column '{column}'. Run detect first"):
            clean(scored([False], [None]).remove_columns(column))

    @pytest.mark.parametrize("flag", [True, None])
    def test_removal_needs_a_reason(self, flag):
        with pytest.raises(UserError, match=r"1 rows would be removed without .* row 1"):
            clean(scored([False, flag], [None, None]))


class TestWriteShards:
    def test_bytes_stay_equal(self, tmp_path):
        contents = [encode("red", kind) for kind in ("PNG", "JPEG", "WEBP")]
        lone = tmp_path / "lone.jpg"
        lone.write_bytes(encode("blue", "JPEG"))
        cells = [{"bytes": content, "path": "somewhere/x"} for content in contents]
        cells.append({"bytes": None, "path": str(lone)})
        dataset = Dataset.from_dict({"image": cells}, features=Features({"image": Image()}))
        write_shards(dataset, tmp_path / "out")
        lone.unlink()

        opened = reload(tmp_path / "out")
        assert opened.features["image"] == Image()
        assert [row["image"].format for row in opened] == ["PNG", "JPEG", "WEBP", "JPEG"]
        raw = opened.cast_column("image", Image(decode=False))["image"][:]
        assert [cell["bytes"] for cell in raw] == [*contents, encode("blue", "JPEG")]
        assert [cell["path"] for cell in raw] == ["x", "x", "x", "lone.jpg"]

    def test_missing_images_stay_missing(self, tmp_path):
        (tmp_path / "secret").write_text("password")
        cells = [None, *({"bytes": None, "path": str(tmp_path / n)} for n in ("none", "secret"))]
        features = Features({"image": Image(decode=False)})
        dataset = Dataset.from_dict({"image": cells}, features=features)
        write_shards(dataset, tmp_path / "out")
        assert reload(tmp_path / "out").cast_column("image", features["image"])["image"][:] == cells

    def test_no_rows(self, tmp_path):
        write_shards(scored([], []), tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["data-00000-of-00001.parquet"]
        opened = load_dataset(str(tmp_path / "out"), split="train", streaming=True)
        assert list(opened) == []
        assert opened.features == Features({**FEATURES, "image": Image()})

    def test_shards_split(self, tmp_path):
        count = 2 * ROWS_PER_GROUP + 1
        write_shards(scored([False] * count, [None] * count), tmp_path / "out", max_shard_bytes=1)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            f"data-0000{number}-of-00003.parquet" for number in range(3)
        ]
        assert reload(tmp_path / "out")["text"][:] == [str(row) for row in range(count)]

    def test_one_shard_where_there_is_room(self, tmp_path):
        count = 2 * ROWS_PER_GROUP + 1
        write_shards(scored([False] * count, [None] * count), tmp_path / "out")
        assert len(list((tmp_path / "out").iterdir())) == 1

    def test_selected_rows(self, tmp_path):
        write_shards(clean(scored([False, True], [None, "harmful"])).removed, tmp_path / "out")
        assert reload(tmp_path / "out")["text"][:] == ["1"]

    def test_folder_in_use(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match="already exists"):
            write_shards(scored([], []), tmp_path)
        assert (tmp_path / "mine.txt").read_text() == "mine"

    def test_failure_leaves_nothing(self, tmp_path):
        count = ROWS_PER_GROUP + 1
        with pytest.raises(TypeError):
            write_shards(scored([False] * count, [None] * count), tmp_path / "out", "256 MiB")
        assert list(tmp_path.iterdir()) == []
