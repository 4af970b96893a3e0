"""Which rows can stand for the right ones, and captions that are out of step."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hf_ecif.detection.verified import compare, find_shift
from hf_ecif.engine.objectives import Embeddings


def embeddings(count: int, seed: int, moved: float = 0.0, side: str = "image") -> Embeddings:
    """Pairs whose sides are alike; one side may be moved."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    image = text + torch.randn(count, 12, generator=generator, dtype=torch.float64)
    (image if side == "image" else text)[:, 0] += moved
    return Embeddings(normalize(text, dim=1), normalize(image, dim=1), torch.tensor(10.0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [20, 100])
def test_rows_of_the_same_kind_are_alike(count: int, seed: int) -> None:
    likeness = compare(embeddings(count, seed), embeddings(400, seed + 10))
    assert likeness.is_alike
    for told in (likeness.image, likeness.text):
        assert abs(told - 0.5) < 4 * likeness.error


@pytest.mark.parametrize("side", ["image", "text"])
def test_rows_of_another_kind_are_not(side: str) -> None:
    likeness = compare(embeddings(60, 0, moved=3.0, side=side), embeddings(400, 1))
    assert not likeness.is_alike
    assert getattr(likeness, side) > 0.85
    assert getattr(likeness, "text" if side == "image" else "image") < 0.65


def test_wrong_pairs_among_the_data_do_no_harm() -> None:
    data = embeddings(400, 1)
    mixed = data._replace(text=data.text[torch.randperm(400)])
    likeness, before = compare(embeddings(60, 0), mixed), compare(embeddings(60, 0), data)
    assert likeness.is_alike
    assert likeness.text == pytest.approx(before.text, abs=0.1)


@pytest.mark.parametrize("shift", [0, 1, -1, 3, -8])
def test_shift_of_captions(shift: int) -> None:
    data = embeddings(100, 0)
    assert find_shift(data._replace(text=data.text.roll(shift, dims=0))) == shift


def test_no_shift_helps_captions_that_are_mixed_up() -> None:
    data = embeddings(100, 0)
    order = torch.from_numpy(np.random.default_rng(0).permutation(100))
    assert find_shift(data._replace(text=data.text[order])) == 0


def test_two_rows_have_no_other_pairing_but_one() -> None:
    data = embeddings(2, 0)
    assert find_shift(data) in (0, 1, -1)
