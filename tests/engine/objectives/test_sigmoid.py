"""What is the sigmoid loss's alone: SigLIP's own loss, its forms, and stability."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import SiglipConfig, SiglipModel

from hf_ecif.engine.objectives import Embeddings
from hf_ecif.engine.objectives.sigmoid import group_roles, linearise, loss, role_tangents, roles
from tests.engine.objectives.dense import MASKS, dense_logits, flat, random_tangents, with_bias

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
MakeBatch = Callable[..., Embeddings]


def build_siglip() -> SiglipModel:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={
            **tower,
            "num_hidden_layers": 1,
            "vocab_size": 50,
            "max_position_embeddings": 6,
            "projection_size": 16,
            "bos_token_id": 0,
            "eos_token_id": 49,
            "pad_token_id": 1,
        },
        vision_config={**tower, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(config).double().eval()
        with torch.no_grad():
            model.logit_scale.fill_(2.0)
            model.logit_bias.fill_(-3.0)
    return model


def test_loss_is_that_of_siglip() -> None:
    model = build_siglip()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 49, (5, 6), generator=generator)
    pixels = torch.randn(5, 3, 16, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
        scale, bias = model.logit_scale.exp().squeeze(), model.logit_bias.squeeze()
    close(loss(Embeddings(out.text_embeds, out.image_embeds, scale, bias)), out.loss)


def test_loss_is_the_formula_of_siglip(tiny_batch: Embeddings) -> None:
    batch = with_bias(tiny_batch)
    logits = dense_logits(batch)
    eye = torch.eye(len(logits), dtype=logits.dtype)
    loglik = logsigmoid((2 * eye - torch.ones_like(logits)) * logits)
    close(loss(batch), (-loglik.sum(dim=-1)).mean())


@MASKS
def test_both_forms_are_exact(tiny_batch: Embeddings, same: Tensor | None) -> None:
    batch = with_bias(tiny_batch)
    tangents = random_tangents(batch)
    assert torch.equal(
        torch.stack(roles(batch, form="exact", same=same)),
        torch.stack(roles(batch, form="first_order", same=same)),
    )
    assert torch.equal(
        torch.stack(role_tangents(batch, tangents, form="exact", same=same)),
        torch.stack(role_tangents(batch, tangents, form="first_order", same=same)),
    )


def test_cells_between_members_count_once(tiny_batch: Embeddings) -> None:
    batch = with_bias(tiny_batch)
    terms = -logsigmoid(-dense_logits(batch))
    single = roles(batch).negative[[1, 4]].sum()
    members = torch.isin(torch.arange(8), torch.tensor([1, 4]))
    close(group_roles(batch, members)[1], single - terms[1, 4] - terms[4, 1])


@pytest.mark.parametrize("bias", [-1e4, -10.0, 0.0, 1e4])
def test_nothing_overflows(make_batch: MakeBatch, bias: float) -> None:
    """A cell that is wrong by a margin ``m`` costs ``m``, and pulls with weight one."""
    batch = with_bias(make_batch(scale=100.0), bias)
    batch = Embeddings(*(x.float() for x in batch))
    tangents = Embeddings(*(x.float() for x in random_tangents(batch)))
    near = linearise(batch)
    values = [loss(batch), flat(near.gradient()), flat(near.hessian_product(tangents))]
    values += [*roles(batch), *role_tangents(batch, tangents)]
    assert all(value.isfinite().all() for value in values)
    if bias == -1e4:
        close(roles(batch).positive, -dense_logits(batch).diagonal())
        close(near.gradient().bias, torch.tensor(-1.0))
