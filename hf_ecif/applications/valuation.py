"""Which pairs help, which hurt, for whom, and what would new ones bring?

One fit and one pass value every training pair for the whole query and for slices of it (a class, a
language). Removal curves check the ranking by true refits. Pairs that are not trained on yet are
valued by the same closed form, each inside batches of training rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from scipy.stats import spearmanr
from torch import Tensor

from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives.joining import Pushed
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.response import Checkpoint
from hf_ecif.influence.retraining import Version
from hf_ecif.influence.retraining import train as fine_tune
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores
from hf_ecif.utils import distributed
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import derive, stream

WHOLE = "all"
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
CHUNK = 1024  # rows that are compared with all others at a time


@dataclass(frozen=True)
class Slice:
    """Some rows of the query, and what the training pairs do to them.

    Attributes:
        name: of the slice, or `WHOLE`.
        rows: of the query.
        loss_before: contrastive loss among these rows at the model's own parameters, in nats. It
            grows with their number, so it says little beside that of another slice.
        loss: the same after the fit.
        harmful_share: share of the training pairs with a negative score.
        agreement: Spearman correlation of the scores with those for the whole query.
    """

    name: str
    rows: int
    loss_before: float
    loss: float
    harmful_share: float
    agreement: float


@dataclass(frozen=True)
class Valuation:
    """Every training pair, valued for the whole query and for its slices.

    Attributes:
        influence: of the fit; the whole query is its first one, the slices follow.
        slices: the whole query, then ``S`` slices, the largest first.
        scores: ``(1 + S, N)`` in what is of a query, in the order of `slices`.
        skipped: why a slice has no scores of its own, by its name. Its rows count in the whole.
        unnamed: rows of the query that are in no slice.
    """

    influence: Influence
    slices: list[Slice]
    scores: Scores
    skipped: dict[str, str]
    unnamed: int


@dataclass(frozen=True)
class Conflict:
    """A training pair that helps one slice and hurts another.

    Attributes:
        row: its number.
        helps: number of the slice in `Valuation.slices` that it is most valuable for.
        hurts: number of the slice that it is most harmful to.
        strength: the weaker of the two effects, less two standard errors, in standard deviations of
            the slice's scores.
    """

    row: int
    helps: int
    hurts: int
    strength: float


@dataclass(frozen=True)
class Curve:
    """What is left of the model when more and more pairs are removed, by true refits.

    Attributes:
        name: of the order of removal.
        shares: of the rows that are removed, ``M`` of them, from zero.
        losses: contrastive loss of the judging rows, in nats, ``M`` lists of one value per refit.
        recalls: share of them whose partner is retrieved first, mean of both directions; likewise.
    """

    name: str
    shares: list[float]
    losses: list[list[float]]
    recalls: list[list[float]]


@dataclass(frozen=True)
class Additions:
    """Predicted change of the query if a pair were added to training; ``(C,)``, or ``(Q, C)``.

    Negative means that the query's loss would fall: a pair worth having. The unit is the query's
    own, per pair.

    Attributes:
        positive: the change through the pair's role as a positive.
        negative: through its role as a negative in the terms of the training pairs.
        stderr: standard error of their sum over the random batches that the pair was put into.
    """

    positive: Tensor
    negative: Tensor
    stderr: Tensor

    @property
    def task(self) -> Tensor:
        """The two parts together."""
        return self.positive + self.negative


def value_by_slice(
    model: InfluenceModel,
    train: Rows,
    query: Rows,
    names: Sequence[str | None] | None = None,
    progress: ProgressFactory = silent,
) -> Valuation:
    """Fit ``model`` on ``train``, and value its rows for the query and for each of its slices.

    Signs are those of `Scores`: negative is harmful to the slice, positive valuable.

    Args:
        model: to be fitted.
        train: the rows to be valued.
        query: what is asked.
        names: the slice of every row of ``query``, None where it has none.
        progress: makes a progress bar.
    """
    given = names or [None] * len(query)
    members, skipped = _slices(query, given)
    targets = [query, *(query.select(rows) for rows in members.values())]
    influence = model.fit(train, targets, progress)
    scores = influence.scores(progress=progress)
    start, end = (
        model.query_value(targets, theta).tolist()
        for theta in (model.encoder.theta, influence.theta)
    )
    slices = [
        Slice(
            name=name,
            rows=len(targets[i]),
            loss_before=start[i],
            loss=end[i],
            harmful_share=float((scores.task[i] < 0).double().mean()),
            agreement=float(spearmanr(scores.task[0], scores.task[i]).statistic),
        )
        for i, name in enumerate([WHOLE, *members])
    ]
    return Valuation(influence, slices, scores, skipped, sum(name is None for name in given))


def find_conflicts(scores: Scores, top_k: int) -> list[Conflict]:
    """The pairs that most clearly help one slice and hurt another, the clearest first.

    Args:
        scores: of `Valuation`; the first query is the whole, and left out.
        top_k: pairs at most.
    """
    task, stderr = scores.task[1:].double(), scores.stderr[1:].double()
    if len(task) < 2:
        return []
    clear = task.sign() * (task.abs() - 2 * stderr).clamp_min(0)
    effect = clear / task.std(dim=1, keepdim=True)
    help, helped = effect.max(dim=0)
    hurt, harmed = effect.min(dim=0)
    strength = torch.minimum(help, -hurt)
    order = strength.argsort(descending=True)[:top_k]
    return [
        Conflict(row, int(helped[row]) + 1, int(harmed[row]) + 1, float(strength[row]))
        for row in order.tolist()
        if strength[row] > 0
    ]


def removal_orders(scores: Tensor, repeats: int, seed: int = 0) -> dict[str, list[Tensor]]:
    """The most harmful first, the most valuable first, and at random; an order per repeat.

    Args:
        scores: ``(N,)``, negative where a pair is harmful.
        repeats: orders of each kind; only those at random differ.
        seed: of the random orders.
    """
    generator = stream(seed, "subsets")
    shuffled = [torch.randperm(len(scores), generator=generator) for _ in range(repeats)]
    return {
        "most harmful": [scores.argsort()] * repeats,
        "random": shuffled,
        "most valuable": [scores.argsort(descending=True)] * repeats,
    }


def removal_curves(
    model: InfluenceModel,
    train: Rows,
    judge: Rows,
    orders: Mapping[str, Sequence[Tensor]],
    *,
    shares: Sequence[float] = SHARES,
    progress: ProgressFactory = silent,
) -> list[Curve]:
    """Remove pairs in given orders and fit again, with as many steps however many pairs are left.

    Args:
        model: the recipe is that of its fit, from its own values.
        train: the training rows.
        judge: what is measured after each refit; better not the query that made the scores.
        orders: by name, ``(N,)`` row numbers, those that go first in front; an order per repeat.
            Repeat ``r`` of every order has the same seed of its batches.
        shares: of the rows that are removed, each in (0, 1); zero is added.
        progress: makes a progress bar.
    """
    config, repeats = model.config, max(map(len, orders.values()))
    batch_size = min(config.batch_size, len(train) - round(max(shares) * len(train)))
    steps = math.ceil(len(train) / batch_size)
    advance = progress("Refit", repeats + sum(map(len, orders.values())) * len(shares))

    def measure(rows: Rows, repeat: int) -> tuple[float, float]:
        seed = derive(config.seed, "retraining", repeat)
        theta = fine_tune(model, Version(rows), steps=steps, batch_size=batch_size, seed=seed)
        advance(1)
        return model.query_value(judge, theta).item(), recall_at_1(model, theta, judge)

    whole = [measure(train, repeat) for repeat in range(repeats)]
    curves = []
    for name, given in orders.items():
        points = [whole[: len(given)]]
        for share in shares:
            gone = round(share * len(train))
            points.append([measure(train.select(order[gone:]), r) for r, order in enumerate(given)])
        losses, recalls = ([[pair[i] for pair in point] for point in points] for i in (0, 1))
        curves.append(Curve(name, [0.0, *shares], losses, recalls))
    return curves


def recall_at_1(model: InfluenceModel, theta: Tensor, rows: Rows) -> float:
    """Share of rows whose partner is retrieved first, the mean of both directions.

    A caption and an image that are a pair of these rows are right, whichever row they are of.
    """
    text, image = model.encoder.embed(theta, rows.features)[:2]
    captions, images = (firsts(keys)[0] for keys in (rows.keys.captions, rows.keys.images))
    fetched = _nearest(text[captions.to(text.device)], image)
    told = _nearest(image[images.to(image.device)], text)
    right = rows.are_pairs(fetched, captions), rows.are_pairs(images, told)
    return float(torch.stack([part.double().mean() for part in right]).mean())


def _nearest(anchors: Tensor, keys: Tensor) -> Tensor:
    return torch.cat([(part @ keys.T).argmax(dim=1) for part in anchors.split(CHUNK)]).cpu()


def value_additions(
    influence: Influence, candidates: Rows, progress: ProgressFactory = silent
) -> Additions:
    """Predicted change of the query if pairs were added to training, one at a time.

    With a pair in a batch, the objective grows by its two roles *there*, over ``TERMS * N``: the
    closed form of a removal, at the enlarged batch, with the opposite sign. Each pair is put into
    `InfluenceConfig.partitions` random batches of training rows, the same for all, so that pairs
    compete on equal terms. They never meet each other: of two that are alike, each is valued as if
    the other were not there. The change is of first order in the pair's weight: one that the model
    fits badly does less than predicted, since its own loss falls while it is learnt.

    Args:
        influence: with its training rows.
        candidates: pairs that are not among them.
        progress: makes a progress bar.
    """
    config, train = influence.config, influence.rows
    size = min(config.batch_size - 1, len(train))  # with the candidate, a batch as in training
    generator = stream(config.seed, "contexts")
    contexts = [
        torch.randperm(len(train), generator=generator)[:size] for _ in range(config.partitions)
    ]
    return value_in_contexts(influence, candidates, contexts, progress)


def value_in_contexts(
    influence: Influence,
    candidates: Rows,
    contexts: Sequence[Tensor],
    progress: ProgressFactory = silent,
) -> Additions:
    """Predicted change of the query if pairs were added to given batches, one at a time.

    Args:
        influence: with its training rows.
        candidates: pairs that are not among them.
        contexts: numbers of the training rows of each batch.
        progress: makes a progress bar.
    """
    checkpoints = influence.fitted.scored_at
    advance = progress("Value candidates", len(candidates) * len(checkpoints))
    values = (_value_at(influence, one, candidates, contexts, advance) for one in checkpoints)
    parts = reduce(torch.add, values)
    terms = influence.model.encoder.contrastive.TERMS * influence.fitted.train_count
    return _average(-distributed.add_up(parts) / terms, checkpoints[0].directions)


def _value_at(
    influence: Influence,
    checkpoint: Checkpoint,
    candidates: Rows,
    contexts: Sequence[Tensor],
    advance: Callable[[int], None],
) -> Tensor:
    """This process's part of what the roles grow by, ``(contexts, 2, Q, C)``."""
    encoder, config, train = influence.model.encoder, influence.config, influence.rows
    theta = checkpoint.theta
    vectors = checkpoint.directions.reshape(-1, len(theta))

    def push(features: Features) -> Pushed:
        return Pushed(*encoder.push(theta, vectors, features, config.tangents))

    shape = (len(contexts), 2, len(vectors), len(candidates))
    parts = torch.zeros(shape, dtype=torch.float64)
    size = min(CHUNK, encoder.rows_that_fit(candidates.features, len(vectors)))
    for chunk in torch.arange(len(candidates)).split(size):
        newcomers = push(candidates.features[chunk])
        for number, context in enumerate(contexts):
            others = push(train.features[context])
            if number in distributed.share(len(contexts)):
                alike = None
                if config.mask_repeated:
                    there, new = train.siblings[context], candidates.siblings[chunk]
                    alike = there.to(theta.device), new.to(theta.device)
                along = encoder.contrastive.joining_tangents(
                    others, newcomers, form=config.role, same=alike
                )
                parts[number, :, :, chunk] = torch.stack(along).cpu().double()
        advance(len(chunk))
    return parts


# ---------------------------------------------------------------------------------- slices


def _slices(query: Rows, names: Sequence[str | None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rows of every slice that has a contrastive loss, the largest first; why others have none."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            found.setdefault(name, []).append(row)
    members, skipped = {}, {}
    for name, rows in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        if len({query.texts[row] for row in rows}) > 1:
            members[name] = torch.tensor(rows)
        elif len(rows) == 1:
            skipped[name] = "a single row, with none to tell it from"
        else:
            skipped[name] = f"its {len(rows)} captions are equal, with nothing to tell apart"
    return members, skipped


# ---------------------------------------------------------------------------- a pair joins


def _average(parts: Tensor, query: Tensor) -> Additions:
    """Over contexts; ``(M, 2, Q, C)``. Of a single one nothing is known about the spread."""
    task = parts.sum(dim=1)
    stderr = (
        task.std(dim=0) / len(task) ** 0.5 if len(task) > 1 else torch.full_like(task[0], torch.inf)
    )
    values = (*parts.mean(dim=0), stderr)
    return Additions(*(value.reshape(*query.shape[:-1], -1).to(query.dtype) for value in values))
