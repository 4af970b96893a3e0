"""Groups that are flagged beyond chance."""

from typing import NamedTuple

import numpy as np

from hf_ecif.detection.groups import LEVEL, often_flagged


class Group(NamedTuple):
    rows: int
    flagged: int


def test_a_group_that_is_flagged_far_more_often() -> None:
    groups = [Group(500, 25), Group(100, 30), Group(400, 21)]
    assert often_flagged(groups, 1000, 76) == [1]


def test_one_that_is_flagged_less_often_is_not_named() -> None:
    groups = [Group(500, 100), Group(500, 2)]
    assert often_flagged(groups, 1000, 102) == [0]


def test_a_single_group_has_nothing_to_be_compared_with() -> None:
    assert often_flagged([Group(100, 50)], 100, 50) == []


def test_where_all_are_flagged_alike_hardly_any_is_named() -> None:
    draws = np.random.default_rng(0).binomial(100, 0.15, size=(400, 8))
    named = sum(
        bool(often_flagged([Group(100, int(n)) for n in flagged], 800, int(flagged.sum())))
        for flagged in draws
    )
    assert named / len(draws) < 3 * LEVEL
