"""Nested records, through a file and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif.utils.checkpoints import read_state, write_state
from hf_ecif.utils.records import Codec, pack, unpack


class Point(NamedTuple):
    x: Tensor
    y: Tensor | None


class Foreign:
    """What is no record."""

    def __init__(self, name: str, weights: Tensor) -> None:
        self.name, self.weights = name, weights


@dataclass(frozen=True)
class Record:
    point: Point
    other: Point | None
    flags: NDArray[np.bool_]
    texts: list[str]
    interval: tuple[float, float]
    shares: dict[str, float]
    reason: str | None
    foreign: Foreign


CODECS = {
    Foreign: Codec(
        lambda value: {"name": value.name, "weights": value.weights}, lambda parts: Foreign(**parts)
    )
}


def test_a_record_comes_back_from_a_file(tmp_path: Path) -> None:
    record = Record(
        point=Point(torch.tensor([1.5, 2.5], dtype=torch.float64), None),
        other=None,
        flags=np.array([True, False]),
        texts=["Wörter", ""],
        interval=(0.0, float("inf")),
        shares={"a": 0.25},
        reason=None,
        foreign=Foreign("f", torch.arange(3)),
    )
    write_state(pack(record, CODECS), tmp_path / "record")
    found = unpack(Record, read_state(tmp_path / "record"), CODECS)
    assert torch.equal(found.point.x, record.point.x)
    assert found.point.x.dtype == torch.float64
    assert (found.point.y, found.other, found.reason) == (None, None, None)
    assert found.flags.dtype == bool
    assert found.flags.tolist() == [True, False]
    assert (found.texts, found.interval, found.shares) == (
        record.texts,
        record.interval,
        record.shares,
    )
    assert found.foreign.name == "f"
    assert found.foreign.weights.tolist() == [0, 1, 2]


def test_an_inner_record_may_be_there_or_not() -> None:
    inner = Point(torch.ones(2), torch.zeros(0, 3))
    assert unpack(Point, pack(inner)).y.shape == (0, 3)  # type: ignore[union-attr]
