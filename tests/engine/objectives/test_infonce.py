"""What is InfoNCE's alone: CLIP's own loss, the first-order role, and a saturated softmax."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import jacrev
from transformers import CLIPModel

from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import Embeddings, LinearisedLoss, RoleForm, similarity
from hf_ecif.engine.objectives.infonce import (
    group_role_tangents,
    group_roles,
    linearise,
    loss,
    role_tangents,
    roles,
)
from tests.engine.objectives.dense import (
    INFONCE,
    MASKS,
    central_difference,
    dense_logits,
    dense_roles,
    every_direction,
    flat,
    infonce_own,
    random_tangents,
    repeated,
    unflat,
    with_bias,
)

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
MakeBatch = Callable[..., Embeddings]
FORMS: list[RoleForm] = ["exact", "first_order"]


def dense_negative(logits: Tensor, form: str, same: Tensor | None = None) -> Tensor:
    """The negative role of every pair, from deletions or from plain softmax probabilities."""
    if form == "exact":
        return dense_roles(INFONCE, logits, same).negative
    if same is not None:
        logits = logits.masked_fill(repeated(same), -torch.inf)
    others = 1 - torch.eye(len(logits), dtype=logits.dtype)
    p, q = logits.softmax(1), logits.softmax(0)
    if form == "inverse":
        p, q = 1 / p, 1 / q
    return (p * others).sum(0) + (q * others).sum(1)


def test_loss_is_that_of_clip(tiny_clip: CLIPModel, tiny_features: Features) -> None:
    with torch.no_grad():
        out = tiny_clip(**tiny_features.text, **tiny_features.image, return_loss=True)
        batch = Embeddings(out.text_embeds, out.image_embeds, tiny_clip.logit_scale.exp())
    close(loss(batch), out.loss)


def test_the_bias_is_not_seen(tiny_batch: Embeddings) -> None:
    biased, tangents = with_bias(tiny_batch, 3.0), random_tangents(tiny_batch)
    bare = tangents._replace(bias=torch.zeros(3, dtype=torch.float64))
    assert loss(biased) == loss(tiny_batch)
    assert linearise(biased).gradient().bias == 0
    for product in [LinearisedLoss.ggn_product, LinearisedLoss.hessian_product]:
        seen = product(linearise(biased), tangents)
        close(seen, product(linearise(tiny_batch), bare))
        assert seen.bias.tolist() == [0, 0, 0]


@MASKS
def test_first_order_roles(tiny_batch: Embeddings, same: Tensor | None) -> None:
    logits, tangents = dense_logits(tiny_batch), random_tangents(tiny_batch)
    actual = roles(tiny_batch, form="first_order", same=same)
    close(actual.positive, infonce_own(logits, same))
    close(actual.negative, dense_negative(logits, "first_order", same))

    moved = role_tangents(tiny_batch, tangents, form="first_order", same=same)
    close(moved.positive, role_tangents(tiny_batch, tangents, same=same).positive)
    oracle = central_difference(
        lambda b: dense_negative(dense_logits(b), "first_order", same), tiny_batch, tangents
    )
    close(moved.negative, oracle)


@MASKS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [3, 1024])
def test_role_tangents_by_parts(
    make_batch: MakeBatch,
    same: Tensor | None,
    form: RoleForm,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tangents of the logits of all tangents at a time, or of one: the same numbers."""
    batch = make_batch(dim=5, scale=30.0)
    tangents = random_tangents(batch, count=5)._replace(bias=torch.zeros(()))
    monkeypatch.setattr(similarity, "BLOCK", block)

    whole = torch.stack(role_tangents(batch, tangents, form=form, same=same))
    monkeypatch.setattr(similarity, "CELLS", 1)
    parts = torch.stack(role_tangents(batch, tangents, form=form, same=same))
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


def test_only_the_probability_predicts_a_deletion(make_batch: MakeBatch) -> None:
    """Gradients of the negative role by form; that of ``sum_j exp(S_kj) / exp(S_kn)`` is wrong."""
    batch = with_bias(make_batch(count=10, dim=6), 0.0)
    point, logits = flat(batch), dense_logits(batch)

    def gradients(form: str) -> Tensor:
        return jacrev(lambda x: dense_negative(dense_logits(unflat(x, batch)), form))(point)

    ours = {
        form: role_tangents(batch, every_direction(batch), form=form).negative.T for form in FORMS
    }
    true = gradients("exact")

    def cosine(of: Tensor) -> Tensor:
        return torch.cosine_similarity(of, true, dim=1)

    def ranks_agree(values: Tensor) -> float:
        ranks = [x.argsort().argsort().double() for x in (values, dense_negative(logits, "exact"))]
        return float(torch.corrcoef(torch.stack(ranks))[0, 1])

    close(ours["exact"], true)
    assert cosine(ours["first_order"]).min() > 0.8
    assert cosine(gradients("inverse")).max() < 0.2
    assert ranks_agree(roles(batch, form="first_order").negative) > 0.9
    assert ranks_agree(dense_negative(logits, "inverse")) < 0.2


# ---------------------------------------------------------------------------- hard numerical cases


def saturated_batch(dtype: torch.dtype) -> Embeddings:
    """Text 2 is image 4, at scale 100: ``1 - p_24`` is far below float32's resolution."""
    generator = torch.Generator().manual_seed(3)
    image = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    text = image + 0.2 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    text[2] = image[4]
    text = text / text.norm(dim=1, keepdim=True)
    # Round to float32 in any case: both precisions get the same batch.
    rounded = (text.float(), image.float(), torch.tensor(100.0), torch.tensor(0.0))
    return Embeddings(*(x.to(dtype) for x in rounded))


@pytest.mark.parametrize("form", FORMS)
def test_saturated_softmax(form: RoleForm) -> None:
    wide, narrow = saturated_batch(torch.float64), saturated_batch(torch.float32)
    assert dense_logits(narrow).softmax(1)[2, 4] == 1
    tangents = Embeddings(*(t.float().double() for t in random_tangents(wide)))
    narrow_tangents = Embeddings(*(t.float() for t in tangents))

    logits = dense_logits(wide)
    close(
        torch.stack(roles(wide, form=form)),
        torch.stack([infonce_own(logits), dense_negative(logits, form)]),
    )
    oracle = central_difference(lambda b: dense_negative(dense_logits(b), form), wide, tangents)
    reference = role_tangents(wide, tangents, form=form)
    torch.testing.assert_close(reference.negative, oracle, rtol=1e-5, atol=1e-5)

    for actual, expected in [
        (roles(narrow, form=form), roles(wide, form=form)),
        (role_tangents(narrow, narrow_tangents, form=form), reference),
    ]:
        difference = torch.stack(actual).double() - torch.stack(expected)
        assert difference.norm() <= 1e-4 * torch.stack(expected).norm()


def test_saturated_softmax_of_a_group() -> None:
    """Pair 4 and another leave: text 2 loses nearly all that its softmax holds."""
    wide, narrow = saturated_batch(torch.float64), saturated_batch(torch.float32)
    members = torch.tensor([False, True, False, False, True, False])
    tangents = Embeddings(*(t.float().double() for t in random_tangents(wide)))
    narrow_tangents = Embeddings(*(t.float() for t in tangents))
    for actual, expected in [
        (group_roles(narrow, members), group_roles(wide, members)),
        (
            group_role_tangents(narrow, narrow_tangents, members),
            group_role_tangents(wide, tangents, members),
        ),
    ]:
        torch.testing.assert_close(
            torch.stack(actual).double(), torch.stack(expected), rtol=1e-4, atol=1e-5
        )
