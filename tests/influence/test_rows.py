"""Rows of the embedded data set, read with the embedded model."""

import io
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor

from hf_ecif.data.images import read_pair
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.towers import PIXELS
from hf_ecif.errors import UserError
from hf_ecif.influence import rows as features_module
from hf_ecif.influence.rows import Chain, Preprocessor, Rows, read_rows, require_rows
from hf_ecif.models.load import load_model
from tests.support import DEMO
from tests.support.families import build

COUNT = 9
COLUMNS: Any = {"image_column": "image", "text_column": "text", "max_pixels": 10**6}
SUBSETS = pytest.mark.parametrize("parameters", ["projections", "last_block", "logit_scale", "all"])


@cache
def demo_model() -> tuple[Any, Any]:
    return load_model(str(DEMO / "model"))


@cache
def demo_rows() -> Dataset:
    return Dataset.from_parquet(str(DEMO / "data" / "test.parquet")).select(range(COUNT))


def data(**changes: dict[int, Any]) -> Dataset:
    """The first rows, with some cells of a column replaced."""
    dataset = (
        demo_rows().select_columns(["image", "text"]).cast_column("image", Image(decode=False))
    )
    cells = {column: dataset[:][column] for column in ("image", "text")}
    for column, replaced in changes.items():
        for row, value in replaced.items():
            cells[column][row] = value
    return Dataset.from_dict(cells, features=dataset.features)


def read(dataset: Dataset, parameters: str, micro_batch_size: int = 4, **options: Any) -> Rows:
    model, processor = demo_model()
    encoder = DualEncoder(model, parameters, micro_batch_size)
    return read_rows(dataset, encoder, processor, **{**COLUMNS, **options})


def tensors(rows: Rows) -> dict[str, Tensor]:
    sides = (("text", rows.features.text), ("image", rows.features.image))
    return {f"{side} {key}": value for side, inputs in sides for key, value in inputs.items()}


def plain_embeddings(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Each pair by itself, through the processor and the model's own forward."""
    model, processor = demo_model()
    texts, images = [], []
    for cell, text in zip(dataset[:]["image"], dataset[:]["text"], strict=True):
        image = read_pair(cell, text, 10**6).image
        inputs = processor(text=[text], images=[image], truncation=True, return_tensors="pt")
        with torch.no_grad():
            out = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", PIXELS)})
        texts.append(out.text_embeds)
        images.append(out.image_embeds)
    return torch.cat(texts), torch.cat(images)


# -------------------------------------------------------------------------------- embeddings


@SUBSETS
def test_embeddings_are_those_of_one_by_one(parameters: str) -> None:
    """Padding and micro-batches change nothing."""
    model, processor = demo_model()
    encoder = DualEncoder(model, parameters, 4)
    rows = read_rows(data(), encoder, processor, **COLUMNS)
    actual = encoder.embed(encoder.theta, rows.features)
    text, image = plain_embeddings(data())
    torch.testing.assert_close(actual.text, text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.image, image, rtol=1e-4, atol=1e-5)


@SUBSETS
def test_memory_and_mapped_file_hold_the_same(parameters: str) -> None:
    in_memory = tensors(read(data(), parameters))
    mapped = tensors(read(data(), parameters, memory_limit=0))
    assert in_memory.keys() == mapped.keys()
    for key, value in in_memory.items():
        assert value.dtype == mapped[key].dtype
        assert torch.equal(value, mapped[key]), key


def test_which_memory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine rows, text and image ``(128,)`` in float32 each."""
    files: list[Any] = []
    plain = features_module._map_empty

    def counted(*args: Any, **options: Any) -> Tensor:
        files.append(args)
        return plain(*args, **options)

    monkeypatch.setattr(features_module, "_map_empty", counted)
    size = COUNT * 2 * 128 * 4
    read(data(), "projections", memory_limit=size)
    assert not files
    read(data(), "projections", memory_limit=size - 1)
    assert [args[0] for args in files] == [(COUNT, 128)] * 2


def test_mapped_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module.tempfile, "tempdir", str(tmp_path))
    rows = read(data(), "projections", memory_limit=0)
    assert not list(tmp_path.iterdir())
    assert rows.features.text["hidden"].abs().sum() > 0


@pytest.mark.parametrize("parameters", ["projections", "last_block"])
def test_micro_batches_do_not_matter(parameters: str) -> None:
    whole, split = (tensors(read(data(), parameters, size)) for size in (64, 2))
    for key, value in whole.items():
        torch.testing.assert_close(split[key], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ tokens


def lengths(texts: list[str]) -> list[int]:
    return [len(ids) for ids in demo_model()[1].tokenizer(texts)["input_ids"]]


def test_rows_are_as_long_as_the_longest_caption() -> None:
    dataset = data(text={0: "cat", 8: "a cat and a dog and " * 2})
    rows = read(dataset, "last_block", 2)
    expected = max(lengths(dataset[:]["text"]))
    assert expected < 32
    assert rows.features.text["input_ids"].shape == (COUNT, expected)
    assert rows.features.text["hidden"].shape == (COUNT, expected, 128)
    assert rows.features.text["attention_mask"].sum(dim=1).tolist() == lengths(dataset[:]["text"])


@SUBSETS
def test_long_captions_are_cut(parameters: str) -> None:
    rows = read(data(text={3: "word " * 100}), parameters)
    assert len(rows) == COUNT
    if parameters in ("last_block", "all"):
        assert rows.features.text["input_ids"].shape[1] == 32


def test_sigmoid_models_see_captions_of_the_full_length() -> None:
    """They were trained with padding that they attend to."""
    encoder = DualEncoder(build("siglip"))
    preprocess = Preprocessor(encoder, demo_model()[1], lambda: iter([["a"]]))
    tokens = preprocess.tokens(["cat", "dog"])
    assert tokens["input_ids"].shape == (2, encoder.max_text_length)


def test_pixels_are_in_the_precision_of_the_model() -> None:
    model, processor = load_model(str(DEMO / "model"))
    encoder = DualEncoder(model.bfloat16(), "projections")
    preprocess = Preprocessor(encoder, processor, lambda: iter([["a"]]))
    pairs = [read_pair(data()[n]["image"], "a", 10**6) for n in (0, 1)]
    inputs = preprocess(pairs)
    assert inputs.image["pixel_values"].dtype == torch.bfloat16
    assert inputs.text["input_ids"].dtype == torch.long


# ---------------------------------------------------------------------------- unreadable rows


@SUBSETS
def test_unreadable_rows_are_left_out_with_a_reason(parameters: str) -> None:
    broken = {"bytes": b"no image", "path": None}
    bad = data(image={0: None, 4: broken}, text={1: None, 7: "  "})
    rows = read(bad, parameters, micro_batch_size=2)
    kept = [2, 3, 5, 6, 8]
    assert rows.positions.tolist() == kept
    assert rows.texts == [data()[n]["text"] for n in kept]
    assert rows.reasons.keys() == {0, 1, 4, 7}
    assert (rows.reasons[0], rows.reasons[7]) == ("image missing", "caption empty")
    assert (rows.total, len(rows), len(rows.features)) == (COUNT, 5, 5)
    good = tensors(read(data().select(kept), parameters))
    for key, value in tensors(rows).items():
        torch.testing.assert_close(value, good[key], rtol=1e-4, atol=1e-5)


def test_large_images_are_refused() -> None:
    with pytest.raises(UserError, match=f"None of the {COUNT} rows can be read. The first row: "):
        require_rows(read(data(), "projections", max_pixels=64 * 64 - 1))


def narrow(width: int, height: int) -> dict[str, Any]:
    stream = io.BytesIO()
    PILImage.new("RGB", (width, height), "red").save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def test_images_are_refused_by_their_size_in_the_model() -> None:
    """The demo's processor makes the shorter edge 48 pixels long, whatever the other becomes."""
    rows = read(data(image={1: narrow(60_000, 1), 2: narrow(1, 2000), 3: narrow(300, 20)}), "all")
    assert rows.positions.tolist() == [0, 3, 4, 5, 6, 7, 8]
    assert rows.reasons == {
        1: "image of 60000 x 1 pixels is too narrow: the model's processor would make it "
        "2880000 x 48",
        2: "image of 1 x 2000 pixels is too narrow: the model's processor would make it 48 x 96000",
    }


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 224}, (448, 224)),
        ({"shortest_edge": 224, "longest_edge": 300}, (300, 150)),
        ({"height": 24, "width": 24}, (0, 0)),
        (None, (0, 0)),
    ],
)
def test_what_a_processor_makes_of_an_image(size: Any, expected: tuple[int, int]) -> None:
    model, _ = demo_model()
    image_processor = SimpleNamespace(do_resize=True, size=size)
    processor = SimpleNamespace(
        image_processor=image_processor, tokenizer=demo_model()[1].tokenizer
    )
    preprocess = Preprocessor(DualEncoder(model, "projections"), processor, lambda: iter([]))
    assert preprocess.resized(20, 10) == expected
    image_processor.do_resize = False
    assert preprocess.resized(20, 10) == (0, 0)


def test_few_images_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And they become the same inputs."""
    whole = read(data(), "all", micro_batch_size=COUNT)
    seen: list[int] = []
    pixels = Preprocessor.pixels

    def counted(self: Preprocessor, images: list[Any]) -> Any:
        seen.append(len(images))
        return pixels(self, images)

    monkeypatch.setattr(Preprocessor, "pixels", counted)
    monkeypatch.setattr(features_module, "PIXELS_HELD", 64 * 64 * 4 - 1)
    parts = read(data(), "all", micro_batch_size=COUNT)
    assert seen == [4, 4, 1]
    for key, value in tensors(parts).items():
        assert torch.equal(value, tensors(whole)[key]), key


def test_progress_counts_every_row() -> None:
    ticks: list[int] = []
    read(data(text={1: None}), "projections", advance=ticks.append)
    assert ticks == [4, 4, 1]


# -------------------------------------------------------------------------------------- rows


def test_select_and_exchange() -> None:
    rows = read(data(text={5: data()[2]["text"]}, image={0: None}), "projections")
    assert rows.same_text.tolist() == [0, 1, 2, 3, 1, 4, 5, 6]
    chosen = rows.select(torch.tensor([4, 0]))
    assert chosen.positions.tolist() == [5, 1]
    assert chosen.texts == [rows.texts[4], rows.texts[0]]
    assert (chosen.reasons, chosen.total, len(chosen)) == ({}, 2, 2)
    order = torch.arange(8).flip(0)
    exchanged = rows.with_texts_of(order)
    assert exchanged.texts == rows.texts[::-1]
    assert torch.equal(exchanged.features.image["hidden"], rows.features.image["hidden"])
    assert torch.equal(exchanged.features.text["hidden"], rows.features.text["hidden"].flip(0))
    assert (exchanged.reasons, exchanged.total) == (rows.reasons, rows.total)


@pytest.mark.parametrize("border", [1, 3, 6])
@pytest.mark.parametrize("rows", [slice(0, 7), slice(1, 3), slice(2, 5), slice(3, 7), slice(4, 4)])
def test_chained_data_sets_are_one(border: int, rows: slice) -> None:
    """Their types may differ."""
    numbers = list(range(7))
    first = Dataset.from_dict({"number": numbers[:border], "other": ["x"] * border})
    second = Dataset.from_dict({"number": [float(n) for n in numbers]}).select(range(border, 7))
    chain = Chain(first.select_columns(["number"]), second)
    assert len(chain) == 7
    assert chain[rows] == {"number": numbers[rows]}
    assert chain.select_columns(["number"])[rows] == {"number": numbers[rows]}


def test_first_rows_are_those_of_a_shorter_data_set() -> None:
    rows = Rows(
        Features({"ids": torch.arange(5)}, {"pixels": torch.arange(5)}),
        positions=torch.tensor([0, 2, 3, 5, 6]),
        texts=list("acdfg"),
        reasons={1: "broken", 4: "empty"},
        total=7,
    )
    first = rows.first(4)
    assert first.positions.tolist() == [0, 2, 3]
    assert first.texts == list("acd")
    assert first.reasons == {1: "broken"}
    assert first.total == 4
    assert first.features.text["ids"].tolist() == [0, 1, 2]
