"""What holds for either loss: derivatives, roles and invariances, in float64."""

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacrev

from hf_ecif.engine.objectives import Contrastive, Embeddings, RoleForm, similarity
from tests.engine.objectives.dense import (
    INFONCE,
    LOSSES,
    MASKS,
    SAME,
    SIGMOID,
    Dense,
    central_difference,
    dense_logits,
    dense_roles,
    every_direction,
    flat,
    random_tangents,
    removal,
    sigmoid_terms,
    unflat,
    with_bias,
)

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
MakeBatch = Callable[..., Embeddings]
FORMS: list[RoleForm] = ["exact", "first_order"]
GROUPS = pytest.mark.parametrize(
    "members", [[], [2], [0, 3], [1, 4, 6], [0, 1, 2, 3, 4, 5, 6], list(range(8))], ids=len
)


@pytest.fixture
def batch(tiny_batch: Embeddings) -> Embeddings:
    """8 pairs, a scale and a bias."""
    return with_bias(tiny_batch)


def chosen(members: list[int]) -> Tensor:
    return torch.isin(torch.arange(8), torch.tensor(members, dtype=torch.long))


def mean_loss(dense: Dense, batch: Embeddings, same: Tensor | None) -> Tensor:
    return dense.total(dense_logits(batch), same) / (dense.loss.TERMS * len(batch.text))


@LOSSES
def test_modules_have_the_functions_of_the_protocol(dense: Dense) -> None:
    declared = [f for f in vars(Contrastive).values() if inspect.isfunction(f) and f.__doc__]
    assert len(declared) == 11
    for function in declared:
        offered = inspect.signature(getattr(dense.loss, function.__name__))
        expected = inspect.signature(function)
        assert list(offered.parameters.values()) == list(expected.parameters.values())[1:]
        assert offered.return_annotation == expected.return_annotation


# --------------------------------------------------------------------- the loss and its curvature


@LOSSES
@MASKS
def test_loss_and_gradient(dense: Dense, batch: Embeddings, same: Tensor | None) -> None:
    leaves = Embeddings(*(x.clone().requires_grad_() for x in batch))
    oracle = mean_loss(dense, leaves, same)
    oracle.backward()
    close(dense.loss.loss(batch, same), oracle.detach())
    for actual, leaf in zip(dense.loss.linearise(batch, same).gradient(), leaves, strict=True):
        close(actual, leaf.grad)


@LOSSES
@MASKS
def test_ggn_product(dense: Dense, batch: Embeddings, same: Tensor | None) -> None:
    """``J_S^T (d2L/dS2) J_S`` from dense factors; masked cells carry no curvature."""
    logits = dense_logits(batch)
    jacobian = jacrev(lambda x: dense_logits(unflat(x, batch)).flatten())(flat(batch))
    inner = hessian(lambda x: dense.total(x.view_as(logits), same))(logits.flatten())
    oracle = jacobian.T @ inner @ jacobian / (dense.loss.TERMS * len(logits))
    actual = flat(dense.loss.linearise(batch, same).ggn_product(every_direction(batch)))
    close(actual, oracle)
    eigenvalues = torch.linalg.eigvalsh(actual)
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()


@LOSSES
@MASKS
def test_hessian_product(dense: Dense, batch: Embeddings, same: Tensor | None) -> None:
    oracle = hessian(lambda x: mean_loss(dense, unflat(x, batch), same))(flat(batch))
    close(flat(dense.loss.linearise(batch, same).hessian_product(every_direction(batch))), oracle)


@LOSSES
@MASKS
def test_hessian_product_is_the_change_of_the_gradient(
    dense: Dense, batch: Embeddings, same: Tensor | None
) -> None:
    tangents = random_tangents(batch)
    change = central_difference(
        lambda b: flat(dense.loss.linearise(b, same).gradient()), batch, tangents
    )
    close(flat(dense.loss.linearise(batch, same).hessian_product(tangents)), change)


@LOSSES
@MASKS
@pytest.mark.parametrize("block", [3, 8])
def test_what_is_kept_is_made_once(
    dense: Dense,
    batch: Embeddings,
    same: Tensor | None,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(similarity, "BLOCK", block)
    near, tangents = dense.loss.linearise(batch, same), random_tangents(batch)
    expected = near.gradient(), near.ggn_product(tangents), near.hessian_product(tangents)
    kept = near.kept()
    monkeypatch.setattr(similarity, "logits", None)  # nothing asks for them again
    actual = kept.gradient(), kept.ggn_product(tangents), kept.hessian_product(tangents)
    assert all(map(torch.equal, sum(actual, ()), sum(expected, ())))


# -------------------------------------------------------------------------- the roles of a pair


def terms_with_and_without(dense: Dense, logits: Tensor, same: Tensor | None, pair: int) -> Tensor:
    """What every partner's terms gain by a pair: ``(B,)`` by deletion, the pair's own zero."""
    stay = [n for n in range(len(logits)) if n != pair]
    rest_same = None if same is None else same[stay]
    if dense is INFONCE:
        change = dense.own(logits, same)[stay] - dense.own(logits[stay][:, stay], rest_same)
    else:
        terms = sigmoid_terms(logits, same)
        change = (terms[pair] + terms[:, pair])[stay]
    return torch.zeros(len(logits)).to(logits).index_add(0, torch.tensor(stay), change)


@LOSSES
@MASKS
@pytest.mark.parametrize("scale", [6.0, 200.0])
def test_partner_tangents(
    dense: Dense, make_batch: MakeBatch, same: Tensor | None, scale: float
) -> None:
    """Every partner's share of a negative role, by deletion; also where one answer has all."""
    batch, pairs = with_bias(make_batch(scale=scale)), torch.tensor([6, 0, 3])
    tangents = random_tangents(batch)

    def gains(b: Embeddings) -> Tensor:
        columns = [terms_with_and_without(dense, dense_logits(b), same, n) for n in pairs.tolist()]
        return torch.stack(columns, dim=1)

    actual = dense.loss.partner_tangents(batch, tangents, pairs, same=same)
    oracle = central_difference(gains, batch, tangents)
    torch.testing.assert_close(actual, oracle, rtol=1e-5, atol=1e-6)


@LOSSES
@MASKS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [3, 8])
def test_partners_add_up(
    dense: Dense,
    batch: Embeddings,
    same: Tensor | None,
    form: RoleForm,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(similarity, "BLOCK", block)
    tangents, pairs = random_tangents(batch), torch.tensor([6, 0, 3])
    partners = dense.loss.partner_tangents(batch, tangents, pairs, form=form, same=same)
    whole = dense.loss.role_tangents(batch, tangents, form=form, same=same).negative
    torch.testing.assert_close(partners.sum(dim=1), whole[:, pairs], rtol=1e-10, atol=1e-12)
    assert not partners[:, pairs, torch.arange(3)].any()


@LOSSES
@MASKS
@pytest.mark.parametrize("pair", range(8))
def test_exact_roles_are_a_deletion(
    dense: Dense, batch: Embeddings, same: Tensor | None, pair: int
) -> None:
    stay = torch.arange(8) != pair
    rest = batch._replace(text=batch.text[stay], image=batch.image[stay])
    rest_same = None if same is None else same[stay]
    before, after = dense.loss.loss(batch, same), dense.loss.loss(rest, rest_same)
    change = dense.loss.TERMS * (8 * before - 7 * after)
    actual = dense.loss.roles(batch, form="exact", same=same)
    close((actual.positive + actual.negative)[pair], change)
    close(change, removal(dense, dense_logits(batch), same, [pair]))


@LOSSES
@MASKS
def test_exact_roles(dense: Dense, batch: Embeddings, same: Tensor | None) -> None:
    actual = dense.loss.roles(batch, form="exact", same=same)
    close(actual, dense_roles(dense, dense_logits(batch), same))
    close(dense.loss.pair_losses(batch, same), actual.positive)
    close(dense.loss.pair_losses(batch, same, range(2, 5)), actual.positive[2:5])


@LOSSES
@MASKS
@pytest.mark.parametrize("moving", ["all", "text", "image", "scale", "bias"])
def test_exact_role_tangents(
    dense: Dense, batch: Embeddings, same: Tensor | None, moving: str
) -> None:
    tangents = random_tangents(batch)
    if moving != "all":
        kept = {moving: getattr(tangents, moving)}
        tangents = Embeddings(*(torch.zeros_like(x) for x in tangents))._replace(**kept)

    def oracle(b: Embeddings) -> Tensor:
        return torch.stack(dense_roles(dense, dense_logits(b), same))

    actual = dense.loss.role_tangents(batch, tangents, form="exact", same=same)
    close(torch.stack(actual, dim=1), central_difference(oracle, batch, tangents))


@LOSSES
def test_no_tangents_give_no_results(dense: Dense, batch: Embeddings) -> None:
    none = random_tangents(batch, count=0)
    assert dense.loss.role_tangents(batch, none).negative.shape == (0, 8)
    assert dense.loss.linearise(batch).hessian_product(none).text.shape == (0, 8, 5)
    assert dense.loss.group_role_tangents(batch, none, chosen([1]))[1].shape == (0,)


@LOSSES
@MASKS
@GROUPS
def test_group_roles(
    dense: Dense, batch: Embeddings, same: Tensor | None, members: list[int]
) -> None:
    logits = dense_logits(batch)
    positive, negative = dense.loss.group_roles(batch, chosen(members), same)
    close(positive, dense.own(logits, same)[members].sum())
    close(positive + negative, removal(dense, logits, same, members))
    if len(members) == 1:
        single = dense.loss.roles(batch, form="exact", same=same)
        close(torch.stack([positive, negative]), torch.stack(single)[:, members[0]])


@LOSSES
@MASKS
@GROUPS
def test_group_role_tangents(
    dense: Dense, batch: Embeddings, same: Tensor | None, members: list[int]
) -> None:
    def oracle(b: Embeddings) -> Tensor:
        own = dense.own(dense_logits(b), same)[members].sum()
        return torch.stack([own, removal(dense, dense_logits(b), same, members) - own])

    tangents = random_tangents(batch)
    actual = dense.loss.group_role_tangents(batch, tangents, chosen(members), same)
    close(torch.stack(actual, dim=1), central_difference(oracle, batch, tangents))
    if len(members) == 1:
        single = dense.loss.role_tangents(batch, tangents, form="exact", same=same)
        close(torch.stack(actual), torch.stack(single)[..., members[0]])


# ---------------------------------------------------------------------------------- masked pairs


@pytest.mark.parametrize(
    ("dense", "role"), [(INFONCE, "positive"), (SIGMOID, "negative")], ids=["infonce", "sigmoid"]
)
def test_masked_pairs_do_not_touch_each_other(dense: Dense, role: str, batch: Embeddings) -> None:
    """Pair 3 repeats caption 0: wherever it goes, pair 0 does not see it as a negative."""
    text, image = batch.text.clone(), batch.image.clone()
    text[3], image[3] = text[5], -image[5]
    other = batch._replace(text=text, image=image)
    towards_3 = Embeddings(*(torch.zeros_like(x) for x in random_tangents(batch)))
    towards_3.text[:, 3], towards_3.image[:, 3] = 1.0, -2.0

    def of_pair_0(b: Embeddings, same: Tensor | None) -> Tensor:
        return getattr(dense.loss.roles(b, same=same), role)[0]

    def change_of_pair_0(same: Tensor | None) -> Tensor:
        return getattr(dense.loss.role_tangents(batch, towards_3, same=same), role)[:, 0]

    close(of_pair_0(batch, SAME), of_pair_0(other, SAME))
    assert (of_pair_0(batch, None) - of_pair_0(other, None)).abs() > 1e-3
    assert (change_of_pair_0(SAME) == 0).all()
    assert (change_of_pair_0(None) != 0).all()


@LOSSES
@pytest.mark.parametrize("same", [[0] * 8, [0] * 7 + [1]], ids=["no negatives", "one negative"])
@pytest.mark.parametrize("form", FORMS)
def test_masking_all_but_few_gives_no_nan(
    dense: Dense, batch: Embeddings, same: list[int], form: RoleForm
) -> None:
    mask, tangents, loss = torch.tensor(same), random_tangents(batch), dense.loss
    members = torch.arange(8) < 7
    roles = loss.roles(batch, form=form, same=mask)
    changes = loss.role_tangents(batch, tangents, form=form, same=mask)
    near = loss.linearise(batch, mask)
    others = [
        *near.gradient(),
        *near.ggn_product(tangents),
        *near.hessian_product(tangents),
        *loss.group_roles(batch, members, mask),
        *loss.group_role_tangents(batch, tangents, members, mask),
    ]
    for part in [*roles, *changes, *others]:
        assert part.isfinite().all()
    if sum(same) == 0:
        assert max(part.abs().max() for part in [roles.negative, changes.negative]) < 1e-12
    if form == "exact":
        close(roles, dense_roles(dense, dense_logits(batch), mask))


# -------------------------------------------------------------------------------- invariances


def everything(
    dense: Dense,
    batch: Embeddings,
    tangents: Embeddings,
    form: RoleForm,
    same: Tensor | None,
    members: Tensor,
) -> dict[str, list[Embeddings] | list[Tensor]]:
    """All that the loss offers: per row of the batch, per pair, and per batch."""
    loss, near = dense.loss, dense.loss.linearise(batch, same)
    return {
        "embeddings": [
            near.gradient(),
            near.ggn_product(tangents),
            near.hessian_product(tangents),
        ],
        "pairs": [
            loss.pair_losses(batch, same),
            *loss.roles(batch, form=form, same=same),
            *loss.role_tangents(batch, tangents, form=form, same=same),
        ],
        "batch": [
            loss.loss(batch, same),
            *loss.group_roles(batch, members, same),
            *loss.group_role_tangents(batch, tangents, members, same),
        ],
    }


@LOSSES
@MASKS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 3])
def test_block_size_does_not_matter(
    dense: Dense,
    batch: Embeddings,
    same: Tensor | None,
    form: RoleForm,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> object:
        members = torch.arange(8) % 3 == 0
        return everything(dense, batch, random_tangents(batch), form, same, members)

    whole = run()
    monkeypatch.setattr(similarity, "BLOCK", block)
    monkeypatch.setattr(similarity, "CELLS", 16)
    torch.testing.assert_close(run(), whole, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([INFONCE, SIGMOID]),
    st.permutations(range(7)),
    st.sampled_from(FORMS),
    st.lists(st.integers(0, 6), min_size=7, max_size=7),
    st.integers(0, 1000),
)
def test_order_of_pairs_does_not_matter(
    make_batch: MakeBatch,
    dense: Dense,
    order: list[int],
    form: RoleForm,
    same: list[int],
    seed: int,
) -> None:
    batch = with_bias(make_batch(count=7, seed=seed))
    tangents = random_tangents(batch, seed)
    mask, members = torch.tensor(same), torch.arange(7) < 3

    def reordered(x: Embeddings) -> Embeddings:
        return x._replace(text=x.text[..., order, :], image=x.image[..., order, :])

    before = everything(dense, batch, tangents, form, mask, members)
    after = everything(
        dense, reordered(batch), reordered(tangents), form, mask[order], members[order]
    )
    close(after["embeddings"], [reordered(x) for x in before["embeddings"]])
    close(after["pairs"], [x[..., order] for x in before["pairs"]])
    close(after["batch"], before["batch"])


@LOSSES
@pytest.mark.parametrize("form", FORMS)
def test_text_and_image_are_alike(dense: Dense, batch: Embeddings, form: RoleForm) -> None:
    def swap(x: Embeddings) -> Embeddings:
        return x._replace(text=x.image, image=x.text)

    tangents, members = random_tangents(batch), torch.arange(8) % 3 == 0
    before = everything(dense, batch, tangents, form, SAME, members)
    after = everything(dense, swap(batch), swap(tangents), form, SAME, members)
    close(after["embeddings"], [swap(x) for x in before["embeddings"]])
    close([after["pairs"], after["batch"]], [before["pairs"], before["batch"]])


# ------------------------------------------------------------------------------- precision


@LOSSES
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("bias", [-10.0, 10.0])
def test_single_precision_is_enough(
    dense: Dense, make_batch: MakeBatch, scale: float, bias: float
) -> None:
    batch = with_bias(make_batch(count=12, dim=6, scale=scale), bias)
    narrow = Embeddings(*(x.float() for x in batch))
    wide = Embeddings(*(x.double() for x in narrow))
    tangents = random_tangents(batch)
    narrow_tangents = Embeddings(*(x.float() for x in tangents))
    wide_tangents = Embeddings(*(x.double() for x in narrow_tangents))
    members = torch.arange(12) < 5

    def run(b: Embeddings, t: Embeddings) -> list[Tensor]:
        parts = everything(dense, b, t, "exact", None, members)
        embeddings = [side for e in parts["embeddings"] for side in e[:3]]
        return [*embeddings, *parts["pairs"], *parts["batch"]]

    for actual, expected in zip(
        run(narrow, narrow_tangents), run(wide, wide_tangents), strict=True
    ):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@LOSSES
def test_a_bias_that_nobody_gave_is_zero(dense: Dense, tiny_batch: Embeddings) -> None:
    tangents = random_tangents(tiny_batch)._replace(bias=torch.zeros(3, dtype=torch.float64))
    members = torch.arange(8) < 3
    expected = everything(dense, with_bias(tiny_batch, 0.0), tangents, "exact", None, members)
    bare = Embeddings(tangents.text, tangents.image, tangents.scale)
    close(everything(dense, tiny_batch, bare, "exact", None, members), expected)
