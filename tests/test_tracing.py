"""Pairs that were planted to cause errors are the ones that the errors are traced to."""

from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
from datasets import load_dataset
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.features import Rows
from hf_ecif.influence import InfluenceModel
from hf_ecif.tracing import Errors, Traces, find_errors, trace
from tests.test_cli import DEMO

TRAIN, QUERY, PLANTED, VICTIMS = 300, 60, 8, 3


class Study(NamedTuple):
    model: InfluenceModel
    train: Rows
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
    model.fit(clean_rows, query)
    failing = set(find_errors(model, query).rows.tolist())
    victims = [row for row in range(QUERY) if row not in failing][:VICTIMS]
    planted = poison(model, clean_rows, query, victims)
    texts = list(clean_rows.texts)
    for victim, rows in zip(victims, planted.tolist(), strict=True):
        for row in rows:
            texts[row] = query.texts[victim]
    data = clean.select(range(TRAIN)).remove_columns("text").add_column("text", texts)
    train = model.read(data)
    model.fit(train, query)
    errors = find_errors(model, query)
    traces = trace(model, train, query, torch.tensor(victims), top_k=20)
    return Study(model, train, query, victims, planted, errors, traces)


def test_planted_pairs_cause_errors(study: Study) -> None:
    assert len(set(study.victims) & set(study.errors.rows.tolist())) >= 2


def test_errors_are_what_is_retrieved(study: Study) -> None:
    model, errors = study.model, study.errors
    text, image = model.encoder.embed(model.theta, study.query.features)[:2]
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
    assert (traces.relative.diff(dim=1) >= 0).all()
    torch.testing.assert_close(traces.score, traces.positive + traces.negative)
    assert (traces.score[:, :5] < 0).all()


def test_chunks_do_not_matter(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ecif.tracing.CHUNK", 1)
    ticks: list[int] = []
    again = trace(
        study.model,
        study.train,
        study.query,
        torch.tensor(study.victims),
        top_k=20,
        progress=lambda name, steps: ticks.append,
    )
    assert ticks == [1] * VICTIMS
    # Each error is solved for to the tolerance on its own, or with the others.
    torch.testing.assert_close(again.score, study.traces.score, rtol=0.05, atol=1e-4)
