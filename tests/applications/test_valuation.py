"""Values of pairs that are there, of pairs that might come, and curves that check them."""

import math
from typing import NamedTuple

import pytest
import torch
from datasets import load_dataset
from torch import Tensor
from torch.func import grad, hessian

from hf_ecif.applications import valuation
from hf_ecif.applications.valuation import (
    WHOLE,
    Valuation,
    find_conflicts,
    recall_at_1,
    removal_curves,
    removal_orders,
    value_additions,
    value_by_slice,
    value_in_contexts,
)
from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Objective
from hf_ecif.engine.system import Spectrum
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.fitting import FitReport
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.retraining import Version, train
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Directions, Scores
from hf_ecif.influence.training import Training
from hf_ecif.utils.seeds import derive
from tests.support import DEMO
from tests.support.retraining import (
    BATCHES,
    L2,
    PAIRS,
    RAW,
    Study,
    batch_terms,
    clustered_pairs,
    linear_clip,
    spearman,
)

# ----------------------------------------------------------------- additions against true refits


class Market:
    """A converged fit, and candidates of which some have a wrong caption."""

    candidates = 12
    wrong = (3, 8)

    def __init__(self) -> None:
        self.study = Study()
        features = clustered_pairs(self.candidates, seed=4)
        other = clustered_pairs(self.candidates, seed=5)
        for row in self.wrong:  # of its own, and of the next cluster
            features.text["hidden"][row] = other.text["hidden"][(row + 1) % self.candidates]
        self.features = features
        model = InfluenceModel(linear_clip(), None, InfluenceConfig(batch_size=8))
        model.encoder.freeze(RAW)
        theta, origin = self.study.theta, self.study.origin
        slope = grad(self.study.query_loss)(theta)
        direction = torch.linalg.solve(hessian(lambda at: self.objective(at, 0, 0.0))(theta), slope)
        report = FitReport(0, 0.0, 0.0, 0.0)
        fitted = Fitted(
            theta=theta,
            directions=Directions.none(theta)._replace(query=direction),
            spectrum=Spectrum(mean_eigenvalue=1.0, largest_eigenvalue=1.0),
            train_count=PAIRS,
            fit=report,
            solvers={},
            query_loss_before=0.0,
            query_loss=0.0,
            alignment=0.0,
        )
        rows = named_rows(self.study.features)
        objective = Objective(model.encoder, rows.features, BATCHES, l2=L2, center=origin)
        training = Training(rows, model.config, objective, origin, theta, report, fitted.spectrum)
        self.influence = Influence(model, model.config, fitted, training)
        self.additions = value_in_contexts(self.influence, named_rows(features, "new"), BATCHES)

    def objective(self, theta: Tensor, row: int, weight: float) -> Tensor:
        """``J`` with a candidate in each batch in turn, by a weight; the denominator stays."""
        joined = Features(*(self._joined(side, row) for side in ("text", "image")))
        last = torch.tensor([PAIRS])
        terms = [
            batch_terms(theta, joined, rows)
            + weight
            / len(BATCHES)
            * (
                batch_terms(theta, joined, torch.cat([rows, last]))
                - batch_terms(theta, joined, rows)
            )
            for rows in BATCHES
        ]
        penalty = L2 / 2 * (theta - self.study.origin).square().sum()
        return sum(terms) / (2 * PAIRS) + penalty

    def refitted(self, row: int, weight: float) -> float:
        """The query at the minimum of `objective`: L-BFGS into the basin, Newton to its bottom."""

        def of_theta(theta: Tensor) -> Tensor:
            return self.objective(theta, row, weight)

        theta = self.study.theta.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=300, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = of_theta(theta)
            value.backward()
            return value

        optimizer.step(closure)
        bottom = theta.detach()
        for _ in range(6):
            slope = grad(of_theta)(bottom)
            if slope.norm() < 1e-11:
                return float(self.study.query_loss(bottom))
            bottom = bottom - torch.linalg.solve(hessian(of_theta)(bottom), slope)
        raise AssertionError("the oracle found no minimum")

    def _joined(self, side: str, row: int) -> dict[str, Tensor]:
        own, new = getattr(self.study.features, side), getattr(self.features, side)
        return {"hidden": torch.cat([own["hidden"], new["hidden"][[row]]])}


def named_rows(features: Features, prefix: str = "row") -> Rows:
    count = len(features)
    texts = [f"{prefix} {i}" for i in range(count)]
    return Rows(features, torch.arange(count), texts, {}, count)


@pytest.fixture(scope="module")
def market() -> Market:
    return Market()


@pytest.mark.parametrize("row", [0, 3, 7])
def test_additions_are_derivatives_by_the_weight_of_the_new_pair(market: Market, row: int) -> None:
    step = 1e-3
    slope = (market.refitted(row, step) - market.refitted(row, -step)) / (2 * step)
    assert market.additions.task[row].item() == pytest.approx(slope, rel=1e-5)


def test_additions_predict_true_refits(market: Market) -> None:
    """Those of right pairs closely; a wrong one is a large step, and does less than predicted."""
    wrong, right = 8, [0, 1, 2, 5, 7, 9, 11]
    before = float(market.study.query_loss(market.study.theta))
    true = {row: market.refitted(row, 1.0) - before for row in (wrong, *right)}
    predicted = market.additions.task
    changes = torch.tensor([true[row] for row in right], dtype=torch.float64)
    assert spearman(predicted[right], changes) >= 0.9
    assert 0.7 < (changes @ predicted[right]) / predicted[right].square().sum() < 1.3
    assert predicted.argmax() == wrong
    assert 0 < true[wrong] < predicted[wrong]


def test_contexts_are_batches_of_training_but_for_one(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Tensor]] = []

    def look(influence: Influence, new: Rows, contexts: list[Tensor], _: object):
        seen.append(contexts)
        return value_in_contexts(influence, new, contexts)

    monkeypatch.setattr(valuation, "value_in_contexts", look)
    new = named_rows(market.features, "new")
    found = value_additions(market.influence, new)
    (contexts,) = seen
    assert [len(set(context.tolist())) for context in contexts] == [7] * 6
    assert found.task.shape == found.stderr.shape == (market.candidates,)
    assert (found.stderr > 0).all()
    single = [value_in_contexts(market.influence, new, [context]) for context in contexts]
    torch.testing.assert_close(torch.stack([one.task for one in single]).mean(dim=0), found.task)
    assert single[0].stderr.isinf().all()


def test_candidates_do_not_meet(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    new = named_rows(market.features, "new")
    alone = value_in_contexts(market.influence, new.select(torch.tensor([5])), BATCHES)
    torch.testing.assert_close(alone.task, market.additions.task[[5]])
    monkeypatch.setattr(valuation, "CHUNK", 5)
    ticks: list[int] = []
    chunked = value_in_contexts(market.influence, new, BATCHES, lambda *_: ticks.append)
    torch.testing.assert_close(chunked.task, market.additions.task)
    assert ticks == [5, 5, 2]


# ----------------------------------------------------------------------- slices of a demo's query


class Demo(NamedTuple):
    model: InfluenceModel
    train: Rows
    query: Rows
    names: list[str | None]
    valuation: Valuation


@pytest.fixture(scope="module")
def demo() -> Demo:
    files = {name: str(DEMO / f"data/{name}.parquet") for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files)
    config = InfluenceConfig(batch_size=64, probes=1, partitions=3, fit_epochs=4, tolerance=1e-6)
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    train = model.read(data["train"].select(range(200)))
    query = model.read(data["validation"].select(range(60)))
    names: list[str | None] = ["large"] * 30 + ["small"] * 20 + ["one"] + ["equal"] * 2 + [None] * 7
    query.texts[51] = query.texts[52]
    return Demo(model, train, query, names, value_by_slice(model, train, query, names))


def test_slices(demo: Demo) -> None:
    found = demo.valuation
    assert [(one.name, one.rows) for one in found.slices] == [
        (WHOLE, 60), ("large", 30), ("small", 20),
    ]  # fmt: skip
    assert "single" in found.skipped["one"]
    assert "2 captions are equal" in found.skipped["equal"]
    assert found.unnamed == 7
    assert found.scores.task.shape == (3, 200)
    assert found.slices[0].agreement == pytest.approx(1)
    assert all(-1 < one.agreement < 1 for one in found.slices[1:])
    for one, task in zip(found.slices, found.scores.task, strict=True):
        assert one.harmful_share == pytest.approx((task < 0).double().mean().item())
        assert one.loss != one.loss_before


@pytest.mark.parametrize(("number", "rows"), [(0, range(60)), (1, range(30)), (2, range(30, 50))])
def test_a_slice_is_scored_as_a_query_of_its_own(demo: Demo, number: int, rows: range) -> None:
    part = demo.query.select(torch.tensor(list(rows)))
    influence = demo.valuation.influence
    alone = influence.scores_for(part)
    together = demo.valuation.scores.of_query(number)
    torch.testing.assert_close(together.positive, alone.positive, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(together.negative, alone.negative, rtol=1e-2, atol=1e-6)
    slice_ = demo.valuation.slices[number]
    assert slice_.loss == pytest.approx(demo.model.query_value(part, influence.theta).item())


def test_without_slices_there_is_the_whole(demo: Demo) -> None:
    found = value_by_slice(demo.model, demo.train, demo.query)
    assert [one.name for one in found.slices] == [WHOLE]
    torch.testing.assert_close(
        found.scores.task[0], demo.valuation.scores.task[0], rtol=1e-2, atol=1e-6
    )
    assert found.unnamed == 60
    assert find_conflicts(found.scores, 3) == []


def scores_of(task: Tensor, stderr: float) -> Scores:
    """Scores of several queries, of which only the sum and its error count."""
    nothing = torch.zeros(task.shape[1])
    return Scores(task, 0 * task, torch.full_like(task, stderr), *[nothing] * 8, scale=1.0, terms=2)


def test_conflicts_are_clear_in_both_slices() -> None:
    task = torch.tensor(
        [
            [9.0, -9.0, 0.0, 0.0, 0.0, 0.0],  # the whole does not count
            [2.0, 3.0, -1.0, 0.05, 0.0, 1.0],
            [20.0, -30.0, 40.0, -50.0, 0.0, 0.0],
        ]
    )
    conflicts = find_conflicts(scores_of(task, 0.05), top_k=5)
    assert [(one.row, one.helps, one.hurts) for one in conflicts] == [(1, 1, 2), (2, 2, 1)]
    spread = task[1:].std(dim=1)
    assert conflicts[0].strength == pytest.approx(
        min(2.9 / spread[0].item(), 29.9 / spread[1].item()), rel=1e-5
    )
    assert find_conflicts(scores_of(task, 0.05), top_k=1) == conflicts[:1]
    assert find_conflicts(scores_of(task, 100.0), top_k=5) == []


# --------------------------------------------------------------------------------------- curves


def test_orders() -> None:
    scores = torch.tensor([0.5, -2.0, 1.0, 0.0])
    orders = removal_orders(scores, 2)
    assert [order.tolist() for order in orders["most harmful"]] == [[1, 3, 0, 2]] * 2
    assert [order.tolist() for order in orders["most valuable"]] == [[2, 0, 3, 1]] * 2
    first, second = orders["random"]
    assert sorted(first.tolist()) == sorted(second.tolist()) == [0, 1, 2, 3]
    assert not torch.equal(*removal_orders(torch.zeros(50), 2)["random"])


def test_curves_are_equally_long_fits_without_the_first_rows(demo: Demo) -> None:
    order = torch.arange(200).flip(0)
    ticks: list[int] = []
    whole, *_ = curves = removal_curves(
        demo.model,
        demo.train,
        demo.query,
        {"backwards": [order] * 2, "forwards": [order.flip(0)]},
        shares=[0.25],
        progress=lambda name, steps: ticks.append,
    )
    assert [curve.name for curve in curves] == ["backwards", "forwards"]
    assert whole.shares == [0, 0.25]
    assert [len(point) for point in whole.losses] == [2, 2]
    assert [len(point) for point in curves[1].recalls] == [1, 1]
    assert len(ticks) == 2 + 2 + 1
    assert curves[1].losses[0] == whole.losses[0][:1]
    batch_size = demo.model.config.batch_size
    steps = math.ceil(200 / batch_size)  # those of all rows
    for repeat in range(2):
        rows = demo.train.select(torch.arange(150).flip(0))
        theta = train(
            demo.model,
            Version(rows),
            steps=steps,
            batch_size=batch_size,
            seed=derive(0, "retraining", repeat),
        )
        assert whole.losses[1][repeat] == demo.model.query_value(demo.query, theta).item()
        assert whole.recalls[1][repeat] == recall_at_1(demo.model, theta, demo.query)


def test_removing_the_harmful_helps_and_the_valuable_hurts(demo: Demo) -> None:
    orders = removal_orders(demo.valuation.scores.task[0], 1)
    curves = removal_curves(demo.model, demo.train, demo.query, orders, shares=[0.3])
    loss = {curve.name: curve.losses[1][0] for curve in curves}
    assert loss["most harmful"] < loss["random"] < loss["most valuable"]
    assert loss["most harmful"] < curves[0].losses[0][0]


def test_recall_counts_equal_captions_as_right(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, theta = demo.model, demo.query, demo.valuation.influence.theta
    text, image = model.encoder.embed(theta, rows.features)[:2]
    hits = 0
    for left, right in ((text, image), (image, text)):
        for i in range(len(rows)):
            cosines = [float(left[i] @ right[j]) for j in range(len(rows))]
            hits += rows.texts[cosines.index(max(cosines))] == rows.texts[i]
    monkeypatch.setattr(valuation, "CHUNK", 7)
    assert recall_at_1(model, theta, rows) == pytest.approx(hits / 120)
