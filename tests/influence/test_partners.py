"""The strongest partner of a pair, against every partner's terms with and without the pair."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from hf_ecif.influence import partners, scoring
from hf_ecif.influence.partners import strongest_partners
from hf_ecif.influence.response import Checkpoint, share_partitions
from tests.support.dense import (
    COUNT,
    FAMILIES,
    MASKS,
    TRAIN_COUNT,
    Dense,
    batching,
    make,
)

PAIRS = torch.tensor([[4, 0, 9], [7, 4, 2]])


def gains(theta: Tensor, dense: Dense, rows: Tensor, place: int, same: Tensor | None) -> Tensor:
    """What every partner's terms gain by the pair at a place of a batch, ``(B,)``."""
    stay = torch.arange(len(rows)) != place
    own = None if same is None else same[rows]
    logits = dense.logits(theta, rows)
    if dense.sigmoid:
        cells = dense.cells(logits, own)
        return torch.where(stay, cells[place] + cells[:, place], 0.0)
    rest = dense.own_terms(logits[stay][:, stay], None if own is None else own[stay])
    return torch.zeros_like(own_terms := dense.own_terms(logits, own)).index_copy(
        0, stay.nonzero()[:, 0], own_terms[stay] - rest
    )


@FAMILIES
@MASKS
@pytest.mark.parametrize("cells", [1, 2**24], ids=["pair by pair", "at once"])
def test_strongest_partners(
    family: str, same: Tensor | None, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partners, "CELLS", cells)
    dense, features = make(family)
    theta, how = dense.encoder.theta, batching(partitions=3, same=same)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, len(theta), generator=generator, dtype=theta.dtype)
    best = torch.full(PAIRS.shape, -1), torch.zeros(PAIRS.shape, dtype=theta.dtype)
    (order,) = scoring.row_chunks(features, 2, how, dense.encoder)
    for _, batch in how.of(order).batches(COUNT):
        rows = order[batch]
        for query, position in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            where = (rows == PAIRS[query, position]).nonzero()[:, 0].tolist()
            if not where:
                continue
            gain = partial(gains, dense=dense, rows=rows, place=where[0], same=same)
            change = jacrev(gain)(theta) @ directions[query] / (dense.factor * TRAIN_COUNT)
            strongest = int(change.abs().argmax())
            if change[strongest].abs() > best[1][query, position].abs():
                best[0][query, position] = rows[strongest]
                best[1][query, position] = change[strongest]
    found = strongest_partners(
        dense.encoder,
        [Checkpoint(theta, directions)],
        features,
        PAIRS,
        how,
        train_count=TRAIN_COUNT,
    )
    assert torch.equal(found.rows, best[0])
    torch.testing.assert_close(found.parts, best[1], rtol=1e-6, atol=1e-12)


def test_without_influence_there_is_no_partner() -> None:
    dense, features = make("clip")
    theta = dense.encoder.theta
    nowhere = Checkpoint(theta, torch.zeros(2, len(theta), dtype=theta.dtype))
    found = strongest_partners(
        dense.encoder,
        [nowhere],
        features,
        PAIRS,
        batching(),
        train_count=TRAIN_COUNT,
    )
    assert (found.rows == -1).all()
    assert not found.parts.any()


def test_of_several_checkpoints_the_strongest_meeting_counts() -> None:
    dense, features = make("clip")
    theta, how = dense.encoder.theta, batching(partitions=4)
    generator = torch.Generator().manual_seed(0)
    checkpoints = [
        Checkpoint(
            theta + shift, torch.randn(2, len(theta), generator=generator, dtype=theta.dtype)
        )
        for shift in (0.0, 0.01)
    ]
    find = partial(strongest_partners, dense.encoder, train_count=TRAIN_COUNT)
    together = find(checkpoints, features, PAIRS, how)
    alone = [
        find([checkpoint], features, PAIRS, own)
        for checkpoint, own in share_partitions(how, checkpoints)
    ]
    largest = torch.stack([one.parts for one in alone]).abs().amax(dim=0)
    assert torch.equal(together.parts.abs(), largest)
