"""What other tools are given, against plain formulas; the tools themselves where they are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.func import grad
from torch.nn.functional import normalize

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.influence.model import InfluenceModel
from tests.benchmarks.heads import (
    Heads,
    average_visits,
    heads_of,
    logits_of,
    losses_at,
    pair_losses,
)
from tests.benchmarks.lds import Problem, pose
from tests.benchmarks.shared import DEMO
from tests.benchmarks.tools import ek_fac


@pytest.fixture(scope="module")
def problem() -> Problem:
    """60 rows, of which some have equal captions, and a query of 30."""
    model = InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig(seed=3))
    rows = model.read(load_rows(str(DEMO / "data"), "train").select(range(60)))
    rows = rows.with_texts_of(torch.arange(60).clamp(max=56))
    query = model.read(load_rows(str(DEMO / "data"), "validation").select(range(30)))
    return pose(model, rows, query, torch.zeros(60, dtype=torch.bool))


def query_loss(theta: torch.Tensor, problem: Problem) -> torch.Tensor:
    scale = problem.model.logit_scale.exp().item()
    (batch,) = problem.query_batches
    return losses_at(theta, batch, problem.query, problem, scale).mean()


def test_the_loss_written_out_is_that_of_the_library(problem: Problem) -> None:
    encoder, (batch,) = problem.encoder(), problem.batches
    scale = problem.model.logit_scale.exp().item()
    found = losses_at(problem.theta, batch, problem.train, problem, scale)
    embeddings = encoder.embed(problem.theta, problem.train.features[batch])
    same = problem.train.same_text[batch]
    expected = encoder.contrastive.roles(embeddings, form="exact", same=same).positive / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    text, image = Heads(problem)(problem.train.features.text, problem.train.features.image)
    torch.testing.assert_close(text[batch], embeddings.text)
    torch.testing.assert_close(image[batch], embeddings.image)


def test_a_row_has_the_mean_over_its_visits() -> None:
    batches = [torch.tensor([2, 0]), torch.tensor([1, 2])]
    found = average_visits(batches, torch.tensor([1.0, 2.0, 3.0, 5.0]), 3)
    assert found.tolist() == [2.0, 3.0, 3.0]


def test_ek_fac_of_large_damping_is_a_product_of_gradients(
    problem: Problem, tmp_path: Path
) -> None:
    """Of the query's with that of the batch's loss through the embeddings of the row alone."""
    pytest.importorskip("kronfluence")
    tool, damping = ek_fac(problem, tmp_path), 1e6
    tool.fit()
    features, same = problem.train.features, problem.train.same_text
    scale = problem.model.logit_scale.exp().item()
    towards = grad(query_loss)(problem.theta, problem)
    (batch,) = problem.batches

    def through(theta: torch.Tensor, row: int) -> torch.Tensor:
        sides = []
        for weight, fixed, hidden in zip(
            heads_of(theta, problem),
            heads_of(problem.theta, problem),
            (features.image["hidden"], features.text["hidden"]),
            strict=True,
        ):
            own = (torch.arange(len(hidden)) == row)[:, None]
            sides.append(normalize(torch.where(own, hidden @ weight.T, hidden @ fixed.T), dim=1))
        image, text = (side[batch] for side in sides)
        return pair_losses(logits_of(text, image, scale, same[batch])).sum()

    own = torch.stack([grad(through)(problem.theta, row) for row in range(60)])
    torch.testing.assert_close(
        60 * damping * tool.score(damping), own @ towards, rtol=1e-3, atol=1e-4
    )
    expected = own.square().sum(dim=1)
    torch.testing.assert_close(damping * tool.score_self(damping), expected, rtol=1e-3, atol=1e-4)
