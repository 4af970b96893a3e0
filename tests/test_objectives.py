"""The loss and the roles of a pair against their definitions, in float64."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacrev
from transformers import CLIPModel

from hf_ecif import objectives
from hf_ecif.encoders import Features
from hf_ecif.objectives import (
    Embeddings,
    RoleForm,
    group_roles,
    loss,
    loss_gradient,
    role_tangents,
    roles,
)

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
MakeBatch = Callable[..., Embeddings]
FORMS: list[RoleForm] = ["exact", "first_order"]
# Captions 0 and 3 and captions 1, 6 and 7 are repeated.
SAME = torch.tensor([0, 1, 2, 0, 4, 5, 1, 1])
MASKS = pytest.mark.parametrize("same", [None, SAME], ids=["all negatives", "masked"])


# ------------------------------------------------------------------------------------ oracles


def dense_logits(batch: Embeddings, same: Tensor | None = None) -> Tensor:
    """``S_ij = scale * u_i . v_j``, minus infinity where a negative is masked."""
    logits = batch.scale * batch.text @ batch.image.T
    if same is None:
        return logits
    repeated = (same[:, None] == same[None, :]) & ~torch.eye(len(same), dtype=torch.bool)
    return logits.masked_fill(repeated, -math.inf)


def own_terms(logits: Tensor) -> Tensor:
    """``-log p_nn - log q_nn`` of every pair."""
    return -logits.log_softmax(1).diagonal() - logits.log_softmax(0).diagonal()


def without(logits: Tensor, members: list[int]) -> Tensor:
    """The logits of a batch that never had these pairs."""
    stay = [n for n in range(len(logits)) if n not in members]
    return logits[stay][:, stay]


def true_removal(logits: Tensor, members: list[int]) -> Tensor:
    """What the sum of all terms loses when rows and columns are deleted."""
    return own_terms(logits).sum() - own_terms(without(logits, members)).sum()


def dense_negative(logits: Tensor, form: str) -> Tensor:
    """The negative role of every pair, from deletions or from plain softmax probabilities."""
    others = 1 - torch.eye(len(logits), dtype=logits.dtype)
    p, q = logits.softmax(1), logits.softmax(0)
    if form == "first_order":
        return ((p * others).sum(0)) + (q * others).sum(1)
    if form == "inverse":
        return (others / p).sum(0) + (others / q).sum(1)
    whole = torch.stack([true_removal(logits, [n]) for n in range(len(logits))])
    return whole - own_terms(logits)


def flat(batch: Embeddings) -> Tensor:
    return torch.cat([batch.text.flatten(-2), batch.image.flatten(-2), batch.scale[..., None]], -1)


def unflat(vectors: Tensor, like: Embeddings) -> Embeddings:
    size = like.text.numel()
    text, image, scale = vectors.split([size, size, 1], dim=-1)
    shape = (*vectors.shape[:-1], *like.text.shape)
    return Embeddings(text.reshape(shape), image.reshape(shape), scale[..., 0])


def random_tangents(batch: Embeddings, seed: int = 1, count: int = 3) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, len(flat(batch)), generator=generator, dtype=torch.float64)
    return unflat(vectors, batch)


def every_direction(batch: Embeddings) -> Embeddings:
    return unflat(torch.eye(len(flat(batch)), dtype=torch.float64), batch)


def central_difference(
    function: Callable[[Embeddings], Tensor], batch: Embeddings, tangents: Embeddings
) -> Tensor:
    """``(f(x + h t) - f(x - h t)) / 2h`` for every tangent."""
    step, point = 1e-5, flat(batch)
    return torch.stack(
        [
            (function(unflat(point + step * t, batch)) - function(unflat(point - step * t, batch)))
            / (2 * step)
            for t in flat(tangents)
        ]
    )


# --------------------------------------------------------------------- the loss and its curvature


def test_loss_is_that_of_clip(tiny_clip: CLIPModel, tiny_features: Features) -> None:
    with torch.no_grad():
        out = tiny_clip(**tiny_features.text, **tiny_features.image, return_loss=True)
        batch = Embeddings(out.text_embeds, out.image_embeds, tiny_clip.logit_scale.exp())
    close(loss(batch), out.loss)


@MASKS
def test_gradient(tiny_batch: Embeddings, same: Tensor | None) -> None:
    leaves = Embeddings(*(x.clone().requires_grad_() for x in tiny_batch))
    oracle = own_terms(dense_logits(leaves, same)).sum() / (2 * len(tiny_batch.text))
    oracle.backward()
    for actual, leaf in zip(loss_gradient(tiny_batch, same), leaves, strict=True):
        close(actual, leaf.grad)
    close(loss(tiny_batch, same), oracle.detach())


@MASKS
def test_ggn_product(tiny_batch: Embeddings, same: Tensor | None) -> None:
    """``J_S^T (d2L/dS2) J_S`` from dense factors; masked cells carry no curvature."""
    point = flat(tiny_batch)
    count = len(tiny_batch.text)
    jacobian = jacrev(lambda x: dense_logits(unflat(x, tiny_batch)).flatten())(point)

    def of_logits(logits: Tensor) -> Tensor:
        square = logits.view(count, count)
        if same is not None:  # a large finite number stands for infinity: exp(-1e4) is zero
            square = square + dense_logits(tiny_batch, same).isinf() * -1e4
        return own_terms(square).sum() / (2 * count)

    fisher = hessian(of_logits)(dense_logits(tiny_batch).flatten())
    dense = jacobian.T @ fisher @ jacobian
    actual = flat(objectives.ggn_product(tiny_batch, every_direction(tiny_batch), same))
    close(actual, dense)
    eigenvalues = torch.linalg.eigvalsh(actual)
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()


# -------------------------------------------------------------------------- the roles of a pair


@MASKS
@pytest.mark.parametrize("form", FORMS)
def test_roles(tiny_batch: Embeddings, same: Tensor | None, form: RoleForm) -> None:
    logits = dense_logits(tiny_batch, same)
    actual = roles(tiny_batch, form=form, same=same)
    close(actual.positive, own_terms(logits))
    close(actual.negative, dense_negative(logits, form))


@MASKS
@pytest.mark.parametrize("pair", range(8))
def test_exact_roles_are_a_deletion(tiny_batch: Embeddings, same: Tensor | None, pair: int) -> None:
    stay = torch.arange(8) != pair
    rest = Embeddings(tiny_batch.text[stay], tiny_batch.image[stay], tiny_batch.scale)
    rest_same = None if same is None else same[stay]
    change = 16 * loss(tiny_batch, same) - 14 * loss(rest, rest_same)
    actual = roles(tiny_batch, form="exact", same=same)
    close((actual.positive + actual.negative)[pair], change)
    close(change, true_removal(dense_logits(tiny_batch, same), [pair]))


@MASKS
@pytest.mark.parametrize("members", [[2], [0, 3], [1, 4, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_group_roles(tiny_batch: Embeddings, same: Tensor | None, members: list[int]) -> None:
    logits = dense_logits(tiny_batch, same)
    chosen = torch.isin(torch.arange(8), torch.tensor(members))
    positive, negative = group_roles(tiny_batch, chosen, same)
    close(positive, own_terms(logits)[members].sum())
    close(positive + negative, true_removal(logits, members))
    if len(members) == 1:
        single = roles(tiny_batch, form="exact", same=same)
        close(torch.stack([positive, negative]), torch.stack(single)[:, members[0]])


@MASKS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moving", ["all", "text", "image", "scale"])
def test_role_tangents(
    tiny_batch: Embeddings, same: Tensor | None, form: RoleForm, moving: str
) -> None:
    tangents = random_tangents(tiny_batch)
    if moving != "all":
        kept = {moving: getattr(tangents, moving)}
        tangents = Embeddings(*(torch.zeros_like(x) for x in tangents))._replace(**kept)
    actual = role_tangents(tiny_batch, tangents, form=form, same=same)
    close(
        actual.positive,
        central_difference(lambda b: own_terms(dense_logits(b, same)), tiny_batch, tangents),
    )
    close(
        actual.negative,
        central_difference(
            lambda b: dense_negative(dense_logits(b, same), form), tiny_batch, tangents
        ),
    )


def test_only_the_probability_predicts_a_deletion(make_batch: MakeBatch) -> None:
    """Gradients of the negative role by form; that of ``sum_j exp(S_kj) / exp(S_kn)`` is wrong."""
    batch = make_batch(count=10, dim=6)
    point = flat(batch)

    def gradients(form: str) -> Tensor:
        return jacrev(lambda x: dense_negative(dense_logits(unflat(x, batch)), form))(point)

    ours = {
        form: role_tangents(batch, every_direction(batch), form=form).negative.T for form in FORMS
    }
    true = gradients("deletion")

    def cosine(of: Tensor) -> Tensor:
        return torch.cosine_similarity(of, true, dim=1)

    def ranks_agree(values: Tensor) -> float:
        ranks = [x.argsort().argsort().double() for x in (values, dense_negative(logits, "exact"))]
        return float(torch.corrcoef(torch.stack(ranks))[0, 1])

    logits = dense_logits(batch)
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
    return Embeddings(
        text.float().to(dtype), image.float().to(dtype), torch.tensor(100.0).to(dtype)
    )


@pytest.mark.parametrize("form", FORMS)
def test_saturated_softmax(form: RoleForm) -> None:
    wide, narrow = saturated_batch(torch.float64), saturated_batch(torch.float32)
    assert dense_logits(narrow).softmax(1)[2, 4] == 1
    tangents = random_tangents(wide)
    tangents = Embeddings(*(t.float().double() for t in tangents))
    narrow_tangents = Embeddings(*(t.float() for t in tangents))

    close(
        torch.stack(roles(wide, form=form)),
        torch.stack([own_terms(dense_logits(wide)), dense_negative(dense_logits(wide), form)]),
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


def test_masked_pairs_do_not_touch_each_other(tiny_batch: Embeddings) -> None:
    """Pair 3 repeats caption 0: wherever it goes, pair 0's own terms stay."""
    text, image = tiny_batch.text.clone(), tiny_batch.image.clone()
    text[3], image[3] = text[5], -image[5]
    other = Embeddings(text, image, tiny_batch.scale)
    before, after = roles(tiny_batch, same=SAME), roles(other, same=SAME)
    close(before.positive[0], after.positive[0])
    assert (roles(tiny_batch).positive[0] - roles(other).positive[0]).abs() > 1e-3

    towards_3 = Embeddings(*(torch.zeros_like(x) for x in random_tangents(tiny_batch)))
    towards_3.text[:, 3], towards_3.image[:, 3] = 1.0, -2.0
    assert (role_tangents(tiny_batch, towards_3, same=SAME).positive[:, 0] == 0).all()
    assert (role_tangents(tiny_batch, towards_3).positive[:, 0] != 0).all()


@pytest.mark.parametrize("same", [[0] * 8, [0] * 7 + [1]], ids=["no negatives", "one negative"])
@pytest.mark.parametrize("form", FORMS)
def test_masking_all_but_few_gives_no_nan(
    tiny_batch: Embeddings, same: list[int], form: RoleForm
) -> None:
    mask = torch.tensor(same)
    tangents = random_tangents(tiny_batch)
    value = roles(tiny_batch, form=form, same=mask)
    change = role_tangents(tiny_batch, tangents, form=form, same=mask)
    gradient = loss_gradient(tiny_batch, mask)
    product = objectives.ggn_product(tiny_batch, tangents, mask)
    for part in [*value, *change, *gradient, *product]:
        assert part.isfinite().all()
        if sum(same) == 0:
            assert part.abs().max() < 1e-12
    close(value.negative, dense_negative(dense_logits(tiny_batch, mask), form))
    oracle = central_difference(
        lambda b: dense_negative(dense_logits(b, mask), form), tiny_batch, tangents
    )
    close(change.negative, oracle)


# -------------------------------------------------------------------------------- invariances


@MASKS
@pytest.mark.parametrize("form", FORMS)
def test_block_size_does_not_matter(
    tiny_batch: Embeddings, same: Tensor | None, form: RoleForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    tangents = random_tangents(tiny_batch)
    members = torch.arange(8) % 3 == 0

    def everything() -> list[Tensor]:
        return [
            loss(tiny_batch, same),
            *loss_gradient(tiny_batch, same),
            *objectives.ggn_product(tiny_batch, tangents, same),
            *roles(tiny_batch, form=form, same=same),
            *role_tangents(tiny_batch, tangents, form=form, same=same),
            *group_roles(tiny_batch, members, same),
        ]

    whole = everything()
    monkeypatch.setattr(objectives, "BLOCK", 3)
    for blocked, expected in zip(everything(), whole, strict=True):
        torch.testing.assert_close(blocked, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.sampled_from(FORMS), st.integers(0, 1000))
def test_order_of_pairs_does_not_matter(
    make_batch: MakeBatch, order: list[int], form: RoleForm, seed: int
) -> None:
    batch = make_batch(count=7, seed=seed)
    tangents = random_tangents(batch, seed)

    def reordered(x: Embeddings) -> Embeddings:
        return Embeddings(x.text[..., order, :], x.image[..., order, :], x.scale)

    close(loss(reordered(batch)), loss(batch))
    close(loss_gradient(reordered(batch)), reordered(loss_gradient(batch)))
    close(
        objectives.ggn_product(reordered(batch), reordered(tangents)),
        reordered(objectives.ggn_product(batch, tangents)),
    )
    for actual, expected in [
        (roles(reordered(batch), form=form), roles(batch, form=form)),
        (
            role_tangents(reordered(batch), reordered(tangents), form=form),
            role_tangents(batch, tangents, form=form),
        ),
    ]:
        close(torch.stack(actual), torch.stack(expected)[..., order])


@pytest.mark.parametrize("form", FORMS)
def test_text_and_image_are_alike(tiny_batch: Embeddings, form: RoleForm) -> None:
    def swap(x: Embeddings) -> Embeddings:
        return Embeddings(x.image, x.text, x.scale)

    tangents = random_tangents(tiny_batch)
    close(loss(swap(tiny_batch)), loss(tiny_batch))
    close(swap(loss_gradient(swap(tiny_batch))), loss_gradient(tiny_batch))
    close(roles(swap(tiny_batch), form=form), roles(tiny_batch, form=form))
    close(
        role_tangents(swap(tiny_batch), swap(tangents), form=form),
        role_tangents(tiny_batch, tangents, form=form),
    )
