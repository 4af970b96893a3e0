"""Zero-shot accuracy in float64 against loops over the model's own features."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, Image, load_dataset
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.influence.classification import read_classes, zero_shot_accuracy
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from tests.support import DEMO
from tests.support.commands import MODEL

COUNT = 40
TEMPLATES = ["a photo of a {}", "{}, drawn", "an icon of {}"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    rows = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    return rows.select(range(COUNT))


@pytest.fixture(scope="module")
def model() -> InfluenceModel:
    config = InfluenceConfig(micro_batch_size=16)  # less than there are prompts
    return InfluenceModel.from_pretrained(MODEL, config, dtype=torch.float64)


@pytest.fixture(scope="module")
def rows(model: InfluenceModel, data: Dataset) -> Rows:
    return model.read(data.cast_column("image", Image(decode=False)))


def oracle(model: InfluenceModel, data: Dataset, named: list[str | None]) -> list[bool]:
    """Whether each labelled image is told, one prompt and one image at a time."""
    clip, processor = model.encoder.model, model.processor

    def features(kind: str, **inputs: object) -> Tensor:
        made = processor(**inputs, return_tensors="pt", padding="max_length", truncation=True)
        with torch.no_grad():
            found = getattr(clip, f"get_{kind}_features")(
                **{k: v.double() if v.is_floating_point() else v for k, v in made.items()}
            )
        found = getattr(found, "pooler_output", found)
        return normalize(found[0], dim=0)

    centres = {}
    for name in sorted({name for name in named if name}):
        prompts = [features("text", text=[one.replace("{}", name)]) for one in TEMPLATES]
        centres[name] = normalize(torch.stack(prompts).mean(dim=0), dim=0)
    told = []
    for image, name in zip(data["image"], named, strict=True):
        if name is not None:
            own = features("image", images=[image.convert("RGB")])
            best = max(centres, key=lambda one: float(centres[one] @ own))
            told.append(best == name)
    return told


def test_against_loops(model: InfluenceModel, data: Dataset, rows: Rows) -> None:
    named = [None if row % 7 == 3 else name for row, name in enumerate(data["category"][:])]
    classes = read_classes(model, rows, named, TEMPLATES)
    told = oracle(model, data, named)
    assert 0 < sum(told) < len(told) < COUNT
    found = zero_shot_accuracy(model, model.encoder.theta, rows, classes)
    assert found == pytest.approx(sum(told) / len(told), rel=1e-12)


def test_parameters_matter(model: InfluenceModel, data: Dataset, rows: Rows) -> None:
    classes = read_classes(model, rows, data["category"][:], TEMPLATES)
    theta = model.encoder.theta
    as_given = classes.embed(model, theta)
    assert torch.allclose(as_given.norm(dim=1), torch.ones(len(classes.names)).double())
    assert not torch.allclose(as_given, classes.embed(model, 1.5 * theta + 0.01))


def test_any_class_of_an_image_is_right(model: InfluenceModel, rows: Rows) -> None:
    """Two rows of one image, of which one has the class that it is taken for."""
    twice = replace(rows.select(torch.tensor([0, 0])), positions=torch.arange(2))
    classes = read_classes(model, twice, ["cat", "dog"])

    def accuracy(*labels: int) -> float:
        labelled = replace(classes, labels=torch.tensor(labels))
        return zero_shot_accuracy(model, model.encoder.theta, twice, labelled)

    assert accuracy(0, 1) == accuracy(1, 0) == 1
    assert {accuracy(0, 0), accuracy(1, 1)} == {0, 1}


@pytest.mark.parametrize(
    ("named", "templates", "words"),
    [
        ([None] * COUNT, TEMPLATES, "names 0 classes"),
        (["one"] * COUNT, TEMPLATES, "names 1 classes"),
        (["one", "two"] * (COUNT // 2), ["a photo"], "has no place for the name of a class"),
    ],
)
def test_what_cannot_be(
    model: InfluenceModel, rows: Rows, named: list[str | None], templates: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read_classes(model, rows, named, templates)
