"""Rows that join context batches, against losses that are written out, and against retraining."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.features import Features
from hf_ecif.influence.contexts import Contexts, Newcomers
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores
from tests.support.retraining import RAW, batch_terms, clustered_pairs, linear_clip

TRAIN, NEW = 24, 5
CONFIG = InfluenceConfig(
    batch_size=9, fit_epochs=3, partitions=3, probes=2, tolerance=1e-10, max_iterations=400
)
NAMES = ("positive", "negative", "stderr", "size", "size_stderr", "loss", "self_stderr")


def named(count: int, seed: int) -> Rows:
    """Pairs whose captions are all different."""
    texts = [f"pair {n} of {seed}" for n in range(count)]
    return Rows(clustered_pairs(count, seed), torch.arange(count), texts, {}, count)


def build(config: InfluenceConfig = CONFIG) -> tuple[Influence, Rows]:
    model = InfluenceModel(linear_clip(), None, config)
    model.encoder.freeze(RAW)
    return model.fit(named(TRAIN, 1), named(TRAIN, 2)), named(NEW, 3)


@pytest.fixture(scope="module")
def fitted() -> tuple[Influence, Rows]:
    return build()


@pytest.fixture(scope="module")
def contexts(fitted: tuple[Influence, Rows]) -> Contexts:
    return Contexts.draw(fitted[0].rows, CONFIG)


@pytest.fixture(scope="module")
def scores(fitted: tuple[Influence, Rows], contexts: Contexts) -> Scores:
    return Newcomers(fitted[0], contexts).scores(fitted[1])


def joined(contexts: Contexts, number: int, new: Rows, row: int) -> Features:
    """A context batch with a newcomer at its end."""
    context = contexts.rows.features[contexts.batches[number]]
    one = new.features[torch.tensor([row])]
    return Features(
        {"hidden": torch.cat([context.text["hidden"], one.text["hidden"]])},
        {"hidden": torch.cat([context.image["hidden"], one.image["hidden"]])},
    )


def added_terms(theta: Tensor, batch: Features) -> Tensor:
    """What the newcomer adds to the loss terms: both of its roles."""
    every = torch.arange(len(batch))
    return batch_terms(theta, batch, every) - batch_terms(theta, batch, every[:-1])


class TestContexts:
    def test_are_batches_with_a_place_free(self, contexts: Contexts) -> None:
        assert contexts.batches.shape == (CONFIG.partitions, CONFIG.batch_size - 1)
        assert all(len(batch.unique()) == len(batch) for batch in contexts.batches)

    def test_hold_no_row_that_is_in_none(self, contexts: Contexts) -> None:
        assert contexts.batches.unique().tolist() == list(range(len(contexts.rows)))

    def test_of_few_rows_leave_one_out(self, fitted: tuple[Influence, Rows]) -> None:
        few = Contexts.draw(fitted[0].rows, replace(CONFIG, batch_size=99))
        assert few.batches.shape[1] == TRAIN - 1


class TestScores:
    def test_are_what_the_enlarged_batches_gain(
        self, fitted: tuple[Influence, Rows], contexts: Contexts, scores: Scores
    ) -> None:
        influence, new = fitted
        direction = influence.fitted.directions.query
        for row in range(NEW):
            along = []
            for number in range(CONFIG.partitions):
                batch = joined(contexts, number, new, row)
                _, slope = jvp(
                    lambda theta, batch=batch: added_terms(theta, batch),
                    (influence.theta,),
                    (direction,),
                )
                along.append(slope / (2 * TRAIN))
            mean, spread = torch.stack(along).mean(), torch.stack(along).std()
            torch.testing.assert_close(scores.task[row], mean, rtol=1e-6, atol=1e-14)
            torch.testing.assert_close(scores.stderr[row], spread / 3**0.5, rtol=1e-6, atol=0)

    def test_loss_is_that_without_the_row(
        self, fitted: tuple[Influence, Rows], contexts: Contexts, scores: Scores
    ) -> None:
        influence, new = fitted
        losses = torch.stack(
            [
                torch.stack(
                    [
                        own_terms(influence.theta, joined(contexts, number, new, row))
                        for number in range(CONFIG.partitions)
                    ]
                )
                for row in range(NEW)
            ]
        )
        torch.testing.assert_close(scores.loo_loss, losses.mean(dim=1), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            scores.self_stderr, losses.std(dim=1) / 3**0.5, rtol=1e-6, atol=0
        )

    def test_depend_on_the_row_alone(
        self, fitted: tuple[Influence, Rows], contexts: Contexts, scores: Scores
    ) -> None:
        scorer = Newcomers(fitted[0], contexts)
        for row in range(NEW):
            alone = scorer.scores(fitted[1].select(torch.tensor([row])))
            for name in NAMES:
                torch.testing.assert_close(
                    getattr(alone, name)[0], getattr(scores, name)[row], rtol=1e-9, atol=1e-12
                )

    def test_as_given_are_at_the_models_own_parameters(
        self, fitted: tuple[Influence, Rows], contexts: Contexts
    ) -> None:
        influence, new = fitted
        given = Newcomers(influence, contexts).score_as_given(new)
        theta = influence.model.encoder.theta
        losses = [own_terms(theta, joined(contexts, n, new, 2)) for n in range(CONFIG.partitions)]
        torch.testing.assert_close(given.loss[2], torch.stack(losses).mean())

    def test_unrolled_adds_up_over_checkpoints(self) -> None:
        influence, new = build(replace(CONFIG, response="unrolled"))
        contexts = Contexts.draw(influence.rows, influence.config)
        found = Newcomers(influence, contexts).scores(new)
        expected = torch.zeros((), dtype=torch.float64)
        for at in influence.fitted.checkpoints:
            for number in range(CONFIG.partitions):
                batch = joined(contexts, number, new, 1)
                _, slope = jvp(
                    lambda theta, batch=batch: added_terms(theta, batch),
                    (at.theta,),
                    (at.directions,),
                )
                expected = expected + slope / (2 * TRAIN * CONFIG.partitions)
        torch.testing.assert_close(found.task[1], expected, rtol=1e-6, atol=1e-14)
        assert (found.size > 0).all()


def own_terms(theta: Tensor, batch: Features) -> Tensor:
    """Both loss terms of the last row, written out from the terms of all with its own logit."""
    image_weight, text_weight = theta.view(2, -1, batch.text["hidden"].shape[1])
    text = batch.text["hidden"] @ text_weight.T
    image = batch.image["hidden"] @ image_weight.T
    text, image = (x / x.norm(dim=1, keepdim=True) for x in (text, image))
    scale = torch.tensor(1.6, dtype=torch.float64).exp()
    row, column = scale * text[-1] @ image.T, scale * text @ image[-1]
    return -(row.log_softmax(0)[-1] + column.log_softmax(0)[-1])
