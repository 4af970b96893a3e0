"""Cells of `tests.benchmarks.detection`: kinds of noise on data sets, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from tests.benchmarks.shared import DEMO, Exchanged, embedded, exchange
from tests.benchmarks.signals import Judged, judge_all

RATES, KINDS, SEEDS = (0.1, 0.2, 0.4), ("random", "cat"), range(100, 105)
STATES = {"before": {"fit_epochs": 0}, "after": {}}
# What README recommends for whole layers on a CPU.
FRUGAL = {"probes": 4, "injections": 1}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_ROWS, DIGIT_QUERY = 1000, 200
# Of the remaining digits. Their class is then found for 95 % of the query's, which was all that
# these settings were chosen by.
LESSON = {"fit_epochs": 300, "batch_size": 64}


@dataclass(frozen=True)
class Cell:
    """One kind of noise on one data set, at one state of the model.

    Attributes:
        data: its name.
        state: of the model, before or after the fit.
        rate: share of rows that get another caption; zero for the noise as shipped.
        kind: whose caption they get.
        parameters: attributed.
    """

    data: str
    state: str
    rate: float = 0.0
    kind: str = ""
    parameters: str = "projections"

    @property
    def name(self) -> str:
        noise = f"{self.rate:.0%} {self.kind}" if self.rate else "as shipped"
        where = "" if self.parameters == "projections" else f", {self.parameters}"
        return f"{self.data}{where}, {noise}, {self.state}"

    @property
    def config(self) -> InfluenceConfig:
        return InfluenceConfig.from_dict(
            {"parameters": self.parameters} | self._frugal | STATES[self.state]
        )

    @property
    def detection(self) -> DetectionConfig:
        return DetectionConfig.from_dict(self._frugal)

    @property
    def _frugal(self) -> dict[str, int]:
        return {} if self.parameters == "projections" else FRUGAL


@dataclass(frozen=True)
class Run:
    """What the methods make of one seed of a cell, and the truth."""

    truth: Exchanged
    judged: Judged


@dataclass(frozen=True)
class Data:
    """Rows with right captions, to be made wrong.

    Attributes:
        model: not fitted.
        shipped: with the noise that they have as shipped.
        original: with their own captions.
        categories: of the rows, for noise within one.
        query: clean rows.
    """

    model: InfluenceModel
    shipped: Exchanged
    original: Rows
    categories: list[str]
    query: Rows

    def exchanged(self, cell: Cell, seed: int) -> Exchanged:
        if not cell.rate:
            return self.shipped
        return exchange(self.original, self.categories, cell.rate, cell.kind, seed)


def run(cell: Cell, seed: int) -> Run:
    """One seed of a cell."""
    data = read_data(cell.data, cell.parameters)
    one = data.exchanged(cell, seed)
    data.model.config = replace(cell.config, seed=seed)
    return Run(one, judge_all(data.model, one.rows, data.query, cell.detection))


@cache
def read_data(name: str, parameters: str) -> Data:
    data = embedded(InfluenceConfig(parameters=parameters))
    if name == "digits":
        return read_digits(data.model)
    rows = data.train if name == "emoji" else load_rows(str(DEMO / "data"), "test")
    shipped = data.model.read(rows)
    original = data.model.read(rows, text_column="original_text")
    donors = np.array([original.texts.index(text) for text in shipped.texts])
    return Data(data.model, Exchanged(shipped, donors), original, rows["category"][:], data.query)


def pictures(name: str) -> Dataset:
    """Images and right captions of a data set, row by row as they are read."""
    if name == "digits":
        return digits()["train"]
    rows = load_rows(str(DEMO / "data"), "train" if name == "emoji" else "test")
    return rows.remove_columns("text").rename_column("original_text", "text")


def read_digits(model: InfluenceModel) -> Data:
    """Digits, and a model that has learnt them from others, which are right."""
    rows = {name: model.read(split) for name, split in digits().items()}
    given, model.config = model.config, replace(model.config, **LESSON)
    model.encoder.load(model.refit(rows["lesson"]))
    model.config = given
    original = rows["train"]
    shipped = Exchanged(original, np.arange(len(original)))
    return Data(model, shipped, original, [""] * len(original), rows["validation"])


def digits() -> DatasetDict:
    """Handwritten digits as pictures of ink on paper, in random order, captioned as keycaps are."""
    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    ink = (255 - source.images[order] * 255 / 16).astype(np.uint8)
    rows = Dataset.from_dict(
        {
            "image": [Image.fromarray(one).resize((64, 64)).convert("RGB") for one in ink],
            "text": [f"keycap: {digit}, {WORDS[digit]}, {digit}" for digit in source.target[order]],
        },
        features=Features({"image": ImageFeature(), "text": Value("string")}),
    )
    train, query, lesson = np.split(np.arange(len(rows)), [DIGIT_ROWS, DIGIT_ROWS + DIGIT_QUERY])
    parts = {"train": train, "validation": query, "lesson": lesson}
    return DatasetDict({name: rows.select(part) for name, part in parts.items()})
