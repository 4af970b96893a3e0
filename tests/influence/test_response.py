"""Derivatives through the steps of a fit, against finite differences of fits in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import load_dataset
from scipy.stats import spearmanr
from torch import Tensor
from transformers import CLIPModel

from hf_ecif.applications.validation import validate
from hf_ecif.applications.valuation import value_additions
from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Curvature, Objective, random_batches
from hf_ecif.influence import training as trainings
from hf_ecif.influence.fitting import Epoch, fit_parameters
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.loaded import LoadedModel
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.response import (
    Checkpoint,
    choose_contribution,
    choose_response,
    respond,
    score_through,
    share_partitions,
    unroll,
)
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Directions, Pass, score_rows
from tests.support import DEMO

ROWS, BATCH, EPOCHS, RATE = 18, 6, 3, 3e-3


@dataclass(frozen=True)
class Pushed:
    """An objective whose gradient has something added to it in one epoch."""

    objective: Objective
    push: Tensor
    epoch: int
    seen: list[int]  # steps so far

    @property
    def features(self) -> Features:
        return self.objective.features

    def over(self, batches: list[Tensor]) -> "Pushed":
        return Pushed(self.objective.over(batches), self.push, self.epoch, self.seen)

    def value(self, theta: Tensor) -> Tensor:
        return self.objective.value(theta)

    def gradient(self, theta: Tensor) -> Tensor:
        step = len(self.seen)
        self.seen.append(step)
        gradient = self.objective.gradient(theta)
        return gradient + self.push if step // (ROWS // BATCH) == self.epoch else gradient


@dataclass(frozen=True)
class Fit:
    """A fit of the tiny model, and the gradient of another objective at its end."""

    objective: Objective
    epochs: list[Epoch]
    end: Tensor
    query: Objective

    @property
    def start(self) -> Tensor:
        return self.objective.encoder.theta

    def gradient(self) -> Tensor:
        return self.query.gradient(self.end)

    def query_after(self, push: Tensor, epoch: int) -> float:
        """The query after a fit whose gradients were pushed in one epoch."""
        pushed = Pushed(self.objective, push, epoch, [])
        return self.query.value(fit(pushed, self.start)[0]).item()  # type: ignore[arg-type]


def fit(objective: Objective, start: Tensor) -> tuple[Tensor, list[Epoch]]:
    trajectory: list[Epoch] = []
    end, _ = fit_parameters(
        objective,
        start,
        batch_size=BATCH,
        epochs=EPOCHS,
        learning_rate=RATE,
        generator=torch.Generator().manual_seed(1),
        trajectory=trajectory,
    )
    return end, trajectory


@pytest.fixture(params=[0.0, 0.1], ids=["plain", "l2"])
def course(
    request: pytest.FixtureRequest,
    make_clip: Callable[..., CLIPModel],
    make_features: Callable[..., Features],
) -> Fit:
    encoder = DualEncoder(make_clip(attention="eager"), "projections")
    batches = random_batches(ROWS, BATCH, torch.Generator().manual_seed(0))
    objective = Objective(encoder, make_features(ROWS), batches, l2=request.param)
    query = Objective(encoder, make_features(8, seed=5), [torch.arange(8)])
    end, epochs = fit(objective, encoder.theta)
    return Fit(objective, epochs, end, query)


def test_directions_are_derivatives_of_the_fit(course: Fit) -> None:
    """With the Hessian, to the error of a finite difference."""
    checkpoints = unroll(course.objective, course.epochs, course.gradient(), "hessian")
    generator = torch.Generator().manual_seed(3)
    for epoch, checkpoint in enumerate(checkpoints):
        push = torch.randn(len(course.start), generator=generator, dtype=torch.float64)
        step = 1e-6
        slope = course.query_after(step * push, epoch) - course.query_after(-step * push, epoch)
        predicted = -(checkpoint.directions @ push).item()
        assert predicted == pytest.approx(slope / (2 * step), rel=1e-5)


def test_replayed_steps_are_those_of_the_fit(course: Fit) -> None:
    last = course.epochs[-1]
    assert [epoch.steps for epoch in course.epochs] == [0, 3, 6]
    again, _ = fit(course.objective, course.start)
    assert torch.equal(again, course.end)
    # A checkpoint lies in the middle of its epoch: between where it began and where the next did.
    checkpoints = unroll(course.objective, course.epochs, course.gradient())
    way = (course.end - last.theta).norm()
    assert 0 < (checkpoints[-1].theta - last.theta).norm() < way


@pytest.mark.parametrize("curvature", [None, "ggn"])
def test_queries_do_not_see_each_other(course: Fit, curvature: Curvature | None) -> None:
    through = partial(unroll, course.objective, course.epochs, curvature=curvature)
    gradient = course.gradient()
    both = through(torch.stack([gradient, -2 * gradient]))
    alone = through(gradient)
    for two, one in zip(both, alone, strict=True):
        torch.testing.assert_close(two.directions[0], one.directions)
        torch.testing.assert_close(two.directions[1], -2 * one.directions)


def test_contributions_leave_later_steps_as_they_are(course: Fit) -> None:
    """Nothing follows the last step, so that there the two agree; before, they do not."""
    gradient = course.gradient()
    plain = unroll(course.objective, course.epochs[-1:], gradient)
    curved = unroll(course.objective, course.epochs[-1:], gradient, "ggn")
    assert (plain[0].directions - curved[0].directions).norm() > 1e-3 * plain[0].directions.norm()
    last = course.epochs[-1]
    only = last._replace(batches=last.batches[:1])
    one = [unroll(course.objective, [only], gradient, kind)[0] for kind in (None, "ggn")]
    torch.testing.assert_close(one[0].directions, one[1].directions)


def test_a_parameter_without_gradients_has_no_direction(course: Fit) -> None:
    """As long as it has no second moment, by which its step would be divided."""
    silent = course.epochs[0]._replace(batches=[torch.arange(1)])  # a pair alone has no loss
    objective = replace(course.objective, l2=0.0)
    [checkpoint] = unroll(objective, [silent], course.gradient())
    assert not checkpoint.directions.any()


def test_scores_are_sums_over_checkpoints(course: Fit) -> None:
    encoder, features = course.objective.encoder, course.objective.features
    checkpoints = unroll(course.objective, course.epochs, course.gradient()[None], "ggn")
    how = Pass(BATCH, 7, 2)
    scores = score_through(encoder, checkpoints, features, how, train_count=ROWS)
    shared = share_partitions(how, checkpoints)
    assert [own.partitions for _, own in shared] == [3, 3, 3]
    assert len({own.seed for _, own in shared}) == 3
    parts = [
        score_rows(
            encoder,
            checkpoint.theta,
            features,
            Directions.none(checkpoint.theta)._replace(query=checkpoint.directions),
            own,
            train_count=ROWS,
        )
        for checkpoint, own in shared
    ]
    torch.testing.assert_close(scores.task, sum(part.task for part in parts))
    variance = sum(part.stderr.square() for part in parts)
    torch.testing.assert_close(scores.stderr.square(), variance)
    assert torch.equal(scores.loss, parts[-1].loss)


def test_one_checkpoint_is_a_stationary_score(course: Fit) -> None:
    encoder, features = course.objective.encoder, course.objective.features
    how, direction = Pass(BATCH, 4, 2), course.gradient()
    checkpoint = Checkpoint(course.end, direction)
    scores = score_through(encoder, [checkpoint], features, how, train_count=ROWS)
    along = Directions.none(course.end)._replace(query=direction)
    plain = score_rows(encoder, course.end, features, along, how, train_count=ROWS)
    assert torch.equal(scores.positive, plain.positive)
    assert torch.equal(scores.stderr, plain.stderr)


# ------------------------------------------------------------------------------ of whole models


class Demo(NamedTuple):
    influence: Influence
    train: Rows
    query: Rows


CONFIG = InfluenceConfig(batch_size=64, probes=2, fit_epochs=5, response="unrolled")


def read_demo(model: LoadedModel) -> tuple[Rows, Rows]:
    """Rows of the test split, a fifth of them with a wrong caption; and a query."""
    data = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    train, query = model.read(data.select(range(140))), model.read(data.select(range(140, 200)))
    moved = torch.arange(140)
    moved[:28] = moved[:28].roll(1)
    return train.with_texts_of(moved), query


def fit_demo(config: InfluenceConfig) -> Demo:
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    train, query = read_demo(model)
    return Demo(model.fit(train, query), train, query)


@pytest.fixture(scope="module")
def demo() -> Demo:
    return fit_demo(CONFIG)


def test_unrolled_scores_predict_retrainings_better(demo: Demo) -> None:
    """Of the same fit: the size comes out right, and the order at least as well."""
    plain = fit_demo(replace(CONFIG, response="stationary"))
    unrolled, theirs = (
        validate(one.influence, one.query, subsets=48, removed_share=0.2, repeats=1)
        for one in (demo, plain)
    )
    assert unrolled.actual == theirs.actual
    assert unrolled.spearman > 0.5  # of 24 subsets, known to about 0.15
    assert unrolled.spearman > theirs.spearman - 0.05
    assert 0.5 < unrolled.slope < 2


def test_a_query_asked_later_has_the_same_scores(demo: Demo) -> None:
    influence, train, query = demo
    scores, again = influence.scores(train), influence.scores_for(query)
    torch.testing.assert_close(again.task, scores.task)
    torch.testing.assert_close(again.stderr, scores.stderr)
    assert scores.self_influence.abs().min() > 0  # it is of the curvature still


def test_a_trajectory_is_recorded_or_gone_through_again(demo: Demo) -> None:
    """The same either way; only a response that needs it has it recorded."""
    plain = fit_demo(replace(CONFIG, response="stationary"))
    recorded, replayed = (one.influence.training for one in (demo, plain))
    assert recorded.trajectory is recorded._recorded
    assert not replayed._recorded
    assert torch.equal(recorded.theta, replayed.theta)
    for one, other in zip(recorded.trajectory, replayed.trajectory, strict=True):
        assert torch.equal(one.theta, other.theta)
        assert torch.equal(one.second, other.second)
        assert all(map(torch.equal, one.batches, other.batches))


def test_sizes_come_without_a_query(demo: Demo) -> None:
    plain = fit_demo(replace(CONFIG, response="stationary"))
    for influence, train, _ in (demo, plain):
        torch.testing.assert_close(influence.sizes(), influence.scores(train).size)


def test_additions_are_removals_the_other_way_round(demo: Demo) -> None:
    """A pair that is in the data already: its copy does about what its removal undoes."""
    influence, train, _ = demo
    copies = value_additions(influence, train.select(torch.arange(40)))
    assert spearmanr(copies.task, -influence.scores().task[:40]).statistic > 0.8


def test_a_group_of_one_is_its_row(demo: Demo) -> None:
    influence, train, _ = demo
    members = torch.arange(len(train)) == 5
    scores, group = influence.scores(), influence.score_group(members)
    error = scores.stderr[5] + group.stderr
    assert (group.task - scores.task[5]).abs() < 4 * error


def test_a_saved_fit_scores_alike(demo: Demo, tmp_path: Path) -> None:
    demo.influence.save_pretrained(tmp_path)
    loaded = Influence.from_pretrained(tmp_path)
    assert loaded.fingerprint == demo.influence.fingerprint
    train, _ = read_demo(loaded.model)
    torch.testing.assert_close(loaded.scores(train).task, demo.influence.scores().task)


def test_without_a_fit_there_is_nothing_to_unroll() -> None:
    """The inverse curvature answers then, for the query and for contributions."""
    influence = fit_demo(replace(CONFIG, fit_epochs=0)).influence
    assert not influence.fitted.checkpoints
    training, gradient = influence.training, torch.ones_like(influence.theta)
    solved = training.inverse.solve(gradient[None])[0][0]
    for choose in (choose_response, choose_contribution):
        [checkpoint] = respond(choose(influence.config), training, gradient)
        assert torch.equal(checkpoint.theta, influence.model.encoder.theta)
        torch.testing.assert_close(checkpoint.directions, solved)


def test_curvature_of_some_batches_stands_for_all(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = demo.influence.training
    monkeypatch.setattr(trainings, "CURVATURE_ROWS", 100)  # two batches of 64, of three
    some = replace(whole)
    vectors = torch.randn(2, len(whole.theta), generator=torch.Generator().manual_seed(0))
    two = whole.objective.over(whole.objective.batches[:2])
    torch.testing.assert_close(some.inverse.product(vectors), two.ggn(whole.theta, vectors))
    query = whole.objective.gradient(whole.theta)[None]
    (found, _), (expected, _) = some.inverse.solve(query), whole.inverse.solve(query)
    assert torch.cosine_similarity(found, expected).item() > 0.95
    assert not torch.equal(found, expected)
