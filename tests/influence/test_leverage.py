"""Curvature without a pair against dense matrices and true retraining, in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from datasets import load_dataset
from torch import Tensor
from torch.func import hessian, jacrev
from torch.nn.functional import logsigmoid

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.low_rank import DivergenceError
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.engine.objectives import Contrastive, Embeddings, infonce, sigmoid
from hf_ecif.engine.system import Spectrum
from hf_ecif.influence.leverage import change_without, leverage, leverage_along, memorised
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.removal import remove
from tests.conftest import build_batch
from tests.support import DEMO
from tests.support.families import build, build_inputs
from tests.support.retraining import BATCHES, L2, PAIRS, WRONG, Study, spearman

close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-10)
SAME = torch.tensor([0, 1, 2, 0, 4, 5, 1, 1])
LOSSES = pytest.mark.parametrize("loss", [infonce, sigmoid], ids=["infonce", "sigmoid"])
DAMPING = 0.02


# ------------------------------------------------------------------- in the space of the logits


def of_logits(loss: Any, same: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``TERMS * B * loss`` of logits ``(B, B)``, written out."""

    def value(logits: Tensor) -> Tensor:
        count = len(logits)
        own = torch.eye(count, dtype=torch.bool)
        alike = torch.zeros_like(own) if same is None else (same[:, None] == same) & ~own
        if loss is sigmoid:
            signs = 2 * own.to(logits) - 1
            return -logsigmoid(signs * logits)[~alike].sum()
        logits = logits.masked_fill(alike, -torch.inf)
        return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().sum()

    return value


def dense_leaving(
    loss: Any, batch: Embeddings, tangents: Embeddings, same: Tensor | None
) -> Tensor:
    """From dense Hessians by the logits, before and after a row and a column are struck out."""
    logits = batch.scale * batch.text @ batch.image.T + batch.bias

    def moved(step: Tensor) -> Tensor:
        text, image, scale, bias = (
            part + torch.tensordot(step, tangent, 1)
            for part, tangent in zip(batch, tangents, strict=True)
        )
        return scale * text @ image.T + bias

    jacobian = jacrev(moved)(torch.zeros(len(tangents.scale), dtype=torch.float64))

    def curvature(stay: Tensor) -> Tensor:
        rest = None if same is None else same[stay]
        inner = hessian(of_logits(loss, rest))(logits[stay][:, stay])
        part = jacobian[stay][:, stay]
        return torch.einsum("ija,ijkl,klb->ab", part, inner, part)

    every = torch.arange(len(logits))
    whole = curvature(every)
    return torch.stack([whole - curvature(every[every != n]) for n in every])


def random_tangents(batch: Embeddings, count: int = 3) -> Embeddings:
    generator = torch.Generator().manual_seed(5)
    return Embeddings(
        *(
            torch.randn(count, *part.shape, generator=generator, dtype=torch.float64)
            for part in batch
        )
    )


@LOSSES
@pytest.mark.parametrize("same", [None, SAME], ids=["all", "same"])
@pytest.mark.parametrize("scale", [0.5, 6.0, 60.0])  # flat, common, one entry nearly all
def test_leaving_curvature_is_the_dense_one(
    loss: Contrastive, same: Tensor | None, scale: float
) -> None:
    bias = torch.tensor(-2.0 if loss is sigmoid else 0.0, dtype=torch.float64)
    batch = build_batch(scale=scale)._replace(bias=bias)
    tangents = random_tangents(batch)
    oracle = dense_leaving(loss, batch, tangents, same)
    actual = loss.leaving_curvature(batch, tangents, same)
    close(actual, oracle, rtol=1e-9, atol=1e-9 * oracle.abs().max().item())
    close(actual, actual.mT)


@LOSSES
def test_of_two_pairs_each_takes_everything(loss: Contrastive) -> None:
    """For InfoNCE: one logit alone has no softmax. The sigmoid loss keeps the other's own cell."""
    batch = build_batch(2)
    tangents = random_tangents(batch)
    close(loss.leaving_curvature(batch, tangents), dense_leaving(loss, batch, tangents, None))


def test_a_pair_that_others_take_for_theirs_keeps_its_digits() -> None:
    """Rows 0 and 1 give their softmax to each other, but for 1e-5, of which float32 has few digits.

    What is left of it is all that a third pair takes along.
    """
    text = torch.eye(3, dtype=torch.float64)
    batch = Embeddings(text, text[[1, 0, 2]], torch.tensor(12.0, dtype=torch.float64))
    tangents = random_tangents(batch)
    oracle = dense_leaving(infonce, batch, tangents, None)
    single = infonce.leaving_curvature(
        Embeddings(*(part.float() for part in batch)),
        Embeddings(*(part.float() for part in tangents)),
    )
    for actual, expected in zip(single.double(), oracle, strict=True):
        assert (actual - expected).norm() < 1e-5 * expected.norm()


# --------------------------------------------------------------------- in that of the parameters


class Dense:
    """Matrices of a small model: gradients and curvatures of whole objectives, with and without."""

    def __init__(self, family: str, *, masked: bool = False) -> None:
        inputs = build_inputs(family, 10)
        few = {
            "clip": r"text_projection\.weight|logit_",
            "siglip": r"text_model\.(head\.bias|final_layer_norm)|logit_",
        }
        encoder = DualEncoder(build(family), few[family])
        # Ten rows in batches of four: two of them are there twice.
        batches = random_batches(10, 4, torch.Generator().manual_seed(3))
        same = torch.tensor([0, 1, 2, 0, 4, 2, 6, 7, 4, 9]) if masked else None
        features = encoder.freeze(inputs)
        self.objective = Objective(encoder, features, batches, same, l2=0.1)
        self.theta = encoder.theta
        self.size = len(self.theta)
        self.eye = torch.eye(self.size, dtype=torch.float64)
        self.whole = self.objective.ggn(self.theta, self.eye) + DAMPING * self.eye
        self.query = Objective(encoder, features, [torch.arange(6)])
        self.gradient = self.query.gradient(self.theta)
        self.directions = torch.linalg.solve(self.whole, self.gradient)

    def without(self, *rows: int) -> tuple[Tensor, Tensor]:
        """``r`` and ``H - H_n + damping I`` of rows that leave."""
        rest = self.objective.without(self.members(*rows))
        leaving = self.objective.gradient(self.theta) - rest.gradient(self.theta)
        return leaving, rest.ggn(self.theta, self.eye) + DAMPING * self.eye

    def change(self, *rows: int) -> Tensor:
        gradient, remaining = self.without(*rows)
        return torch.linalg.solve(remaining, gradient)

    def members(self, *rows: int) -> Tensor:
        gone = torch.zeros(10, dtype=torch.bool)
        gone[list(rows)] = True
        return gone


CASES = pytest.mark.parametrize(
    ("family", "masked"), [("clip", False), ("clip", True), ("siglip", False), ("siglip", True)]
)


@CASES
def test_in_the_whole_space_leverage_is_exact(family: str, masked: bool) -> None:
    dense = Dense(family, masked=masked)
    twice = torch.bincount(torch.cat(list(dense.objective.batches)))
    assert twice.max() == 2
    result = leverage(
        dense.objective, dense.theta, dense.gradient, dense.directions, DAMPING, dense.eye
    )
    for row in range(10):
        close(result.score[row], dense.gradient @ dense.change(row))
        factor = torch.linalg.cholesky(dense.whole)
        share = torch.linalg.solve(factor, dense.whole - dense.without(row)[1])
        oracle = torch.linalg.eigvals(torch.linalg.solve(factor.T, share)).real.max()
        close(result.leverage[row], oracle)
    assert ((result.leverage > 0) & (result.leverage < 1)).all()


def test_first_order_changes_the_gradient_alone() -> None:
    dense = Dense("clip")
    one = replace(dense.objective, batches=[torch.arange(10)])
    whole = one.ggn(dense.theta, dense.eye) + DAMPING * dense.eye
    directions = torch.linalg.solve(whole, dense.gradient)
    result = leverage(
        one, dense.theta, dense.gradient, directions, DAMPING, dense.eye, form="first_order"
    )
    embeddings, moved = one.encoder.push(dense.theta, dense.eye, one.features)
    roles = infonce.role_tangents(embeddings, moved, form="first_order")
    gradients = (roles.positive + roles.negative).T / 20
    for row in range(10):
        rest = one.without(dense.members(row)).ggn(dense.theta, dense.eye) + DAMPING * dense.eye
        oracle = dense.gradient @ torch.linalg.solve(rest, gradients[row])
        close(result.score[row], oracle)


def test_several_queries() -> None:
    dense = Dense("clip")
    gradients = torch.stack([dense.gradient, dense.gradient.flip(0)])
    directions = torch.linalg.solve(dense.whole, gradients.T).T
    result = leverage(dense.objective, dense.theta, gradients, directions, DAMPING, dense.eye)
    assert result.score.shape == (2, 10)
    for row in range(10):
        change = dense.change(row)
        for query in range(2):
            close(result.score[query, row], gradients[query] @ change)


def test_a_subspace_keeps_the_plain_score_and_bounds_the_leverage() -> None:
    dense = Dense("clip")
    run = partial(leverage, dense.objective, dense.theta, dense.gradient, dense.directions, DAMPING)
    alone = run(dense.eye[:0])
    # Along one direction s alone the Galerkin answer is a quotient: s.r / (1 - s.H_n s / s.H s).
    for row in range(10):
        gradient, remaining = dense.without(row)
        s = dense.directions
        share = 1 - s @ remaining @ s / (s @ dense.whole @ s)
        close(alone.score[row], s @ gradient / (1 - share))
    vectors = torch.linalg.eigh(dense.whole).eigenvectors
    shares = [run(vectors.T[-rank:]).leverage for rank in (5, 20, dense.size)]
    for smaller, larger in zip([alone.leverage, *shares[:-1]], shares, strict=True):
        assert (smaller <= larger + 1e-9).all()


def test_without_a_damping_or_a_penalty_there_may_be_no_inverse() -> None:
    dense = Dense("clip")
    flat = replace(dense.objective, l2=0.0)
    with pytest.raises(DivergenceError, match="Raise the damping"):
        leverage(flat, dense.theta, dense.gradient, dense.directions, 0.0, dense.eye)


# ------------------------------------------------------------------------- one solve for each


def solved(dense: Dense, members: list[Tensor], **options: Any) -> Tensor:
    change, report = change_without(
        dense.objective,
        dense.theta,
        torch.stack(members),
        Spectrum(1.0, 1.0),
        relative_damping=DAMPING,
        tolerance=1e-10,
        max_iterations=1000,
        **options,
    )
    assert report.converged
    return change


@CASES
def test_sets_leave_each_on_its_own(family: str, masked: bool) -> None:
    """One pair, one that is in two batches, several pairs, and nobody."""
    dense = Dense(family, masked=masked)
    twice = int(torch.bincount(torch.cat(list(dense.objective.batches))).argmax())
    sets = [(0,), (twice,), (1, 5, 8, twice), ()]
    changes = solved(dense, [dense.members(*rows) for rows in sets])
    for rows, change in zip(sets, changes, strict=True):
        torch.testing.assert_close(change, dense.change(*rows), rtol=1e-6, atol=1e-9)


def test_a_batch_of_two_has_no_loss_without_one() -> None:
    dense = Dense("clip")
    dense.objective = replace(dense.objective, batches=[torch.arange(8), torch.tensor([8, 9])])
    change = solved(dense, [dense.members(8)])[0]
    torch.testing.assert_close(change, dense.change(8), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_leverage_along_a_change(family: str) -> None:
    """A quotient of dense matrices, and no more than the leverage of the pair."""
    dense = Dense(family)
    rows = [0, 3, 7]
    members = torch.stack([dense.members(row) for row in rows])
    changes = torch.stack([dense.change(row) for row in rows])
    along = leverage_along(dense.objective, dense.theta, members, changes, DAMPING)
    for row, change, share in zip(rows, changes, along, strict=True):
        remaining = dense.without(row)[1]
        close(share, 1 - change @ remaining @ change / (change @ dense.whole @ change))
    result = leverage(
        dense.objective, dense.theta, dense.gradient, dense.directions, DAMPING, dense.eye
    )
    assert (along <= result.leverage[rows] + 1e-9).all()


@pytest.fixture(scope="module")
def study() -> Study:
    return Study()


def objective_of(study: Study) -> Objective:
    return Objective(study.encoder, study.features, BATCHES, l2=L2, center=study.origin)


def one_by_one(pairs: list[int]) -> Tensor:
    return torch.eye(PAIRS, dtype=torch.bool)[pairs]


def test_with_the_hessian_it_is_the_first_step_of_a_removal(study: Study) -> None:
    objective, pairs = objective_of(study), [9, WRONG]
    options: dict[str, Any] = {
        "curvature": "hessian",
        "relative_damping": 5.0,  # with less, a removal would raise it
        "tolerance": 1e-7,
        "max_iterations": 1000,
    }
    changes, _ = change_without(
        objective, study.theta, one_by_one(pairs), Spectrum(1.0, 1.0), **options
    )
    for members, change in zip(one_by_one(pairs), changes, strict=True):
        moved, report = remove(objective, study.theta, members, Spectrum(1.0, 1.0), **options)
        assert report.trials == 1  # the first step led down, without more damping
        close(change, moved - study.theta, rtol=1e-5, atol=1e-7)


def test_it_comes_nearer_to_retraining_than_the_plain_score(study: Study) -> None:
    """In size: pairs of this small fit hold up much of their own curvature.

    But for the wrong pair, which moves the parameters too far for the query's slope alone.
    """
    objective, pairs = objective_of(study), [row for row in range(0, PAIRS, 3) if row != WRONG]
    query = Objective(study.encoder, study.query, [torch.arange(12)])
    gradient = query.gradient(study.theta)
    eye = torch.eye(len(study.theta), dtype=torch.float64)
    curvature = objective.ggn(study.theta, eye)
    plain = torch.linalg.solve(curvature, gradient)
    result = leverage(objective, study.theta, gradient, plain, 1e-9, eye)
    true = torch.tensor([study.true_change(pair) for pair in pairs], dtype=torch.float64)
    plain_scores = study.scores["exact"].task[pairs]
    with_leverage = result.score[pairs]
    assert (with_leverage - true).norm() < 0.75 * (plain_scores - true).norm()
    assert 0.6 < slope(true, with_leverage) < 1.2 < 1.4 < slope(true, plain_scores)
    assert spearman(with_leverage, true) >= 0.9


def slope(true: Tensor, predicted: Tensor) -> float:
    return float((true * predicted).sum() / predicted.square().sum())


# ------------------------------------------------------------------------------- the warning


def test_a_memorised_fit_is_told() -> None:
    warning = memorised(torch.tensor([0.9, 0.8, 0.7, 0.1]))
    assert warning is not None
    assert warning.startswith("75 %")
    assert memorised(torch.tensor([0.9, 0.1, 0.2, 0.6])) is None


def test_of_a_model_all_rows_have_a_bound_below_the_samples() -> None:
    model = InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig(probes=1, fit_epochs=3))
    dataset = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    rows, query = (model.read(dataset.select(part)) for part in (range(40), range(40, 60)))
    influence = model.fit(rows, query)
    bound, sample = influence.leverage(rank=16), influence.sample_leverage(len(rows))
    assert bound is not None
    assert sample is not None
    assert (bound > 0).all()
    finer = influence.leverage(rank=64)
    assert finer is not None
    assert finer.mean() > bound.mean()
    assert bound.median() < sample.median() < 1


def test_without_a_fit_there_is_no_leverage() -> None:
    model = InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig(probes=1, fit_epochs=0))
    dataset = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    rows = model.read(dataset.select(range(20)))
    influence = model.fit(rows, rows)
    assert influence.leverage() is None
    assert influence.sample_leverage() is None
