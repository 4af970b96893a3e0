"""The objective against autograd and dense matrices of the models' own losses."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid

from hf_ecif.engine import encoder as encoders
from hf_ecif.engine import objective as operators
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Curvature, Objective, random_batches
from tests.support.families import SIGMOID, build, build_inputs, gaussian

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
BATCHES = [torch.tensor(rows) for rows in ([0, 3, 5, 7], [9, 1, 2, 4], [8, 6, 0, 1])]
SAME = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 8, 9])  # both of them in the first batch alone
L2 = 0.3
WITH_SCALE = r"projection\.|logit_scale"
# Few enough for dense matrices, in both towers.
FEW = r"layers\.1\.layer_norm1|text_(projection|model\.head)\.(weight|bias)|logit_"
FAMILIES = ["clip", "siglip", "siglip2"]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Dense:
    """Losses of a model by its own forward, as functions of ``theta``."""

    model: nn.Module
    names: list[str]
    features: Features
    sigmoid: bool

    def logits(self, theta: Tensor, rows: Tensor) -> Tensor:
        """``(B, B)``, rows texts."""
        return self._output(theta, rows).logits_per_text

    def objective(self, theta: Tensor) -> Tensor:
        """``mean over batches of the loss + l2/2 |theta|^2``."""
        losses = [self._output(theta, rows, return_loss=True).loss for rows in BATCHES]
        return torch.stack(losses).mean() + L2 / 2 * theta.square().sum()

    def ggn(self, theta: Tensor) -> Tensor:
        """``mean of J_S^T (d2L/dS2) J_S + l2 I`` from dense factors."""
        total = L2 * torch.eye(len(theta), dtype=theta.dtype)
        of_logits = sigmoid_loss if self.sigmoid else infonce_loss
        for rows in BATCHES:
            logits = partial(self.logits, rows=rows)
            jacobian = jacrev(lambda t, logits=logits: logits(t).flatten())(theta)
            inner = hessian(lambda s: of_logits(s.view(4, 4)))(logits(theta).flatten())
            total = total + jacobian.T @ inner @ jacobian / len(BATCHES)
        return total

    def _output(self, theta: Tensor, rows: Tensor, **options: bool):
        values = [self.model.get_parameter(name) for name in self.names]
        pieces = theta.split([value.numel() for value in values])
        weights = {
            name: piece.view(value.shape)
            for name, piece, value in zip(self.names, pieces, values, strict=True)
        }
        part = self.features[rows]
        with sdpa_kernel(SDPBackend.MATH):  # eager attention rounds its softmax to float32
            return functional_call(
                self.model, weights, kwargs={**part.text, **part.image, **options}
            )


def infonce_loss(logits: Tensor) -> Tensor:
    """Mean over the ``2B`` classifications."""
    terms = logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()
    return -terms.mean() / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -logsigmoid(signs * logits).sum() / len(logits)


def make(family: str, parameters: str = FEW) -> tuple[Objective, Dense]:
    """The objective, and its oracle over a model of its own."""
    inputs = build_inputs(family, 10)
    encoder = DualEncoder(build(family), parameters, micro_batch_size=3)
    objective = Objective(encoder, encoder.freeze(inputs), BATCHES, l2=L2)
    return objective, Dense(build(family), encoder.names, inputs, family in SIGMOID)


EVERY_CASE = pytest.mark.parametrize(
    ("family", "parameters"),
    [(family, parameters) for family in FAMILIES for parameters in ("projections", FEW)]
    + [("clip", "last_block"), ("clip", WITH_SCALE), ("siglip", "logit_scale")],
)


@EVERY_CASE
def test_value_and_gradient(family: str, parameters: str) -> None:
    objective, dense = make(family, parameters)
    theta = objective.encoder.theta.clone().requires_grad_()
    oracle = dense.objective(theta)
    close(objective.value(theta.detach()), oracle.detach())
    close(objective.gradient(theta.detach()), torch.autograd.grad(oracle, theta)[0])


@EVERY_FAMILY
def test_the_losses_of_the_oracle_are_the_model_s(family: str) -> None:
    _, dense = make(family)
    theta = DualEncoder(build(family), FEW).theta
    of_logits = sigmoid_loss if dense.sigmoid else infonce_loss
    losses = torch.stack([of_logits(dense.logits(theta, rows)) for rows in BATCHES])
    close(losses.mean() + L2 / 2 * theta @ theta, dense.objective(theta))


# -------------------------------------------------------------------------------- curvature


@EVERY_FAMILY
def test_ggn_is_the_dense_one(family: str) -> None:
    objective, dense = make(family)
    theta = objective.encoder.theta
    actual = objective.ggn(theta, torch.eye(len(theta), dtype=theta.dtype))
    close(actual, dense.ggn(theta))
    close(actual, actual.T)
    assert torch.linalg.eigvalsh(actual).min() > L2 * (1 - 1e-9)


@EVERY_CASE
def test_hessian_is_the_dense_one(family: str, parameters: str) -> None:
    objective, dense = make(family, parameters)
    theta = objective.encoder.theta
    vectors = gaussian(1, len(theta))
    product = partial(hessian_product, dense.objective, theta)
    close(objective.hessian(theta, vectors), torch.stack([product(v) for v in vectors]), atol=1e-7)


def hessian_product(function: Callable[[Tensor], Tensor], theta: Tensor, vector: Tensor) -> Tensor:
    """By differentiating twice backwards."""
    theta = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(function(theta), theta, create_graph=True)[0]
    return torch.autograd.grad(gradient @ vector, theta)[0]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_hessian_is_that_of_torch_func(family: str) -> None:
    parameters = r"(text|vision)_model\..*layers\.1\.layer_norm1\.bias|logit_"
    objective, dense = make(family, parameters)
    theta = objective.encoder.theta
    actual = objective.hessian(theta, torch.eye(len(theta), dtype=theta.dtype))
    close(actual, hessian(dense.objective)(theta), atol=1e-8)
    close(actual, actual.T, atol=1e-8)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_curvature_by_name(family: str) -> None:
    objective, _ = make(family)
    theta, vectors = objective.encoder.theta, gaussian(2, objective.encoder.count)
    ggn, full = (objective.curvature(kind, theta, vectors) for kind in ("ggn", "hessian"))
    assert torch.equal(ggn, objective.ggn(theta, vectors))
    assert torch.equal(full, objective.hessian(theta, vectors))
    assert (ggn - full).norm() > 0.01 * full.norm()


def test_curvatures_of_the_bias_agree() -> None:
    """Logits are linear in the bias."""
    objective, _ = make("siglip", "logit_bias")
    theta, vectors = objective.encoder.theta, gaussian(1, 1)
    close(objective.hessian(theta, vectors), objective.ggn(theta, vectors))


@pytest.mark.parametrize(("family", "parameters"), [("clip", "all"), ("siglip", "last_block")])
def test_curvature_is_symmetric_and_linear(family: str, parameters: str) -> None:
    objective, _ = make(family, parameters)
    theta = objective.encoder.theta
    left, right = gaussian(2, len(theta))
    for product in (objective.ggn, objective.hessian):
        products = product(theta, torch.stack([left, right, left - 2 * right]))
        close(left @ products[1], right @ products[0], atol=1e-7)
        close(products[2], products[0] - 2 * products[1], atol=1e-7)
    assert left @ objective.ggn(theta, left[None])[0] > L2 * left @ left


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_memory_does_not_matter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, _ = make(family)
    theta, vectors = objective.encoder.theta, gaussian(7, objective.encoder.count)
    whole = [objective.curvature(kind, theta, vectors) for kind in ("ggn", "hessian")]
    monkeypatch.setattr(encoders, "CHUNK_BYTES", 1)
    split = [objective.curvature(kind, theta, vectors) for kind in ("ggn", "hessian")]
    close(split, whole)


# ----------------------------------------------------------------------- many at one theta


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("same", [None, SAME], ids=["all negatives", "masked"])
@pytest.mark.parametrize(
    ("family", "parameters"),
    [(family, "projections") for family in FAMILIES]
    + [("clip", WITH_SCALE), ("siglip", "logit_"), ("clip", "text_projection")],
)
def test_operator_is_the_curvature(
    family: str, parameters: str, same: Tensor | None, kind: Curvature
) -> None:
    objective = replace(make(family, parameters)[0], same=same, weights=[0.2, 0.5, 0.4])
    theta = objective.encoder.theta
    product = objective.operator(kind, theta)
    for count in (1, 3, 1):
        vectors = gaussian(count, len(theta))
        close(product(vectors), objective.curvature(kind, theta, vectors))


def test_operator_of_whole_layers_is_the_curvature() -> None:
    objective, _ = make("clip", "layer_norm1")
    theta, vectors = objective.encoder.theta, gaussian(2, objective.encoder.count)
    product = objective.operator("ggn", theta)
    assert torch.equal(product(vectors), objective.ggn(theta, vectors))


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_operator_in_other_precisions(family: str, dtype: torch.dtype, kind: Curvature) -> None:
    inputs = build_inputs(family, 10)
    pixels = {key: value.to(dtype) for key, value in inputs.image.items()}
    encoder = DualEncoder(build(family).to(dtype), "projections", micro_batch_size=3)
    frozen = encoder.freeze(Features(inputs.text, pixels))
    objective, theta = Objective(encoder, frozen, BATCHES, SAME, L2), encoder.theta
    vectors = gaussian(2, len(theta)).float()
    actual = objective.operator(kind, theta)(vectors)
    expected = objective.curvature(kind, theta, vectors)
    assert actual.dtype == torch.float32
    # In half precision, batches round apart.
    assert (actual - expected).norm() <= (0.01 if dtype.itemsize < 4 else 1e-5) * expected.norm()


@pytest.mark.parametrize("budget", [0, 1, 2, 3])
def test_operator_keeps_what_it_may(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over the budget is embedded anew in every product, the rest never again."""
    objective, _ = make("clip", "projections")
    theta, embedded = objective.encoder.theta, []
    expected = objective.ggn(theta, vectors := gaussian(2, len(theta)))
    row = objective.features.bytes_per_row() + objective.encoder.bytes_per_row(
        objective.features, tangents=1
    )
    monkeypatch.setattr(operators, "KEPT_BYTES", budget * 4 * (row + 3 * 4 * 8))
    product = objective.operator("ggn", theta)
    push = DualEncoder.push

    def counted(self: DualEncoder, theta: Tensor, vectors: Tensor, features: Features) -> object:
        embedded.append(len(features))
        return push(self, theta, vectors, features)

    monkeypatch.setattr(DualEncoder, "push", counted)
    close(product(vectors), expected)
    assert sum(embedded) == 4 * (3 - budget)


class Classifier(nn.Module):
    """Row numbers to ``(2B, B)`` logits: those of the texts over those of the images.

    With ``CrossEntropyLoss`` averaged over these ``2B`` rows, and ``n`` as the class of text ``n``
    and of image ``n``, this is InfoNCE as a plain classification.
    """

    def __init__(self, model: nn.Module, features: Features) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, rows: Tensor) -> Tensor:
        part = self.features[rows]
        with sdpa_kernel(SDPBackend.MATH):
            logits = self.model(**part.text, **part.image).logits_per_text
        return torch.cat([logits, logits.T])


class Cells(Classifier):
    """Row numbers to ``(B, B)`` logits: with ``BCEWithLogitsLoss``, the sigmoid loss over ``B``."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows)[: len(rows)]


def by_curvlinops(family: str, operator: type, dense: Dense, vectors: Tensor) -> Tensor:
    if family in SIGMOID:
        module, loss, targets, factor = Cells, nn.BCEWithLogitsLoss(), torch.eye(4).double(), 4
    else:
        module, loss, targets, factor = Classifier, nn.CrossEntropyLoss(), torch.arange(4), 1
        targets = targets.repeat(2)
    matrix = operator(
        module(dense.model, dense.features),
        loss,
        [dense.model.get_parameter(name).requires_grad_() for name in dense.names],
        [(batch, targets) for batch in BATCHES],
        check_deterministic=False,
    )
    return factor * torch.stack([matrix @ vector for vector in vectors]).detach() + L2 * vectors


@pytest.mark.parametrize("parameters", [FEW, "last_block"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_curvatures_are_those_of_curvlinops(family: str, parameters: str) -> None:
    objective, dense = make(family, parameters)
    theta, vectors = objective.encoder.theta, gaussian(2, objective.encoder.count)
    ggn = by_curvlinops(family, GGNLinearOperator, dense, vectors)
    close(objective.ggn(theta, vectors), ggn, atol=1e-7)
    if parameters == FEW:  # curvlinops 3.0.1 errs in the weights of layer_norm2
        full = by_curvlinops(family, HessianLinearOperator, dense, vectors)
        close(objective.hessian(theta, vectors), full, atol=1e-7)


# ------------------------------------------------------------------------- penalty and batches


@pytest.mark.parametrize("centred", [False, True])
def test_l2_is_added_once(centred: bool) -> None:
    with_l2, _ = make("clip", "projections")
    theta = with_l2.encoder.theta
    center = gaussian(len(theta)) if centred else None
    with_l2 = replace(with_l2, center=center)
    plain = replace(with_l2, l2=0.0, center=None)
    away = theta - center if centred else theta
    vectors = gaussian(2, len(theta))
    close(with_l2.value(theta) - plain.value(theta), L2 / 2 * away @ away)
    close(with_l2.gradient(theta) - plain.gradient(theta), L2 * away)
    for kind in ("ggn", "hessian"):
        change = with_l2.curvature(kind, theta, vectors) - plain.curvature(kind, theta, vectors)
        close(change, L2 * vectors)


def test_no_penalty_at_the_centre() -> None:
    objective, _ = make("siglip", "projections")
    theta = objective.encoder.theta
    at_home, plain = replace(objective, center=theta), replace(objective, l2=0.0)
    assert torch.equal(at_home.value(theta), plain.value(theta))
    assert torch.equal(at_home.gradient(theta), plain.gradient(theta))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_over_changes_the_batches_alone(family: str) -> None:
    objective = replace(make(family)[0], same=SAME, center=gaussian(make(family)[0].encoder.count))
    theta = objective.encoder.theta
    values = [objective.over([batch]).value(theta) for batch in BATCHES]
    close(torch.stack(values).mean(), objective.value(theta))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_repeated_captions_are_told_by_row(family: str) -> None:
    """Rows 0 and 3 have equal captions; both are in the first batch and in no other."""
    objective, dense = make(family)
    masked = replace(objective, same=SAME)
    of_logits = sigmoid_loss if dense.sigmoid else infonce_loss

    def change(theta: Tensor) -> Tensor:
        logits = dense.logits(theta, BATCHES[0])
        without = logits.clone()
        without[0, 1] = without[1, 0] = -1e4
        return (of_logits(without) - of_logits(logits)) / len(BATCHES)

    theta = objective.encoder.theta
    close(masked.value(theta) - objective.value(theta), change(theta))
    differentiated = theta.clone().requires_grad_()
    expected = torch.autograd.grad(change(differentiated), differentiated)[0]
    close(masked.gradient(theta) - objective.gradient(theta), expected)
    vectors = gaussian(2, len(theta))
    products = masked.hessian(theta, vectors) - objective.hessian(theta, vectors)
    oracle = torch.stack([hessian_product(change, theta, vector) for vector in vectors])
    close(products, oracle, atol=1e-7)
    assert not torch.allclose(masked.ggn(theta, vectors), objective.ggn(theta, vectors))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_random_batches(count: int, batch_size: int, seed: int) -> None:
    batches = random_batches(count, batch_size, torch.Generator().manual_seed(seed))
    size = min(count, batch_size)
    assert {len(batch) for batch in batches} == {size}
    assert len(batches) == -(-count // size)
    assert torch.cat(batches).unique().tolist() == list(range(count))
    for batch in batches:
        assert len(batch.unique()) == size


def test_random_batches_are_random_and_repeatable() -> None:
    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [batch.tolist() for batch in random_batches(20, 5, generator)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
