"""Roles of pairs that join a batch, against those in the enlarged batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_ecif.engine.objectives import Contrastive, Embeddings, infonce, sigmoid
from hf_ecif.engine.objectives.joining import Pushed

CONTEXT, NEW = 7, 3


def pushed(seed: int, count: int, make_batch: Callable[..., Embeddings], scale: float) -> Pushed:
    here = make_batch(count, scale=scale, seed=seed)._replace(bias=torch.tensor(-2.0).double())
    generator = torch.Generator().manual_seed(seed + 50)

    def tangent(part: Tensor) -> Tensor:
        return torch.randn(2, *part.shape, generator=generator, dtype=torch.float64)

    return Pushed(here, Embeddings(*map(tangent, here)))


def enlarge(context: Embeddings, new: Embeddings, row: int) -> Embeddings:
    """A context, or its tangents, with one newcomer at its end."""
    parts = zip(context[:2], new[:2], strict=True)
    text, image = (torch.cat([a, b[..., [row], :]], dim=-2) for a, b in parts)
    return context._replace(text=text, image=image)


@pytest.mark.parametrize("scale", [3.0, 60.0])
@pytest.mark.parametrize("form", ["exact", "first_order"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_a_newcomer_has_the_roles_of_the_enlarged_batch(
    make_batch: Callable[..., Embeddings],
    loss: Contrastive,
    masked: bool,
    form: str,
    scale: float,
) -> None:
    context, new = pushed(1, CONTEXT, make_batch, scale), pushed(2, NEW, make_batch, scale)
    new = Pushed(new.here, new.moved._replace(scale=context.moved.scale, bias=context.moved.bias))
    same = (torch.tensor([0, 1, 0, 2, 3, 4, 5]), torch.tensor([0, 9, 4])) if masked else None
    along = loss.joining_tangents(context, new, form=form, same=same)
    for row in range(NEW):
        alike = torch.cat([same[0], same[1][[row]]]) if same else None
        batch = [enlarge(a, b, row) for a, b in zip(context, new, strict=True)]
        oracle = loss.role_tangents(*batch, form=form, same=alike)
        for found, expected in zip(along, oracle, strict=True):
            torch.testing.assert_close(found[:, row], expected[:, -1], rtol=1e-9, atol=1e-11)


def test_a_newcomer_whose_caption_all_others_have_changes_nothing(
    make_batch: Callable[..., Embeddings],
) -> None:
    context, new = pushed(1, CONTEXT, make_batch, 3.0), pushed(2, NEW, make_batch, 3.0)
    same = torch.zeros(CONTEXT, dtype=torch.long), torch.zeros(NEW, dtype=torch.long)
    for role in infonce.joining_tangents(context, new, same=same):
        assert torch.equal(role, torch.zeros(2, NEW).double())


@pytest.mark.parametrize("scale", [3.0, 60.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_a_newcomer_has_the_loss_of_the_enlarged_batch(
    make_batch: Callable[..., Embeddings], loss: Contrastive, masked: bool, scale: float
) -> None:
    context, new = (pushed(seed, n, make_batch, scale).here for seed, n in ((1, CONTEXT), (2, NEW)))
    same = (torch.tensor([0, 1, 0, 2, 3, 4, 5]), torch.tensor([0, 9, 4])) if masked else None
    losses = loss.joining_losses(context, new, same)
    for row in range(NEW):
        alike = torch.cat([same[0], same[1][[row]]]) if same else None
        expected = loss.pair_losses(enlarge(context, new, row), alike)[-1]
        torch.testing.assert_close(losses[row], expected, rtol=1e-9, atol=1e-12)
