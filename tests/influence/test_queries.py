"""Queries against autograd through the model's own forward, and the choice of a query."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence import queries
from hf_ecif.influence.queries import (
    Query,
    choose_query,
    retrieval_margin,
    zero_shot,
    zero_shot_margin,
)
from hf_ecif.influence.rows import Rows
from tests.support.families import build, build_inputs, forward, gaussian

COUNT, GROUPS = 144, 3  # as many rows as make choose_query form three clusters
FEW = r"_projection\.|text_model\.head\.weight|logit_"
FAMILIES = pytest.mark.parametrize("family", ["clip", "siglip"])
# Captions 0 and 3, and captions 1, 2 and 5 are repeated.
CAPTIONS = ["cat", "dog", "dog", "cat", "owl", "dog", "fox"]
PAIRS = len(CAPTIONS)


# ------------------------------------------------------------------------ values, gradients


class Asked:
    """Rows with repeated captions, an encoder of them, and embeddings by the model's forward."""

    def __init__(self, family: str) -> None:
        inputs = build_inputs(family, PAIRS)
        first = torch.tensor([CAPTIONS.index(caption) for caption in CAPTIONS])
        inputs = inputs.with_texts_of(first)  # equal captions are equal inputs
        self.encoder = DualEncoder(build(family), FEW, micro_batch_size=3)
        features = self.encoder.freeze(inputs)
        self.rows = Rows(features, torch.arange(PAIRS), CAPTIONS, {}, PAIRS)
        self.theta = self.encoder.theta + 0.05 * gaussian(self.encoder.count)
        self.oracle = forward(build(family), self.encoder.names, inputs)

    def check(self, query: Query, function: Callable[[Embeddings], Tensor]) -> None:
        """Values and gradients are those of a function of the embeddings of the pairs."""
        theta = self.theta.clone().requires_grad_()
        expected = function(self.oracle(theta))
        values = query.values(self.encoder, self.theta)
        torch.testing.assert_close(values, expected.detach(), rtol=1e-8, atol=1e-10)
        slopes = [
            torch.autograd.grad(value, theta, retain_graph=True)[0] for value in expected.view(-1)
        ]
        gradients = query.gradients(self.encoder, self.theta)
        oracle = torch.stack(slopes).view(*expected.shape, -1)
        torch.testing.assert_close(gradients, oracle, rtol=1e-6, atol=1e-8)


def worst_cosine(embeddings: Embeddings) -> Tensor:
    return (1 - (embeddings.text * embeddings.image).sum(dim=1)).logsumexp(dim=0)


def own_logits(embeddings: Embeddings) -> Tensor:
    text, image, scale, bias = embeddings
    return -(scale * (text * image).sum(dim=1) + bias)


@FAMILIES
@pytest.mark.parametrize("function", [worst_cosine, own_logits])
def test_function_of_ones_own(family: str, function: Callable[[Embeddings], Tensor]) -> None:
    asked = Asked(family)
    asked.check(Query(asked.rows.features, function), function)


def test_many_queries_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked("clip")
    monkeypatch.setattr(queries, "CHUNK", 3)
    asked.check(Query(asked.rows.features, own_logits), own_logits)


def test_function_may_ignore_a_side() -> None:
    asked = Asked("siglip")
    asked.check(Query(asked.rows.features, lambda e: e.text.sum()), lambda e: e.text.sum())


@FAMILIES
@pytest.mark.parametrize("each", [False, True])
def test_zero_shot(family: str, each: bool) -> None:
    """``-log softmax`` of every image over the four distinct captions, by hand."""
    asked = Asked(family)
    query = zero_shot(asked.rows, each=each)
    assert len(query.features.text["hidden"]) == 4

    def function(embeddings: Embeddings) -> Tensor:
        classes = list(dict.fromkeys(CAPTIONS))
        losses = []
        for n, caption in enumerate(CAPTIONS):
            odds = torch.stack(
                [
                    embeddings.scale * embeddings.image[n] @ embeddings.text[CAPTIONS.index(c)]
                    for c in classes
                ]
            )
            losses.append(odds.logsumexp(dim=0) - odds[classes.index(caption)])
        return torch.stack(losses) if each else torch.stack(losses).mean()

    asked.check(query, function)


@FAMILIES
def test_zero_shot_margin(family: str) -> None:
    """Log odds against the class of some images, by hand; of all, the odds that zero_shot sees."""
    asked, images = Asked(family), [6, 1, 4]
    query = zero_shot_margin(asked.rows, images)

    def function(embeddings: Embeddings) -> Tensor:
        classes = list(dict.fromkeys(CAPTIONS))
        margins = []
        for n in images:
            logits = {
                c: embeddings.scale * embeddings.image[n] @ embeddings.text[CAPTIONS.index(c)]
                for c in classes
            }
            own = logits.pop(CAPTIONS[n])
            margins.append(torch.stack([*logits.values()]).logsumexp(dim=0) - own)
        return torch.stack(margins)

    asked.check(query, function)
    values = query.values(asked.encoder, asked.theta)
    losses = zero_shot(asked.rows, each=True).values(asked.encoder, asked.theta)
    torch.testing.assert_close(torch.nn.functional.softplus(values), losses[images])


@FAMILIES
@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_retrieval_margin(family: str, direction: Any) -> None:
    """Log odds against the right answers: rows of the caption; every caption is one candidate."""
    asked, pairs = Asked(family), [5, 0, 6]
    query = retrieval_margin(asked.rows, pairs, direction)

    def function(embeddings: Embeddings) -> Tensor:
        logits = embeddings.scale * embeddings.text @ embeddings.image.T
        if direction == "image_to_text":
            logits = logits.T
        candidates = list(range(PAIRS))
        if direction == "image_to_text":
            candidates = [CAPTIONS.index(caption) for caption in dict.fromkeys(CAPTIONS)]
        odds = []
        for n in pairs:
            right = [j for j in candidates if CAPTIONS[j] == CAPTIONS[n]]
            wrong = [j for j in candidates if CAPTIONS[j] != CAPTIONS[n]]
            odds.append(logits[n, wrong].logsumexp(dim=0) - logits[n, right].logsumexp(dim=0))
        return torch.stack(odds)

    asked.check(query, function)


def test_margin_tells_whether_the_answer_is_right() -> None:
    """Positive where the candidates are likelier than the answer, together."""
    asked = Asked("clip")
    swapped = asked.rows.features.with_texts_of(torch.tensor([4, 1, 2, 3, 0, 5, 6]))
    images = Features(swapped.text, swapped.image)
    rows = Rows(images, torch.arange(PAIRS), [str(n) for n in range(PAIRS)], {}, PAIRS)
    values = retrieval_margin(rows, range(PAIRS)).values(asked.encoder, asked.theta)
    batch = asked.encoder.embed(asked.theta, images)
    share = (batch.scale * batch.text @ batch.image.T).softmax(dim=1).diagonal()
    torch.testing.assert_close(values.sigmoid(), 1 - share)


# ---------------------------------------------------------------------------------- choice


def build_rows(text: Tensor, image: Tensor) -> Rows:
    return Rows(
        features=Features(
            {"features": normalize(text, dim=1)}, {"features": normalize(image, dim=1)}
        ),
        positions=torch.arange(len(text)) + 5,
        texts=[f"caption {i}" for i in range(len(text))],
        reasons={0: "image missing"},
        total=len(text) + 5,
    )


def as_embeddings(theta: Tensor, features: Features) -> Embeddings:
    return Embeddings(features.text["features"], features.image["features"], theta, 0 * theta)


ENCODER: Any = SimpleNamespace(
    embed_as_given=lambda features: as_embeddings(torch.tensor(1.0), features)
)


def build_groups(seed: int) -> tuple[Rows, Tensor]:
    """Three groups of images; the model knows the first best, and in each some rows better."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(COUNT) % GROUPS
    image = torch.eye(GROUPS)[group] + 0.01 * torch.randn(COUNT, GROUPS, generator=generator)
    noise = torch.randn(COUNT, GROUPS, generator=generator)
    return build_rows(image + 0.3 * (1 + 3 * group[:, None]) * noise, image), group


def aligned(rows: Rows) -> Tensor:
    return (rows.features.text["features"] * rows.features.image["features"]).sum(dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_best_aligned_pairs_of_every_cluster(seed: int) -> None:
    rows, group = build_groups(seed)
    query = choose_query(rows, ENCODER, share=0.1, seed=seed)
    expected: set[int] = set()
    for members in ((group == g).nonzero()[:, 0] for g in range(GROUPS)):
        best = aligned(rows)[members].topk(round(0.1 * len(members))).indices
        expected |= {int(position) for position in rows.positions[members[best]]}
    assert set(query.positions.tolist()) == expected
    assert len(query) == len(expected)


def test_chosen_rows_keep_caption_and_features() -> None:
    rows, _ = build_groups(0)
    query = choose_query(rows, ENCODER)
    chosen = query.positions - 5
    assert query.texts == [rows.texts[i] for i in chosen.tolist()]
    assert torch.equal(query.features.text["features"], rows.features.text["features"][chosen])
    assert torch.equal(query.features.image["features"], rows.features.image["features"][chosen])
    assert (query.reasons, query.total) == ({}, len(query))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (3, 2), (10, 2), (40, 4)])
def test_few_rows(count: int, expected: int) -> None:
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(2, count, 4, generator=generator)
    query = choose_query(build_rows(text, image), ENCODER)
    assert expected <= len(query) <= expected + 2
    assert len(set(query.positions.tolist())) == len(query)


def test_equal_seed_gives_equal_choice() -> None:
    rows, _ = build_groups(0)
    first, second = (choose_query(rows, ENCODER, seed=4).positions for _ in range(2))
    assert torch.equal(first, second)
