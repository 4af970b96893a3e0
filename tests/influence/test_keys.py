"""What rows are known by: equal numbers for equal images and captions, wherever they are."""

import io
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from hf_ecif.influence.keys import Keys, firsts
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows, is_unknown_script
from tests.support import DEMO


@pytest.fixture(scope="module")
def model() -> InfluenceModel:
    return InfluenceModel.from_pretrained(DEMO / "model")


def picture(colour: str, form: str = "PNG") -> dict[str, Any]:
    drawing = PILImage.new("RGB", (40, 30), colour)
    drawing.putpixel((3, 4), (9, 9, 9))
    stream = io.BytesIO()
    drawing.save(stream, form)
    return {"bytes": stream.getvalue(), "path": None}


def read(model: InfluenceModel, pairs: list[tuple[dict[str, Any], str]]) -> Rows:
    images, texts = zip(*pairs, strict=True)
    table = {"image": list(images), "text": list(texts)}
    return model.read(Dataset.from_dict(table).cast_column("image", Image(decode=False)))


def test_images_are_equal_by_their_pixels(model: InfluenceModel) -> None:
    pairs = [(picture("red"), "a"), (picture("red", "BMP"), "b"), (picture("blue"), "c")]
    keys = read(model, pairs).keys.images
    assert keys[0] == keys[1] != keys[2]
    assert read(model, pairs[::-1]).keys.images.tolist() == keys.flip(0).tolist()


def test_captions_are_equal_in_plain(model: InfluenceModel) -> None:
    red = picture("red")
    keys = read(model, [(red, "A cat."), (red, "a  CAT"), (red, "a cab")]).keys
    assert keys.captions[0] == keys.captions[1] != keys.captions[2]
    assert torch.equal(keys.siblings, torch.stack([keys.captions, keys.images], dim=1))


def test_captions_beyond_the_limit_are_equal_as_far_as_they_are_read(model: InfluenceModel) -> None:
    red, start = picture("red"), "one two three four five six seven eight nine ten " * 4
    texts = (start + "cat", start + "dog", "dog", "cat")
    keys = read(model, [(red, text) for text in texts]).keys
    assert keys.truncated.tolist() == [True, True, False, False]
    assert keys.captions[0] == keys.captions[1]
    assert len(keys.captions.unique()) == 3


def test_captions_in_an_unknown_script(model: InfluenceModel) -> None:
    texts = ["a cat", "кошка спит", "猫が寝ている", "Café à la crème", "12345", "😀"]
    keys = read(model, [(picture("red"), text) for text in texts]).keys
    assert keys.unknown_script.tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize(
    ("ids", "unknown", "expected"),
    [([0, 0], 0, True), ([0, 5, 6], 0, False), ([3, 4, 5, 6, 7], 0, True), ([3, 4], None, False)],
)
def test_unknown_script_by_tokens(ids: list[int], unknown: int | None, expected: bool) -> None:
    assert is_unknown_script("кошка", ids, unknown) is expected


def test_exchanged_captions_take_what_is_known_of_them_along() -> None:
    keys = Keys.of_texts(["a", "b", "A"])
    moved = keys.with_captions_of(torch.tensor([1, 1, 0]))
    assert moved.captions.tolist() == keys.captions[[1, 1, 0]].tolist()
    assert torch.equal(moved.images, keys.images)


def test_images_of_captions_alone_are_equal_to_no_other_and_the_same_in_every_process() -> None:
    first, again = (Keys.of_texts(["a", "b", "a"]).images for _ in range(2))
    assert len(first.unique()) == 3
    assert torch.equal(first, again)


def test_firsts_of_keys_with_parts() -> None:
    first, number = firsts(torch.tensor([[1, 7], [0, 7], [1, 7], [1, 8]]))
    assert first.tolist() == [0, 1, 3]
    assert number.tolist() == [0, 1, 0, 2]
