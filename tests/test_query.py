from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.encoders import Features
from hf_ecif.features import Rows
from hf_ecif.objectives import Embeddings
from hf_ecif.query import choose_query

COUNT, GROUPS = 144, 3  # as many rows as make choose_query form three clusters


def build_rows(text: Tensor, image: Tensor) -> Rows:
    return Rows(
        features=Features({"pooled": normalize(text, dim=1)}, {"pooled": normalize(image, dim=1)}),
        positions=torch.arange(len(text)) + 5,
        texts=[f"caption {i}" for i in range(len(text))],
        reasons={0: "image missing"},
        total=len(text) + 5,
    )


def as_embeddings(theta: Tensor, features: Features) -> Embeddings:
    return Embeddings(features.text["pooled"], features.image["pooled"], theta)


ENCODER: Any = SimpleNamespace(theta=torch.tensor(1.0), embed=as_embeddings)


def build_groups(seed: int) -> tuple[Rows, Tensor]:
    """Three groups of images; the model knows the first best, and in each some rows better."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(COUNT) % GROUPS
    image = torch.eye(GROUPS)[group] + 0.01 * torch.randn(COUNT, GROUPS, generator=generator)
    noise = torch.randn(COUNT, GROUPS, generator=generator)
    return build_rows(image + 0.3 * (1 + 3 * group[:, None]) * noise, image), group


def aligned(rows: Rows) -> Tensor:
    return (rows.features.text["pooled"] * rows.features.image["pooled"]).sum(dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_best_aligned_pairs_of_every_cluster(seed: int) -> None:
    rows, group = build_groups(seed)
    query = choose_query(rows, ENCODER, share=0.1, seed=seed)
    expected: set[int] = set()
    for members in ((group == g).nonzero()[:, 0] for g in range(GROUPS)):
        best = aligned(rows)[members].topk(round(0.1 * len(members))).indices
        expected |= {int(position) for position in rows.positions[members[best]]}
    assert set(query.positions.tolist()) == expected
    assert len(query) == len(expected)


def test_chosen_rows_keep_caption_and_features() -> None:
    rows, _ = build_groups(0)
    query = choose_query(rows, ENCODER)
    chosen = query.positions - 5
    assert query.texts == [rows.texts[i] for i in chosen.tolist()]
    assert torch.equal(query.features.text["pooled"], rows.features.text["pooled"][chosen])
    assert torch.equal(query.features.image["pooled"], rows.features.image["pooled"][chosen])
    assert (query.reasons, query.total) == ({}, len(query))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (3, 2), (10, 2), (40, 4)])
def test_few_rows(count: int, expected: int) -> None:
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(2, count, 4, generator=generator)
    query = choose_query(build_rows(text, image), ENCODER)
    assert expected <= len(query) <= expected + 2
    assert len(set(query.positions.tolist())) == len(query)


def test_equal_seed_gives_equal_choice() -> None:
    rows, _ = build_groups(0)
    first, second = (choose_query(rows, ENCODER, seed=4).positions for _ in range(2))
    assert torch.equal(first, second)
