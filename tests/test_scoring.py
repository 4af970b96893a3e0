"""Scores of a pass against dense gradients and a dense inverse, pair by pair."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev
from transformers import CLIPModel

from hf_ecif.encoders import DualEncoder, Features
from hf_ecif.objectives import RoleForm
from hf_ecif.scoring import Directions, Scores, score_rows

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
COUNT, TRAIN_COUNT, DAMPING = 10, 12, 0.05
PARTITIONS = [
    [torch.tensor([0, 3, 5, 7, 9]), torch.tensor([1, 2, 4, 6, 8])],
    [torch.tensor([9, 8, 7, 6, 5]), torch.tensor([4, 3, 2, 1, 0])],
    [torch.tensor([2, 0, 8, 5, 3]), torch.tensor([7, 4, 9, 1, 6])],
]
SAME = torch.tensor([0, 1, 2, 0, 4, 5, 1, 1, 8, 9])


class Dense:
    """Everything by dense matrices, from `CLIPModel.forward` and the definitions."""

    def __init__(self, model: CLIPModel, encoder: DualEncoder, features: Features) -> None:
        self.model, self.encoder, self.features = model, encoder, features

    def logits(self, theta: Tensor, rows: Tensor, same: Tensor | None = None) -> Tensor:
        shapes = [self.model.get_parameter(name).shape for name in self.encoder.names]
        pieces = theta.split([shape.numel() for shape in shapes])
        named = zip(self.encoder.names, pieces, shapes, strict=True)
        weights = {name: x.view(shape) for name, x, shape in named}
        part = self.features[rows]
        out = functional_call(self.model, weights, kwargs={**part.text, **part.image})
        if same is None:
            return out.logits_per_text
        own = same[rows]
        repeated = (own[:, None] == own[None, :]) & ~torch.eye(len(rows), dtype=torch.bool)
        return out.logits_per_text.masked_fill(repeated, -1e4)

    @staticmethod
    def own_terms(logits: Tensor) -> Tensor:
        """``-log p_nn - log q_nn``."""
        return -logits.log_softmax(1).diagonal() - logits.log_softmax(0).diagonal()

    def roles(self, logits: Tensor, form: str) -> Tensor:
        """``(2, B)``: own terms, and what the others lose when row and column ``n`` go."""
        own = self.own_terms(logits)
        count = len(logits)
        if form == "first_order":
            others = 1 - torch.eye(count, dtype=logits.dtype)
            p, q = logits.softmax(1), logits.softmax(0)
            return torch.stack([own, (p * others).sum(0) + (q * others).sum(1)])
        negative = []
        for n in range(count):
            stay = [k for k in range(count) if k != n]
            negative.append(own[stay].sum() - self.own_terms(logits[stay][:, stay]).sum())
        return torch.stack([own, torch.stack(negative)])

    def role_gradients(
        self, theta: Tensor, partition: Sequence[Tensor], form: str, same: Tensor | None
    ) -> Tensor:
        """``(2, N, P)`` for one partition without repeated rows."""
        out = torch.zeros(2, COUNT, len(theta), dtype=theta.dtype)
        for rows in partition:
            function = partial(self._roles_of, rows=rows, form=form, same=same)
            out[:, rows] = jacrev(function)(theta)
        return out

    def _roles_of(self, theta: Tensor, rows: Tensor, form: str, same: Tensor | None) -> Tensor:
        return self.roles(self.logits(theta, rows, same), form)

    def curvature(self, theta: Tensor) -> Tensor:
        """The damped GGN of the mean loss over the first partition's batches."""
        total = DAMPING * torch.eye(len(theta), dtype=theta.dtype)
        for rows in PARTITIONS[0]:
            size = len(rows)
            jacobian = jacrev(lambda t, rows=rows: self.logits(t, rows).flatten())(theta)
            fisher = hessian(
                lambda s, size=size: self.own_terms(s.view(size, size)).sum() / (2 * size)
            )(self.logits(theta, rows).flatten())
            total = total + jacobian.T @ fisher @ jacobian / len(PARTITIONS[0])
        return total


@pytest.fixture
def encoder(make_clip: Callable[..., CLIPModel]) -> DualEncoder:
    return DualEncoder(make_clip(), r"projection\.|logit_scale", micro_batch_size=4)


@pytest.fixture
def dense(
    make_clip: Callable[..., CLIPModel], encoder: DualEncoder, tiny_features: Features
) -> Dense:
    return Dense(make_clip(), encoder, tiny_features)


@pytest.fixture
def query_gradient(
    dense: Dense, encoder: DualEncoder, make_features: Callable[..., Features]
) -> Tensor:
    """Of the mean loss of four pairs that are not trained on."""
    held_out = Dense(dense.model, encoder, make_features(4, seed=9))
    return jacrev(lambda t: Dense.own_terms(held_out.logits(t, torch.arange(4))).mean() / 2)(
        encoder.theta
    )


def only_query(query: Tensor) -> Directions:
    return Directions.none(query)._replace(query=query)


@pytest.mark.parametrize("same", [None, SAME], ids=["all negatives", "masked"])
@pytest.mark.parametrize("form", ["exact", "first_order"])
def test_scores_are_the_dense_ones(
    dense: Dense,
    encoder: DualEncoder,
    query_gradient: Tensor,
    tiny_features: Features,
    form: RoleForm,
    same: Tensor | None,
) -> None:
    """``grad F^T (G + damping)^-1 grad(Pos_n + Neg_n) / 2N``; mean and standard error."""
    theta = encoder.theta
    solved = torch.linalg.solve(dense.curvature(theta), query_gradient)
    oracle = torch.stack(
        [
            dense.role_gradients(theta, partition, form, same) @ solved / (2 * TRAIN_COUNT)
            for partition in PARTITIONS
        ]
    )
    run = partial(
        score_rows,
        encoder,
        theta,
        encoder.freeze(tiny_features),
        only_query(solved),
        train_count=TRAIN_COUNT,
        form=form,
        same=same,
    )
    single = run([PARTITIONS[0]])
    close(single.positive, oracle[0, 0])
    close(single.negative, oracle[0, 1])

    ticks: list[int] = []
    several = run(PARTITIONS, advance=ticks.append)
    assert ticks == [1, 1, 1]
    close(several.positive, oracle[:, 0].mean(dim=0))
    close(several.negative, oracle[:, 1].mean(dim=0))
    close(several.task, oracle.sum(dim=1).mean(dim=0))
    close(several.stderr, oracle.sum(dim=1).std(dim=0) / len(PARTITIONS) ** 0.5)


def test_loss_and_cosine(
    dense: Dense, encoder: DualEncoder, query_gradient: Tensor, tiny_features: Features
) -> None:
    theta = encoder.theta
    scores = score_rows(
        encoder,
        theta,
        encoder.freeze(tiny_features),
        only_query(query_gradient),
        PARTITIONS,
        train_count=TRAIN_COUNT,
    )
    losses = torch.zeros(len(PARTITIONS), COUNT, dtype=theta.dtype)
    for number, partition in enumerate(PARTITIONS):
        for rows in partition:
            losses[number, rows] = Dense.own_terms(dense.logits(theta, rows))
    close(scores.loss, losses.mean(dim=0))
    logits = dense.logits(theta, torch.arange(COUNT))
    close(scores.clip_score, logits.diagonal() / dense.model.logit_scale.exp())
    close(scores.loo_loss, scores.loss + scores.self_influence)


@pytest.mark.parametrize("form", ["exact", "first_order"])
def test_self_influence_and_size(
    dense: Dense,
    encoder: DualEncoder,
    query_gradient: Tensor,
    tiny_features: Features,
    form: RoleForm,
) -> None:
    """``grad Pos_n . H^-1 grad(Pos_n + Neg_n) / 2N``, and ``|omega_n|``.

    ``omega_n = H^-1 grad(Pos_n + Neg_n) / 2N``; over partitions, its root mean square. The ``P``
    probes ``sqrt(P) e_i`` have the identity as their mean outer product, as random signs have on
    average, so the estimates are exact.
    """
    theta = encoder.theta
    inverse = torch.linalg.inv(dense.curvature(theta))
    probes = len(theta) ** 0.5 * torch.eye(len(theta), dtype=theta.dtype)
    scores = score_rows(
        encoder,
        theta,
        encoder.freeze(tiny_features),
        Directions(query_gradient, probes, probes @ inverse),
        PARTITIONS[:2],
        train_count=TRAIN_COUNT,
        form=form,
    )
    influences, squared_sizes = [], []
    for partition in PARTITIONS[:2]:
        positive, negative = dense.role_gradients(theta, partition, form, None)
        omega = (positive + negative) @ inverse / (2 * TRAIN_COUNT)
        influences.append((positive * omega).sum(dim=1))
        squared_sizes.append(omega.square().sum(dim=1))
    close(scores.self_influence, torch.stack(influences).mean(dim=0))
    close(scores.size, torch.stack(squared_sizes).mean(dim=0).sqrt())
    close(scores.relative, scores.task / scores.size)


def test_rows_met_twice_weigh_once(
    dense: Dense, encoder: DualEncoder, query_gradient: Tensor, tiny_features: Features
) -> None:
    """A last batch filled up with earlier rows: their score is the mean of both visits."""
    theta = encoder.theta
    partition = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9, 0, 1])]
    scores = score_rows(
        encoder,
        theta,
        encoder.freeze(tiny_features),
        only_query(query_gradient),
        [partition],
        train_count=TRAIN_COUNT,
    )
    visits = [
        dense.role_gradients(theta, [rows], "exact", None)[:, :2].sum(dim=0) @ query_gradient
        for rows in (partition[0], partition[2])
    ]
    close(scores.task[:2], torch.stack(visits).mean(dim=0) / (2 * TRAIN_COUNT))


def as_tensor(scores: Scores) -> Tensor:
    names = [field.name for field in fields(scores) if field.name != "scale"]
    return torch.stack([getattr(scores, name) for name in names])


@pytest.mark.parametrize("parameters", ["projections", "last_block"])
def test_micro_batches_and_order_do_not_matter(
    tiny_clip: CLIPModel, tiny_features: Features, parameters: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    encoders = [DualEncoder(tiny_clip, parameters, size) for size in (64, 1, 3, 7)]
    theta = encoders[0].theta
    vectors = torch.randn(5, len(theta), generator=generator, dtype=torch.float64)
    directions = Directions(vectors[0], *vectors[1:].split(2))
    features = encoders[0].freeze(tiny_features)
    run = partial(score_rows, theta=theta, directions=directions, train_count=TRAIN_COUNT)

    whole = as_tensor(run(encoders[0], features=features, partitions=PARTITIONS, same=SAME))
    for encoder in encoders[1:]:
        small = as_tensor(run(encoder, features=features, partitions=PARTITIONS, same=SAME))
        close(small, whole)

    order = torch.randperm(COUNT, generator=generator)
    place = order.argsort()  # row r of before is row place[r] of after
    partitions = [[place[rows].flip(0) for rows in partition] for partition in PARTITIONS]
    after = run(encoders[0], features=features[order], partitions=partitions, same=SAME[order])
    close(as_tensor(after), whole[:, order])


def test_parts_add_up() -> None:
    values = torch.arange(3.0)
    scores = Scores(*[values] * 7, scale=1.0)
    assert torch.equal(scores.task, 2 * values)
    assert torch.equal(replace(scores, loss=-values).loo_loss, torch.zeros(3))
