"""Distinct pairs, and copies that share what is known of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.engine.features import Features
from hf_ecif.influence.keys import Keys
from hf_ecif.influence.pairs import distinct_pairs, join_near_images
from hf_ecif.influence.rows import Rows


def rows_of(pairs: list[tuple[int, str]]) -> Rows:
    """Rows with the number of the image as its feature, and as its key."""
    images, texts = zip(*pairs, strict=True)
    numbers = torch.tensor(images)
    features = Features({"x": torch.arange(len(pairs))[:, None]}, {"x": numbers[:, None]})
    keys = Keys.of_texts(texts)
    known = Keys(numbers, keys.captions, keys.truncated, keys.unknown_script)
    positions = torch.arange(len(pairs)) + 10
    return Rows(features, positions, list(texts), {}, len(pairs) + 10, known_keys=known)


PAIRS = [(3, "a"), (1, "b"), (3, "A."), (3, "b"), (1, "b"), (2, "c")]


def content(rows: Rows) -> list[tuple[int, str]]:
    return [
        (image, text.casefold().strip("."))
        for image, text in zip(rows.features.image["x"][:, 0].tolist(), rows.texts, strict=True)
    ]


def test_every_pair_once() -> None:
    pairs = distinct_pairs(rows_of(PAIRS))
    assert sorted(content(pairs.rows)) == [(1, "b"), (2, "c"), (3, "a"), (3, "b")]
    assert pairs.rows.positions.tolist() == (pairs.first + 10).tolist()
    assert sorted(pairs.first.tolist()) == [0, 1, 3, 5]
    assert pairs.number[[0, 1]].tolist() == pairs.number[[2, 4]].tolist()
    assert pairs.copies[pairs.number].tolist() == [2, 2, 2, 1, 2, 1]


def test_neither_order_nor_copies_change_the_pairs() -> None:
    plain = content(distinct_pairs(rows_of(PAIRS)).rows)
    assert content(distinct_pairs(rows_of(PAIRS[::-1])).rows) == plain
    assert content(distinct_pairs(rows_of([*PAIRS, *PAIRS, *PAIRS[:2]])).rows) == plain


@dataclass(frozen=True)
class Record:
    values: Tensor
    queries: Tensor
    flags: np.ndarray
    names: list[str]
    rate: float


def test_copies_share_what_is_known_of_their_pair() -> None:
    pairs = distinct_pairs(rows_of(PAIRS))
    number = pairs.number
    known = Record(
        torch.arange(4.0),
        torch.arange(8.0).view(2, 4),
        np.arange(4) > 1,
        [f"pair {n}" for n in range(4)],
        0.25,
    )
    spread = pairs.spread(known)
    assert spread.values.tolist() == number.tolist()
    assert spread.queries.tolist() == [number.tolist(), (number + 4).tolist()]
    assert spread.flags.tolist() == (number > 1).tolist()
    assert spread.names == [f"pair {n}" for n in number.tolist()]
    assert spread.rate == 0.25


def draw(count: int, spread: float) -> Tensor:
    """Images whose distance from each other is about ``spread``."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 32, generator=generator) * (spread / 32) ** 0.5
    return normalize(torch.eye(32)[0] + noise, dim=1)


def test_nearly_equal_images_are_joined() -> None:
    images = draw(60, 1.0)
    images[7] = normalize(images[3] + 0.01 * images[9], dim=0)
    rows = rows_of([(n, f"{n}") for n in range(60)])
    joined = join_near_images(rows, images)
    assert joined.keys.images[7] == joined.keys.images[3] == 3
    assert len(joined.keys.images.unique()) == 59
    assert torch.equal(joined.keys.captions, rows.keys.captions)


def test_images_that_all_look_the_same_to_the_model_are_not_joined() -> None:
    """As to a model of random weights: nearly all cosines are above that of nearly equal images."""
    images = draw(60, 0.002)
    cosines = images @ images.T
    assert (cosines > 0.995).double().mean() > 0.9
    rows = rows_of([(n, f"{n}") for n in range(60)])
    assert len(join_near_images(rows, images).keys.images.unique()) == 60


def test_joined_images_are_the_same_in_any_order() -> None:
    images = draw(20, 1.0)
    images[11] = images[4]
    rows = rows_of([(n + 5, f"{n}") for n in range(20)])
    order = torch.arange(20).flip(0)
    plain = join_near_images(rows, images).keys.images
    turned = join_near_images(rows.select(order), images[order]).keys.images
    assert torch.equal(turned, plain[order])
