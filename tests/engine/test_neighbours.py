"""Blocks against the whole table at once."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.engine import neighbours
from hf_ecif.engine.neighbours import (
    DECAY,
    NEIGHBOURS,
    average_distance,
    count_better,
    find_best,
    group_near,
    link,
)

BLOCKS = [1, 7, 64, 2**24]


def vectors(count: int, seed: int = 0, dim: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", request.param)


@pytest.fixture
def largest_table(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all products of embeddings."""
    sizes: list[int] = []

    def recorded(function: Callable[..., Iterator[tuple]]) -> Callable[..., Iterator[tuple]]:
        def blocks(*arguments: Tensor) -> Iterator[tuple]:
            for rows, cosines in function(*arguments):
                sizes.append(cosines.numel())
                yield rows, cosines

        return blocks

    for name in ("_cosines", "_upper"):
        monkeypatch.setattr(neighbours, name, recorded(getattr(neighbours, name)))
    return sizes


def components(adjacent: Tensor) -> list[int]:
    """First member of every row's component, by walking from row to row."""
    first: dict[int, int] = {}
    for start in range(len(adjacent)):
        waiting = [] if start in first else [start]
        while waiting:
            row = waiting.pop()
            if row not in first:
                first[row] = start
                waiting += adjacent[row].nonzero()[:, 0].tolist()
    return [first[row] for row in range(len(adjacent))]


@pytest.mark.usefixtures("block")
def test_count_better_is_the_rank() -> None:
    text, image = vectors(30), vectors(30, seed=1)
    own = (text * image).sum(dim=1)
    expected = [
        sum((text[i] @ image[j]).item() > own[i].item() for j in range(30) if j != i)
        for i in range(30)
    ]
    assert count_better(text, image, own).tolist() == expected
    assert max(expected) > 10


def test_equal_keys_are_not_better() -> None:
    text, image = vectors(1).float(), vectors(1, seed=1).float()
    own = (text * image).sum(dim=1)
    assert count_better(text, image.repeat(1000, 1), own).tolist() == [0]


@pytest.mark.usefixtures("block")
def test_find_best_and_its_runner_up() -> None:
    anchors, keys = vectors(20), vectors(9, seed=1)
    excluded = torch.arange(20) % 10 - 1  # none of them for some
    best = find_best(anchors, keys, excluded)
    for row in range(20):
        allowed = [key for key in range(9) if key != excluded[row]]
        cosines = {key: (anchors[row] @ keys[key]).item() for key in allowed}
        first, second = sorted(cosines, key=lambda key: -cosines[key])[:2]
        assert best.key[row] == first
        assert best.cosine[row].item() == pytest.approx(cosines[first])
        assert best.runner_up[row].item() == pytest.approx(cosines[second])


def test_a_single_key_has_no_runner_up() -> None:
    best = find_best(vectors(3), vectors(1, seed=1), torch.full((3,), -1))
    assert best.key.tolist() == [0, 0, 0]
    assert best.runner_up.tolist() == [-1, -1, -1]


def test_no_anchors() -> None:
    nothing = torch.zeros(0, 4)
    assert count_better(nothing, torch.ones(2, 4), torch.zeros(0)).tolist() == []
    assert [len(part) for part in find_best(nothing, torch.ones(2, 4), torch.zeros(0))] == [0] * 3
    assert group_near(nothing, 0.9).tolist() == []


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("threshold", [0.0, 0.7, 0.9, 0.99, 1.1])
def test_group_near_finds_components(threshold: float) -> None:
    rows = vectors(60)
    rows[40:50] = rows[5:15]  # exact copies
    adjacent = rows @ rows.T >= threshold
    groups = group_near(rows, threshold)
    assert groups.tolist() == components(adjacent)


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(
                st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=5),
                max_size=4,
            ),
        )
    )
)
def test_link_joins_whatever_is_linked(case: tuple[int, list[list[tuple[int, int]]]]) -> None:
    count, blocks = case
    adjacent = torch.zeros(count, count, dtype=torch.bool)
    for first, second in (pair for block in blocks for pair in block):
        adjacent[first, second] = adjacent[second, first] = True
    tensors = (torch.tensor(block, dtype=torch.long).reshape(-1, 2).T for block in blocks)
    groups = link(count, ((pairs[0], pairs[1]) for pairs in tensors))
    assert groups.tolist() == components(adjacent)


def test_progress_counts_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 500)
    done: list[int] = []
    group_near(vectors(101), 0.9, done.append)
    assert sum(done) == 101
    assert len(done) > 10


def test_no_table_of_all_rows(monkeypatch: pytest.MonkeyPatch, largest_table: list[int]) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 500)
    rows = vectors(100)
    group_near(rows, 0.9)
    count_better(rows, rows, torch.ones(100))
    find_best(rows, rows, torch.arange(100))
    assert max(largest_table) <= 500


class TestAverageDistance:
    @pytest.mark.parametrize("count", [1, 2, 5, 6, 40])
    @pytest.mark.usefixtures("block")
    def test_of_every_row_by_itself(self, count: int) -> None:
        anchors, others = vectors(count), vectors(count, seed=1)
        mismatch = 1 - (anchors * others).sum(dim=1)
        same = torch.arange(count) // 2
        expected = []
        for row in range(count):
            near = [
                (1 - anchors[row] @ anchors[other], other)
                for other in range(count)
                if same[other] != same[row]
            ]
            terms = [
                torch.exp(-DECAY * (distance + mismatch[other])) * (1 - others[row] @ others[other])
                for distance, other in sorted(near)[:NEIGHBOURS]
            ]
            expected.append(sum(terms, torch.zeros((), dtype=torch.float64)) / NEIGHBOURS)
        found = average_distance(anchors, others, mismatch, same)
        torch.testing.assert_close(found, torch.stack(expected))

    def test_a_row_is_no_neighbour_of_its_own(self) -> None:
        anchors, others = vectors(2), vectors(2, seed=1)
        found = average_distance(anchors, others, torch.zeros(2, dtype=torch.float64))
        weight = torch.exp(-DECAY * (1 - anchors[0] @ anchors[1]))
        expected = weight * (1 - others[0] @ others[1]) / NEIGHBOURS
        torch.testing.assert_close(found, expected.expand(2))

    def test_of_no_rows(self) -> None:
        nothing = torch.zeros(0, 4)
        assert average_distance(nothing, nothing, torch.zeros(0)).shape == (0,)
