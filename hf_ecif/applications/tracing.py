"""Why did it get this one wrong? The training pairs behind mispredictions.

For every error the query is a margin, the log-odds against the right answer. A pair is responsible
for what its own gradients have added to the margin in the course of the fit, its *contribution*
(see `hf_ecif.influence.response`), as a positive or as a hard negative (of which partner, is
found, too).
Pairs are ranked by that and by how much of what they move it is; see `responsibility`.

A cause is something else than what a removal would change. Where several wrong pairs teach the same
error, the others make up for each that is removed, so that the predicted effect of a removal hides
them: of injected causes, 0.97 are among the first 20 by what they contributed, 0.66 by the effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_ecif.influence.gradient_index import Index, build_index
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.queries import (
    Direction,
    Query,
    anchors_and_keys,
    first_rows,
    retrieval_margin,
    zero_shot_margin,
)
from hf_ecif.influence.response import Checkpoint, choose_contribution, respond
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import stream

CHUNK = 32  # errors whose tangents are pushed together
# Of the index that proposes candidates. For 362 errors of the demo, 200 candidates of 1,492 rows
# hold 69, 84, 94, 99 % of the ten causes at ranks 16, 32, 64, 128; the time goes as the rank.
RANK = 64
CONTEXT = 3  # rows that candidates are batched with, for each of them

Task = Direction | Literal["zero_shot"]


@dataclass(frozen=True)
class Errors:
    """Rows of a paired or labelled set for which something else is predicted.

    Attributes:
        rows: ``(E,)``, their numbers, the worst margin first.
        retrieved: ``(E,)``, the row that is retrieved instead; of a wrong class, its first row.
        margin: ``(E,)``, log-odds against the right answer, in nats.
    """

    rows: Tensor
    retrieved: Tensor
    margin: Tensor

    def worst(self, most: int) -> Errors:
        """So many at most, those of the largest margin."""
        return Errors(self.rows[:most], self.retrieved[:most], self.margin[:most])


@dataclass(frozen=True)
class Traces:
    """The ``k`` most responsible training pairs of every error, ``(E, k)`` each.

    Attributes:
        pairs: numbers of the training rows, the most responsible first.
        score: change of the error's margin without what the pair has contributed, in nats;
            negative means that the error would shrink.
        positive: the part of the score from the pair's role as a positive.
        negative: the part from its role as a negative of other pairs.
        relative: the score over the size of the change that the pair's removal causes.
        stderr: standard error of the score over random partitions.
        partner: number of the training row in whose terms the pair acts most strongly as a
            negative, of those that it met in a batch; -1 where there is none.
        partner_part: what it does there alone, in one batch; a part of `negative`.
    """

    pairs: Tensor
    score: Tensor
    positive: Tensor
    negative: Tensor
    relative: Tensor
    stderr: Tensor
    partner: Tensor
    partner_part: Tensor

    @classmethod
    def none(cls, top_k: int) -> Traces:
        """Of no errors."""
        numbers, values = torch.zeros(0, top_k, dtype=torch.int64), torch.zeros(0, top_k)
        return cls(numbers, values, values, values, values, values, numbers, values)

    @property
    def is_negative(self) -> Tensor:
        """Whether a pair is responsible as a negative rather than as a positive."""
        return self.negative < self.positive


def find_errors(influence: Influence, rows: Rows, direction: Task = "text_to_image") -> Errors:
    """Mispredictions of the fitted model; a caption and an image that are a pair are right.

    An image that fetches any of its captions is right, and so is a caption that fetches any of its
    images. Every image, or every caption, is asked once, by its first row.

    Args:
        influence: whose fitted parameters predict.
        rows: pairs among which is looked for each, or labelled images, whose captions are the
            classes.
        direction: what is looked for with what; or ``zero_shot``, the class of an image.
    """
    found = _predict(influence, rows, direction)
    asked = queries_of(rows, direction)
    ends = (found[asked], asked) if direction == "text_to_image" else (asked, found[asked])
    wrong = asked[~rows.are_pairs(*ends)]
    return describe_errors(influence, rows, wrong, direction, found)


def queries_of(rows: Rows, direction: Task) -> Tensor:
    """``(n,)``, the first row of every distinct caption, or of every distinct image."""
    keys = rows.keys
    return firsts(keys.captions if direction == "text_to_image" else keys.images)[0]


def describe_errors(
    influence: Influence,
    rows: Rows,
    chosen: Tensor,
    direction: Task = "text_to_image",
    found: Tensor | None = None,
) -> Errors:
    """Rows of your own choice as errors, the worst margin first, whether they are wrong or not.

    Args:
        influence: whose fitted parameters predict.
        rows: the set they are of.
        chosen: their numbers, ``(E,)``.
        direction: as in `find_errors`.
        found: what is predicted for each of ``rows``, where it is known.
    """
    found = _predict(influence, rows, direction) if found is None else found
    margins = [
        margin_of(rows, part, direction).values(influence.model.encoder, influence.theta).cpu()
        for part in chosen.split(CHUNK)
        if len(part)
    ]
    margin = torch.cat([torch.zeros(0), *margins])
    order = margin.argsort(descending=True)
    return Errors(chosen[order], found[chosen[order]], margin[order])


def margin_of(rows: Rows, chosen: Tensor, direction: Task) -> Query:
    """The log-odds against the right answers of some rows, one query each."""
    if direction == "zero_shot":
        return zero_shot_margin(rows, chosen.tolist())
    return retrieval_margin(rows, chosen.tolist(), direction)


def trace(
    influence: Influence,
    rows: Rows,
    errors: Tensor,
    *,
    direction: Task = "text_to_image",
    top_k: int = 10,
    candidates: int = 0,
    progress: ProgressFactory = silent,
) -> Traces:
    """The training pairs responsible for errors.

    Memory does not grow with the number of errors: `CHUNK` are solved for and scored at a time.

    Args:
        influence: with its training rows.
        rows: the set that the errors are of.
        errors: numbers of its rows, from `find_errors` or your own, ``(E,)``.
        direction: of the retrieval, or ``zero_shot``.
        top_k: pairs per error.
        candidates: rows that an index proposes for each error, among which the exact score
            decides; 0 scores all rows. Worth it where the rows are many times as many as
            ``4 * CHUNK * candidates``.
        progress: makes a progress bar.
    """
    if not len(errors):
        return Traces.none(top_k)
    sizes = influence.sizes()
    chunks = [(chunk, margin_of(rows, chunk, direction)) for chunk in errors.split(CHUNK)]
    index = None
    if candidates:
        queries = (query for _, query in chunks)
        advance = progress("Index", len(errors))
        index = build_index(influence, queries, min(RANK, len(errors)), advance)
    contribution = choose_contribution(influence.config)
    advance = progress("Trace", len(errors))
    parts = []
    for chunk, query in chunks:
        gradients = query.gradients(influence.model.encoder, influence.theta)
        among = _propose(index, gradients, sizes, max(candidates, top_k), influence.config.seed)
        checkpoints = respond(contribution, influence.training, gradients)
        parts.append(_trace_chunk(influence, checkpoints, sizes, among, top_k))
        advance(len(chunk))
    return Traces(*(torch.cat(column) for column in zip(*parts, strict=True)))


def responsibility(score: Tensor, size: Tensor) -> Tensor:
    """What pairs are ranked by, the most responsible lowest: the score over the root of the size.

    That is the geometric mean of the score and the relative score, with their sign. The score alone
    puts pairs in front that move everything, the relative one such as hardly moved anything. Of the
    causes injected for 40 concepts of the validation split, 0.954 are among the first 20, by the
    score alone 0.940; eight concepts are better for it and none is worse.

    Args:
        score: ``(E, N)``, contributions.
        size: ``(N,)``, how much the pair moves; `Influence.sizes`.
    """
    return score / size.sqrt()


def _predict(influence: Influence, rows: Rows, direction: Task) -> Tensor:
    """The row that each row's answer is taken from, ``(n,)``."""
    embeddings = influence.model.encoder.embed(influence.theta, rows.features)
    if direction == "zero_shot":
        classes = first_rows(rows)
        texts = embeddings.text[classes.to(embeddings.text.device)]
        return classes[_nearest(embeddings.image, texts)]
    return _nearest(*anchors_and_keys(embeddings, direction))


def _nearest(anchors: Tensor, keys: Tensor) -> Tensor:
    return torch.cat([(part @ keys.T).argmax(dim=1) for part in anchors.split(1024)]).cpu()


def _propose(
    index: Index | None, gradients: Tensor, sizes: Tensor, count: int, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Candidates of some errors together, sorted, and rows for their context; None for all.

    A score depends on the batch. Candidates alone would be harder negatives of each other than
    random rows are, so they are mixed with others. Both are numbers of training rows.
    """
    if index is None:
        return None
    estimate = responsibility(index.estimate(gradients).sum(dim=0), sizes)
    rows = estimate.shape[1]
    proposed = estimate.topk(min(count, rows), dim=1, largest=False).indices.unique()
    others = torch.ones(rows, dtype=torch.bool).index_fill(0, proposed, False).nonzero()[:, 0]
    if len(others) <= CONTEXT * len(proposed):
        return None
    generator = stream(seed, "contexts")
    drawn = torch.randperm(len(others), generator=generator)[: CONTEXT * len(proposed)]
    return proposed, others[drawn]


def _trace_chunk(
    influence: Influence,
    checkpoints: Sequence[Checkpoint],
    sizes: Tensor,
    among: tuple[Tensor, Tensor] | None,
    top_k: int,
) -> tuple[Tensor, ...]:
    """The columns of `Traces`, for errors with these directions at the checkpoints."""
    train = influence.rows
    numbers = torch.arange(len(train)) if among is None else torch.cat(among)
    rows = train if among is None else train.select(numbers)
    count = len(numbers) if among is None else len(among[0])
    scores = influence.scores_through(checkpoints, rows)
    size = sizes[numbers]
    order = responsibility(scores.task, size)[:, :count]
    best = order.topk(min(top_k, count), dim=1, largest=False).indices
    relative = scores.task / size
    values = (scores.task, scores.positive, scores.negative, relative, scores.stderr)
    partners = influence.partners(checkpoints, best, rows)
    partner = torch.where(partners.rows < 0, -1, numbers[partners.rows])
    chosen = (value.gather(1, best) for value in values)
    return (numbers[best], *chosen, partner, partners.parts)
