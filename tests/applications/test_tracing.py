"""Pairs that were planted to cause errors are the ones that the errors are traced to."""

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
from datasets import load_dataset
from torch import Tensor

from hf_ecif.applications.tracing import (
    CONTEXT,
    Errors,
    Task,
    Traces,
    describe_errors,
    find_errors,
    margin_of,
    responsibility,
    trace,
)
from hf_ecif.config import InfluenceConfig
from hf_ecif.influence.gradient_index import build_index
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.queries import first_rows
from hf_ecif.influence.response import Checkpoint
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores
from tests.support import DEMO

TRAIN, QUERY, PLANTED, VICTIMS = 300, 60, 8, 3


class Study(NamedTuple):
    influence: Influence
    query: Rows
    victims: list[int]  # rows of the query whose captions were planted
    planted: Tensor  # (VICTIMS, PLANTED), rows of the training set that carry them
    errors: Errors
    traces: Traces


def poison(model: InfluenceModel, train: Rows, query: Rows, victims: list[int]) -> Tensor:
    """Rows for the captions of the victims: the images most like that of another query row.

    So each caption is pulled to where another image is, and fetches that one instead of its own.
    """
    images = [
        model.encoder.embed(model.encoder.theta, rows.features).image for rows in (train, query)
    ]
    free = torch.ones(len(train), dtype=torch.bool)
    planted = []
    for victim in victims:
        decoy = (victim + QUERY // 2) % QUERY
        alike = (images[0] @ images[1][decoy]).masked_fill(~free, -torch.inf)
        planted.append(alike.topk(PLANTED).indices)
        free[planted[-1]] = False
    return torch.stack(planted)


@pytest.fixture(scope="module")
def study() -> Study:
    files = {name: str(DEMO / f"data/{name}.parquet") for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files)
    config = InfluenceConfig(batch_size=64, probes=16, partitions=3, seed=0)
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    query = model.read(data["validation"].select(range(QUERY)))
    clean = data["train"].filter(lambda wrong: not wrong, input_columns="is_misaligned")
    clean_rows = model.read(clean.select(range(TRAIN)))
    clean_fit = model.fit(clean_rows, query)
    failing = set(find_errors(clean_fit, query).rows.tolist())
    victims = [row for row in range(QUERY) if row not in failing][:VICTIMS]
    planted = poison(model, clean_rows, query, victims)
    texts = list(clean_rows.texts)
    for victim, rows in zip(victims, planted.tolist(), strict=True):
        for row in rows:
            texts[row] = query.texts[victim]
    data = clean.select(range(TRAIN)).remove_columns("text").add_column("text", texts)
    train = model.read(data)
    influence = model.fit(train, query)
    errors = find_errors(influence, query)
    traces = trace(influence, query, torch.tensor(victims), top_k=20)
    return Study(influence, query, victims, planted, errors, traces)


def test_planted_pairs_cause_errors(study: Study) -> None:
    assert len(set(study.victims) & set(study.errors.rows.tolist())) >= 2


def test_errors_are_what_is_retrieved(study: Study) -> None:
    influence, errors = study.influence, study.errors
    text, image = influence.model.encoder.embed(influence.theta, study.query.features)[:2]
    nearest = (text @ image.T).argmax(dim=1)
    assert (errors.margin.diff() <= 0).all()
    assert torch.equal(nearest[errors.rows], errors.retrieved)
    same = study.query.same_text
    assert (same[errors.rows] != same[errors.retrieved]).all()
    right = torch.tensor([row for row in range(QUERY) if row not in set(errors.rows.tolist())])
    assert (same[nearest[right]] == same[right]).all()


def test_errors_are_traced_to_the_planted_pairs(study: Study) -> None:
    found = [
        len(set(top.tolist()) & set(planted.tolist())) / PLANTED
        for top, planted in zip(study.traces.pairs, study.planted, strict=True)
    ]
    by_chance = 20 / TRAIN
    assert min(found) >= 5 * by_chance
    assert sum(found) / len(found) >= 0.7


def test_traces_are_ordered_scores(study: Study) -> None:
    traces = study.traces
    assert {tuple(getattr(traces, field.name).shape) for field in fields(traces)} == {(VICTIMS, 20)}
    torch.testing.assert_close(traces.score, traces.positive + traces.negative)
    assert (traces.score[:, :5] < 0).all()
    size = study.influence.scores().size[traces.pairs]
    torch.testing.assert_close(traces.relative, traces.score / size)
    # Their geometric mean decides, by which neither alone is in order.
    between = -(traces.score * traces.relative).sqrt()
    assert (between.diff(dim=1) >= 0).all()
    assert not (traces.score.diff(dim=1) >= 0).all()
    assert not (traces.relative.diff(dim=1) >= 0).all()


def test_chunks_do_not_matter(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ecif.applications.tracing.CHUNK", 1)
    ticks: list[int] = []
    again = trace(
        study.influence,
        study.query,
        torch.tensor(study.victims),
        top_k=20,
        progress=lambda name, steps: ticks.append,
    )
    assert ticks == [1] * VICTIMS
    torch.testing.assert_close(again.score, study.traces.score, rtol=1e-3, atol=1e-5)


def test_partners_of_hard_negatives(study: Study) -> None:
    traces = study.traces
    met = traces.partner >= 0
    assert met.all()
    assert (traces.partner != traces.pairs).all()
    assert (traces.partner_part != 0).all()
    assert traces.partner.max() < TRAIN


def test_the_role_is_that_which_does_more_harm(study: Study) -> None:
    traces = study.traces
    assert torch.equal(traces.is_negative, traces.negative < traces.positive)
    # The wrong captions were planted to be learned: they act as positives.
    planted = torch.isin(traces.pairs, study.planted)
    assert traces.is_negative[planted].float().mean() < 0.3


def test_zero_shot_errors(study: Study) -> None:
    influence, query = study.influence, study.query
    errors = find_errors(influence, query, "zero_shot")
    text, image = influence.model.encoder.embed(influence.theta, query.features)[:2]
    classes = first_rows(query)
    predicted = classes[(image @ text[classes].T).argmax(dim=1)]
    wrong = query.same_text[predicted] != query.same_text
    assert sorted(errors.rows.tolist()) == wrong.nonzero()[:, 0].tolist()
    assert torch.equal(errors.retrieved, predicted[errors.rows])
    assert (errors.margin.diff() <= 0).all()


def test_rows_of_your_own(study: Study) -> None:
    chosen = torch.tensor([5, 2])
    described = describe_errors(study.influence, study.query, chosen)
    assert set(described.rows.tolist()) == {5, 2}
    margin = margin_of(study.query, described.rows, "text_to_image")
    values = margin.values(study.influence.model.encoder, study.influence.theta)
    torch.testing.assert_close(described.margin, values)
    assert study.errors.worst(1).rows.tolist() == study.errors.rows[:1].tolist()


@pytest.mark.parametrize("task", ["image_to_text", "zero_shot"])
def test_every_task_is_traced_by_its_own_margin(study: Study, task: Task) -> None:
    chosen = torch.tensor([4])
    traces = trace(study.influence, study.query, chosen, direction=task, top_k=3)
    scores = study.influence.contributions(margin_of(study.query, chosen, task))
    torch.testing.assert_close(traces.score, scores.task.gather(1, traces.pairs))
    order = responsibility(scores.task, study.influence.sizes())
    assert torch.equal(order[0].argsort()[:3], traces.pairs[0])


def test_no_errors(study: Study) -> None:
    traces = trace(study.influence, study.query, torch.zeros(0, dtype=torch.int64))
    assert {len(getattr(traces, field.name)) for field in fields(traces)} == {0}


def test_an_index_of_full_rank_is_exact(study: Study) -> None:
    query = margin_of(study.query, torch.tensor([1, 4, 9]), "text_to_image")
    influence = study.influence
    index = build_index(influence, [query], rank=3)
    scores = influence.contributions(query)
    exact = torch.stack([scores.positive, scores.negative])
    estimate = index.estimate(query.gradients(influence.model.encoder, influence.theta))
    torch.testing.assert_close(estimate, exact, rtol=1e-3, atol=1e-5)


def test_candidates_are_decided_by_their_scores(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is proposed are the causes; scored in other batches, it has the same scores nearly."""
    influence, victims = study.influence, torch.tensor(study.victims)
    scored: list[int] = []
    scores_through = Influence.scores_through

    def count(
        self: Influence, checkpoints: Sequence[Checkpoint], rows: Rows | None = None
    ) -> Scores:
        scored.append(len(self.rows if rows is None else rows))
        return scores_through(self, checkpoints, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Influence, "scores_through", count)
        traces = trace(influence, study.query, victims, top_k=5, candidates=20)
    index, some = scored
    assert index == TRAIN
    assert 20 * (1 + CONTEXT) <= some < TRAIN
    exact = influence.contributions(margin_of(study.query, victims, "text_to_image"))
    order = responsibility(exact.task, influence.sizes())
    proposed = order.topk(30, dim=1, largest=False).indices.unique()
    # Of an index of full rank; candidates of one error may turn out to be causes of another.
    assert torch.isin(traces.pairs, proposed).float().mean() >= 0.9
    off = (traces.score - exact.task.gather(1, traces.pairs)) / traces.stderr
    assert off.abs().median() < 3
