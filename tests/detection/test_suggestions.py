"""Better captions and duplicates on rows of the demo, with captions exchanged by hand."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.captions import plain
from hf_ecif.detection.detect import Detection
from hf_ecif.detection.suggestions import Evidence, find_evidence, read_vocabulary
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.pairs import join_near_images
from hf_ecif.influence.rows import Rows
from tests.support import DEMO

COUNT = 60
FLAGGED = [5, 9, 20, 33]
UNREADABLE = 2  # so that row numbers are not numbers of readable rows
COPY, OF = 40, 12  # an image that is there twice, the second time as a JPEG


@pytest.fixture(scope="module")
def model() -> InfluenceModel:
    return InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig(micro_batch_size=16))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Rows with their right captions, but for those that are flagged, which have the next row's."""
    files = str(DEMO / "data" / "train.parquet")
    cache = str(tmp_path_factory.mktemp("cache"))
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    columns = rows.cast_column("image", Image(decode=False)).select(range(COUNT))[:]
    texts = list(columns["original_text"])
    for row in FLAGGED:
        texts[row] = texts[row + 1]
    texts[50], texts[51] = "A  red, ball!", "a red ball"
    texts[UNREADABLE] = ""
    images = columns["image"]
    images[COPY] = {"bytes": as_jpeg(images[OF]["bytes"]), "path": None}
    table = {"image": images, "text": texts, "truth": columns["original_text"]}
    return Dataset.from_dict(table).cast_column("image", Image(decode=False))


def as_jpeg(content: bytes) -> bytes:
    drawing = PILImage.open(io.BytesIO(content)).convert("RGBA")
    white = PILImage.new("RGBA", drawing.size, "white")
    stream = io.BytesIO()
    PILImage.alpha_composite(white, drawing).convert("RGB").save(stream, "JPEG", quality=75)
    return stream.getvalue()


@pytest.fixture(scope="module")
def rows(model: InfluenceModel, data: Dataset) -> Rows:
    return model.read(data)


@pytest.fixture(scope="module")
def detection(rows: Rows) -> Detection:
    flag = np.isin(rows.positions.numpy(), FLAGGED)
    return Detection(
        probability=flag * 0.9,
        suspicion=flag * 3.0,
        flag=flag,
        borderline=np.zeros_like(flag),
        threshold=0.5,
        noise_rate=0.1,
        rate_interval=(0.05, 0.2),
        rate_is_bound=False,
        injected_auroc=0.9,
    )


@pytest.fixture(scope="module")
def evidence(model: InfluenceModel, rows: Rows, detection: Detection) -> Evidence:
    rows = join_near_images(rows, model.embed_as_given(rows).image)
    return find_evidence(model, rows, detection, probability=0.0)


def embed(model: InfluenceModel, image: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a single pair, by the model itself."""
    encoder: Any = model.encoder.model
    picture = model.processor.image_processor(images=[image], return_tensors="pt")
    tokens = model.processor.tokenizer([text], return_tensors="pt")
    names = [n for n in ("input_ids", "attention_mask") if n in tokens]
    with torch.no_grad():
        output = encoder(**picture, **{name: tokens[name] for name in names})
    return output.image_embeds[0], output.text_embeds[0]


def test_only_flagged_rows_are_compared(evidence: Evidence, rows: Rows) -> None:
    asked = np.isin(rows.positions.numpy(), FLAGGED)
    np.testing.assert_array_equal(evidence.better_images >= 0, asked)
    assert all(
        text is None for text, there in zip(evidence.better_text, asked, strict=True) if not there
    )
    assert np.isnan(evidence.margin[~asked]).all()
    assert (evidence.better_row[~asked] == -1).all()


def test_better_captions_and_margins_by_the_model_itself(
    model: InfluenceModel, data: Dataset, rows: Rows, evidence: Evidence
) -> None:
    opened = data.cast_column("image", Image())
    numbers = [n for n in range(COUNT) if n != UNREADABLE]
    pairs = {n: embed(model, on_white(opened[n]["image"]), data[n]["text"]) for n in numbers}
    scale = model.encoder.scale
    for row in FLAGGED:
        own_image, own_text = pairs[row]
        own = (own_image @ own_text).item()
        position = rows.positions.tolist().index(row)
        better = sum((image @ own_text).item() > own + 1e-5 for image, _ in pairs.values())
        assert evidence.better_images[position] == pytest.approx(better, abs=1)
        others = {
            plain(data[n]["text"]): (own_image @ pairs[n][1]).item()
            for n in numbers
            if plain(data[n]["text"]) != plain(data[row]["text"])
        }
        first, second = sorted(others, key=lambda text: -others[text])[:2]
        assert plain(evidence.better_text[position] or "") == first
        margin = scale * (others[first] - max(others[second], own))
        assert evidence.margin[position] == pytest.approx(margin, abs=2e-3)
        assert data[int(evidence.better_row[position])]["text"] == evidence.better_text[position]


def on_white(image: PILImage.Image) -> PILImage.Image:
    image = image.convert("RGBA")
    white = PILImage.new("RGBA", image.size, "white")
    return PILImage.alpha_composite(white, image).convert("RGB")


def test_margin_decides_what_is_suggested(evidence: Evidence) -> None:
    least = float(np.nanmedian(evidence.margin))
    some = replace(evidence, least_margin=least)
    assert 0 < some.suggested.sum() < len(FLAGGED)
    assert (some.margin[some.suggested] >= least).all()


def test_right_caption_in_a_vocabulary_is_found(
    model: InfluenceModel, data: Dataset, rows: Rows, detection: Detection
) -> None:
    right = [data[row]["truth"] for row in FLAGGED]
    far = ["flag: Ghana, flag, GH", "no one under eighteen, not, no, one", right[0].upper()]
    found = find_evidence(model, rows, detection, vocabulary=[*right, *far])
    positions = [rows.positions.tolist().index(row) for row in FLAGGED]
    texts = [found.better_text[position] for position in positions]
    assert sum(text == truth for text, truth in zip(texts, right, strict=True)) >= 3
    assert (found.better_row == -1).all()


def test_own_caption_is_no_better_one(
    model: InfluenceModel, data: Dataset, rows: Rows, detection: Detection
) -> None:
    own = data[FLAGGED[0]]["text"]
    found = find_evidence(model, rows, detection, vocabulary=[own.upper()])
    assert found.better_text[rows.positions.tolist().index(FLAGGED[0])] is None


def test_every_row_flagged_leaves_nothing_to_learn_from(
    model: InfluenceModel, rows: Rows, detection: Detection
) -> None:
    found = find_evidence(model, rows, replace(detection, flag=np.ones(len(rows), dtype=bool)))
    assert np.isnan(found.probability).all()
    assert not found.suggested.any()
    assert found.suggested_probability == [None] * len(rows)


def test_nothing_flagged(model: InfluenceModel, rows: Rows, detection: Detection) -> None:
    found = find_evidence(model, rows, replace(detection, flag=np.zeros(len(rows), dtype=bool)))
    assert not found.suggested.any()
    assert (found.better_images == -1).all()


def test_duplicates_are_found_by_row_number(evidence: Evidence, rows: Rows) -> None:
    numbers = rows.positions.numpy()
    groups = dict(zip(numbers.tolist(), evidence.duplicate.tolist(), strict=True))
    assert groups[COPY] == groups[OF] == OF
    assert groups[51] == groups[50] == 50
    for row in FLAGGED:
        assert groups[row + 1] == groups[row] == row
    expected = {OF, COPY, 50, 51, *FLAGGED, *(row + 1 for row in FLAGGED)}
    assert {row for row, first in groups.items() if first != row} <= expected
    assert evidence.describe_duplicates() == {
        "image": {"groups": 1, "rows": 2, "largest": 2},
        "caption": {"groups": 5, "rows": 10, "largest": 2},
        "either": {"groups": 6, "rows": 12, "largest": 2},
    }


class TestVocabulary:
    def test_lines(self, tmp_path: Path) -> None:
        (tmp_path / "v.txt").write_text("a cat\n\n  ein Hündchen \n", encoding="utf-8")
        assert read_vocabulary(tmp_path / "v.txt") == ["a cat", "ein Hündchen"]

    @pytest.mark.parametrize(
        ("content", "words"),
        [(None, "cannot be read"), (b"\xff\xfe", "UTF-8"), (b"\n \n", "no captions")],
    )
    def test_mistakes(self, tmp_path: Path, content: bytes | None, words: str) -> None:
        path = tmp_path / "v.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_vocabulary(path)
