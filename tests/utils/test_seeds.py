"""Streams are the same for the same words, and unrelated for any others."""

from itertools import combinations, pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ecif.utils.seeds import Stream, derive, stream

NAMES = get_args(Stream)
SEEDS = st.integers(0, 2**62 - 1)


@given(seed=SEEDS, name=st.sampled_from(NAMES), number=st.integers(0, 10_000))
def test_a_seed_is_one_that_torch_takes(seed: int, name: Stream, number: int) -> None:
    derived = derive(seed, name, number)
    assert 0 <= derived < 2**63
    assert stream(seed, name, number).initial_seed() == derived == derive(seed, name, number)


def test_all_streams_differ() -> None:
    """By name, by number and by seed, also where these are neighbours."""
    seeds = [derive(s, name, n) for s in range(4) for name in NAMES for n in range(4)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("by", ["name", "number", "seed"])
def test_streams_are_unrelated(by: str) -> None:
    drawn = {
        "name": [torch.randn(4000, generator=stream(0, name)) for name in NAMES],
        "number": [torch.randn(4000, generator=stream(0, "fit", n)) for n in range(8)],
        "seed": [torch.randn(4000, generator=stream(seed, "fit")) for seed in range(8)],
    }[by]
    for one, other in combinations(drawn, 2):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / 4000**0.5
    for one, other in pairwise(drawn):  # nor is one the other, some draws later
        assert not torch.isin(one[:50], other).any()
