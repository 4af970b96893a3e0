"""Training pairs behind mispredictions.

For every error the query is a margin, the log-odds against the right answer. A pair is responsible
for what its own gradients added to the margin during the fit, its *contribution* (see
`hf_ecif.influence.response`), as a positive or as a hard negative of a partner, which is found,
too. Pairs are ranked by it, relative to the size of their whole effect; see `responsibility`.

A cause differs from the effect of a removal. If several wrong pairs teach one error, the others
compensate for each one that is removed, so the predicted effect of a removal hides them: 0.97 of
injected causes are among the first 20 by contribution, 0.66 by the effect of removal.
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
# For the index that proposes candidates. For 362 errors of the demo, 200 candidates of 1,492 rows
# contain 69, 84, 94, 99 % of the ten causes at ranks 16, 32, 64, 128; time grows with the rank.
RANK = 64
CONTEXT = 3  # rows per candidate in its batches

Task = Direction | Literal["zero_shot"]


@dataclass(frozen=True)
class Errors:
    """Mispredicted rows of a paired or labelled set.

    Attributes:
        rows: ``(E,)``, numbers of the rows, the worst margin first.
        retrieved: ``(E,)``, the row that is retrieved instead; for a wrong class, its first row.
        margin: ``(E,)``, log-odds against the right answer, in nats.
    """

    rows: Tensor
    retrieved: Tensor
    margin: Tensor

    def worst(self, most: int) -> Errors:
        """Errors of the largest margins, at most so many."""
        return Errors(self.rows[:most], self.retrieved[:most], self.margin[:most])


@dataclass(frozen=True)
class Traces:
    """``k`` most responsible training pairs of every error, ``(E, k)`` each.

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
        """Traces of no errors."""
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
        influence: influence with the fitted parameters.
        rows: pairs, or labelled images, whose captions are the classes.
        direction: direction of the retrieval, or ``zero_shot`` for the class of an image.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> rows = model.read(demo.query)
        >>> errors = hf_ecif.find_errors(model.fit(pairs, rows), rows)
        >>> 0 < len(errors.rows) < 200
        True
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
    """Chosen rows as errors, the worst margin first, whether they are wrong or not.

    Args:
        influence: influence with the fitted parameters.
        rows: the whole set.
        chosen: numbers of the chosen rows, ``(E,)``.
        direction: see `find_errors`.
        found: prediction for each of ``rows``, if known.
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
    """Query of the log-odds against the right answer, one value for each chosen row."""
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
    """Training pairs responsible for errors.

    Memory does not grow with the number of errors: `CHUNK` are solved for and scored at a time.

    Args:
        influence: influence, with its training rows.
        rows: the set that contains the errors.
        errors: numbers of its rows, from `find_errors` or chosen, ``(E,)``.
        direction: direction of the retrieval, or ``zero_shot``.
        top_k: number of pairs per error.
        candidates: number of rows that an index proposes for each error, which are then scored
            exactly; 0 scores all rows. It pays if there are many times more rows than
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
    """Score over the root of the size, by which pairs are ranked, the most responsible lowest.

    It is the geometric mean of the score and the relative score, with their sign. The score alone
    favours pairs with a large effect on everything, the relative score those with hardly any. Of
    causes injected for 40 concepts of the validation split, 0.954 are among the first 20, and 0.940
    by the score alone; eight concepts improve and none gets worse.

    Args:
        score: ``(E, N)``, contributions.
        size: ``(N,)``, size of each pair's effect; `Influence.sizes`.
    """
    return score / size.sqrt()


def _predict(influence: Influence, rows: Rows, direction: Task) -> Tensor:
    """Number of the row that is predicted for each row, ``(n,)``."""
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
    """Candidates of some errors together, sorted, and rows for their context; None for all rows.

    A score depends on the batch. Candidates are harder negatives of each other than random rows, so
    they are mixed with others. Both are numbers of training rows.
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
    """Columns of `Traces` for errors with these directions at the checkpoints."""
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
