"""Families of another form than CLIP's: derivatives, saving, and what is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AlignModel, AutoModel, BlipForImageTextRetrieval, ClapConfig, XCLIPConfig

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.objectives import Embeddings, infonce
from hf_ecif.errors import UserError
from hf_ecif.models.load import load_model
from tests.support.families import (
    OTHER_FAMILIES,
    build,
    build_inputs,
    forward,
    gaussian,
    random_cotangents,
)

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
EVERY_FAMILY = pytest.mark.parametrize("family", OTHER_FAMILIES)
EVERY_CASE = pytest.mark.parametrize(
    ("family", "parameters"),
    [(family, chosen) for family in OTHER_FAMILIES for chosen in ("projections", ".")]
    + [("groupvit", "last_block"), ("blip", "last_block"), ("align", "logit_scale|projection")],
)
COUNT = 6


def inner(left: Embeddings, right: Embeddings) -> Tensor:
    return sum((x * y).sum() for x, y in zip(left, right, strict=True))


@EVERY_CASE
def test_embed_pull_and_push_are_those_of_its_own_forward(family: str, parameters: str) -> None:
    """The pull against plain autograd; the push is its adjoint, ``<c, J t> = <J^T c, t>``."""
    encoder, inputs = DualEncoder(build(family), parameters, 4), build_inputs(family, COUNT)
    oracle = forward(build(family), encoder.names, inputs)
    frozen, theta = encoder.freeze(inputs), encoder.theta + 0.01 * gaussian(encoder.count)
    for actual, expected in zip(encoder.embed(theta, frozen), oracle(theta), strict=True):
        close(actual, expected)
    cotangents = random_cotangents(1, encoder.embed(theta, frozen))
    cotangents = cotangents._replace(bias=0 * cotangents.bias)
    moving = theta.clone().requires_grad_()
    loss = inner(Embeddings(*(part[0] for part in cotangents)), oracle(moving))
    (gradient,) = torch.autograd.grad(loss, moving)
    pulled = encoder.pull(theta, cotangents, frozen)[0]
    close(pulled, gradient, atol=1e-7)
    tangent = gaussian(1, encoder.count, seed=9)
    moved = encoder.push(theta, tangent, frozen)[1]
    close(inner(cotangents, moved), pulled @ tangent[0], rtol=1e-5)


@EVERY_FAMILY
def test_loss_and_scale(family: str) -> None:
    encoder = DualEncoder(build(family))
    assert encoder.contrastive is infonce
    assert encoder.scale == pytest.approx(float(torch.tensor(1.5).exp()))


@EVERY_FAMILY
def test_saved_as_what_it_was(family: str, tmp_path: Path) -> None:
    """The loader of transformers reads the same embeddings from it."""
    model, inputs = build(family), build_inputs(family, COUNT)
    model.save_pretrained(tmp_path)
    kind = BlipForImageTextRetrieval if family == "blip" else AutoModel
    loaded, report = kind.from_pretrained(tmp_path, dtype="float64", output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.architectures == [type(loaded).__name__]
    weights = loaded.state_dict()
    known = model.state_dict()
    for name in weights.keys() & known.keys():
        close(weights[name], known[name])
    if isinstance(loaded, AlignModel):
        close(loaded.temperature, (-known["logit_scale"]).exp())
    expected = DualEncoder(model).embed(DualEncoder(model).theta, inputs)
    again = DualEncoder(build(family), ".")  # the class of the model itself is unchanged
    assert type(again.model) is type(model)
    close(DualEncoder(model).embed(DualEncoder(model).theta, inputs).text, expected.text)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ClapConfig(), "pairs texts with sounds.*`embeddings`"),
        (XCLIPConfig(), "pairs texts with videos.*`embeddings`"),
    ],
)
def test_other_modalities_are_refused(tmp_path: Path, config: object, words: str) -> None:
    config.save_pretrained(tmp_path)  # refused before any weights are looked for
    with pytest.raises(UserError, match=words):
        load_model(str(tmp_path))
