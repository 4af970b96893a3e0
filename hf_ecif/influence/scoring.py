"""Score rows: one forward-mode pass, then arithmetic on random partitions into batches.

Embeddings and their tangents belong to rows, not to batches. So rows are pushed once, in chunks of
many contrastive batches, and every partition of a chunk is arithmetic on what was pushed. Rows of
different chunks never meet in a batch, so a chunk is scored on its own: its scores depend on its
rows and their order alone, wherever and whenever it is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_ecif.engine.encoder import DualEncoder, TangentForm
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import random_batches
from hf_ecif.engine.objectives import Embeddings, RoleForm, Roles
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints, State
from hf_ecif.utils.seeds import stream

RelativeForm = Literal["deletion", "span"]

# Partitions in which probes take part. Of the self-influence, the number of probes decides: on the
# training rows of the demo, what 16 of them find correlates with what 256 do by 0.89 in two
# partitions and by 0.90 in six, and that of 32 by 0.94 in either. The size of a row's change
# differs from batch to batch by more (32 % in two, 22 % in six), which moves no verdict.
PROBED = 2


class Directions(NamedTuple):
    """Tangents of the attributed parameters along which a pass differentiates the roles.

    Attributes:
        query: ``s = (H + damping)^-1 grad F``; ``(P,)``, or ``(Q, P)`` of several queries.
        probes: ``(K, P)``, random signs ``z``.
        solved: ``(K, P)``, ``(H + damping)^-1 z``.
    """

    query: Tensor
    probes: Tensor
    solved: Tensor

    @classmethod
    def none(cls, theta: Tensor) -> Directions:
        """No directions, for a pass that wants the losses alone."""
        empty = theta.new_zeros(0, len(theta))
        return cls(empty, empty, empty)

    def without_query(self) -> Directions:
        """The probes alone, for what does not depend on a query."""
        return self._replace(query=self.probes[:0])

    def stack(self) -> Tensor:
        """All of them, ``(Q + 2K, P)``."""
        queries = self.query.reshape(-1, self.query.shape[-1])
        if len(self.probes) == 0:
            return queries  # of whole models: not copied
        return torch.cat([queries, self.probes, self.solved])


@dataclass(frozen=True)
class Scores:
    """Per-row results, averaged over partitions; ``(N,)`` each.

    Those marked * are of a query: with several queries they are ``(Q, N)``.

    Attributes:
        positive: * predicted change of the query, in its own units, through the pair's role as a
            positive, if the pair were removed from training. Negative is harmful.
        negative: * the same through its role as a negative in the terms of other pairs.
        stderr: * standard error of ``positive + negative`` over the partitions.
        positive_size: norm of the change of the attributed parameters that the removal causes
            through the positive role, by the probes.
        negative_size: the same through the negative role.
        size: ``|omega|``, norm of the whole change.
        size_stderr: standard error of `size` over the probes.
        self_influence: ``grad Pos . (H + damping)^-1 grad(Pos + Neg) / 2N``: by how much the pair's
            own loss would rise without it, in nats.
        self_stderr: standard error of `self_influence` over the probes.
        loss: ``Pos_n``, the pair's own loss in all its terms, in nats.
        clip_score: cosine of the pair, in [-1, 1].
        scale: inverse temperature of the model as given, ``exp(logit_scale)``.
        terms: number of loss terms per pair, `Contrastive.TERMS`.
    """

    positive: Tensor
    negative: Tensor
    stderr: Tensor
    positive_size: Tensor
    negative_size: Tensor
    size: Tensor
    size_stderr: Tensor
    self_influence: Tensor
    self_stderr: Tensor
    loss: Tensor
    clip_score: Tensor
    scale: float
    terms: int

    @property
    def task(self) -> Tensor:
        """``ecif_score``: predicted change of the query if the pair were removed. *"""
        return self.positive + self.negative

    @property
    def relative(self) -> Tensor:
        """The score over `size`, so that pairs that move everything stand back. *"""
        return self.task / self.size

    @property
    def relative_span(self) -> Tensor:
        """Norm of the part of ``grad F`` that lies in the span of the two roles' changes. *

        Both roles may be scaled independently (the paper's Proposition 5.3), so it is not negative.
        """
        cross = (self.size**2 - self.positive_size**2 - self.negative_size**2) / 2
        first, second = self.positive_size**2, self.negative_size**2
        determinant = first * second - cross**2
        plane = (
            second * self.positive**2
            - 2 * cross * self.positive * self.negative
            + first * self.negative**2
        ) / determinant
        # Roles that change the parameters along one line span only that line.
        line = torch.where(first >= second, self.positive**2 / first, self.negative**2 / second)
        is_line = determinant <= 1e-6 * first * second
        return torch.where(is_line, line, plane).clamp_min(0).sqrt()

    def relative_to(self, form: RelativeForm) -> Tensor:
        """`relative` for ``"deletion"``, `relative_span` for ``"span"``. *"""
        return self.relative if form == "deletion" else self.relative_span

    @property
    def neg_clip_loss(self) -> Tensor:
        """NegCLIPLoss (Wang et al., 2024): higher where the pair is better aligned."""
        return -self.loss / (self.terms * self.scale)

    @property
    def loo_loss(self) -> Tensor:
        """The loss that the pair would have had, had it not been trained on; nats."""
        return self.loss + self.self_influence

    def to_state(self) -> State:
        """State for a checkpoint, which `from_state` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return State(tensors, {name: values[name] for name in values.keys() - tensors.keys()})

    @classmethod
    def from_state(cls, state: State) -> Scores:
        """Read from a checkpoint."""
        values: dict[str, Any] = {**state.tensors, **state.values}
        return cls(**values)

    @classmethod
    def join(cls, parts: Sequence[Scores], rows: Sequence[Tensor]) -> Scores:
        """Scores of parts of the rows, put together.

        Args:
            parts: scores of each part.
            rows: numbers of the rows of each part.
        """
        order = torch.cat(list(rows)).argsort()
        joined: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts], dim=-1)[..., order]
            for field in fields(cls)
            if isinstance(getattr(parts[0], field.name), Tensor)
        }
        return replace(parts[0], **joined)

    def of_query(self, number: int) -> Scores:
        """Scores of one query of several."""
        return replace(
            self,
            positive=self.positive[number],
            negative=self.negative[number],
            stderr=self.stderr[number],
        )


@dataclass(frozen=True)
class Pass:
    """How rows are pushed, and meet in contrastive batches.

    Attributes:
        batch_size: pairs of a batch.
        partitions: random partitions of a chunk that are averaged over.
        seed: seed of the chunks and the partitions.
        same: ``(N, L)``; rows that agree in a column are not negatives of each other; or None.
        form: form of the negative role of a single pair; that of groups is exact.
        tangents: exact forward mode, or finite differences.
    """

    batch_size: int
    partitions: int
    seed: int
    same: Tensor | None = None
    form: RoleForm = "exact"
    tangents: TangentForm = "exact"

    def of(self, rows: Tensor) -> Pass:
        """This pass over some of the rows."""
        return self if self.same is None else replace(self, same=self.same[rows])

    def batches(self, count: int) -> list[tuple[int, Tensor]]:
        """Number of the partition and rows of every batch of a chunk of ``count`` rows."""
        generator = stream(self.seed, "partitions")
        partitions = [
            random_batches(count, self.batch_size, generator) for _ in range(self.partitions)
        ]
        # One of each in turn: the first partitions take longest, and processes share the list.
        return [one for together in zip(*partitions, strict=True) for one in enumerate(together)]


class GroupScore(NamedTuple):
    """Predicted change of the query if a set of pairs were removed together; ``()`` or ``(Q,)``.

    Signs and units are those of `Scores`.
    """

    positive: Tensor
    negative: Tensor
    stderr: Tensor

    @property
    def task(self) -> Tensor:
        """The two parts together."""
        return self.positive + self.negative


def score_rows(
    encoder: DualEncoder,
    theta: Tensor,
    features: Features,
    directions: Directions,
    how: Pass,
    *,
    train_count: int,
    checkpoints: Checkpoints | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Scores of all rows, averaged over random partitions into contrastive batches.

    Args:
        encoder: encoder with the attributed parameters.
        theta: ``(P,)``.
        features: ``N`` rows.
        directions: from a fit.
        how: they are pushed, and meet.
        train_count: rows of the training set, the ``N`` of ``1 / 2N``.
        checkpoints: store of the scores of finished chunks.
        advance: called with the number of rows done, for a progress bar.
    """
    known = checkpoints or Checkpoints()
    chunks = row_chunks(features, len(directions.stack()), how, encoder)
    parts = []
    for number, rows in enumerate(chunks):

        def compute(rows: Tensor = rows) -> State:
            chunk = how.of(rows)
            return score_chunk(
                encoder, theta, features[rows], directions, chunk, train_count=train_count
            ).to_state()

        parts.append(Scores.from_state(known.remember(f"{number:06d}", compute)))
        advance(len(rows))
    return Scores.join(parts, chunks)


def score_chunk(
    encoder: DualEncoder,
    theta: Tensor,
    features: Features,
    directions: Directions,
    how: Pass,
    *,
    train_count: int,
) -> Scores:
    """Scores of rows that are pushed together, as in `score_rows`."""
    queries = directions.query.reshape(-1, len(theta)).shape[0]
    table = ScoreTable(queries, len(directions.probes), len(features))
    for batch in pushed_batches(encoder, theta, features, directions.stack(), how, queries):
        table.add(batch.rows, *_score_batch(encoder, batch, queries, how.form, train_count))
    return table.scores(directions.query.shape[:-1], encoder)


def score_embedded(
    encoder: DualEncoder, features: Features, embeddings: Embeddings, how: Pass
) -> Scores:
    """Losses and cosines of rows that are embedded already; influence parts are of no query.

    Args:
        encoder: encoder of the embeddings.
        features: features of the rows; they decide how many are worked on together.
        embeddings: embeddings of the rows.
        how: they meet.
    """
    parts, chunks = [], row_chunks(features, 0, how, encoder)
    for rows in chunks:
        table, here = ScoreTable(0, 0, len(rows)), _select(embeddings, rows)
        still = Embeddings(*(part.new_zeros(0, *part.shape) for part in here))
        for batch in batches_of(here, still, how.of(rows)):
            table.add(batch.rows, *_score_batch(encoder, batch, 0, how.form, len(features)))
        parts.append(table.scores(torch.Size([0]), encoder))
    return Scores.join(parts, chunks)


def score_group(
    encoder: DualEncoder,
    theta: Tensor,
    features: Features,
    query: Tensor,
    members: Tensor,
    how: Pass,
    *,
    train_count: int,
) -> GroupScore:
    """Predicted change of the query if the members were removed together, in the exact group form.

    Members in one batch lose their own terms, so they are no negatives of each other; the sum of
    their single scores is only the first-order answer.

    Args:
        encoder: encoder with the attributed parameters.
        theta: ``(P,)``.
        features: ``N`` rows, members and others.
        query: the direction ``s``; ``(P,)`` or ``(Q, P)``.
        members: ``(N,)`` booleans.
        how: they are pushed, and meet.
        train_count: rows of the training set.
    """
    loss = encoder.contrastive
    vectors = query.reshape(-1, len(theta))
    sums = torch.zeros(how.partitions, 2, len(vectors), dtype=theta.dtype)
    visits = torch.zeros(how.partitions, dtype=theta.dtype)
    for rows in row_chunks(features, len(vectors), how, encoder):
        for batch in pushed_batches(encoder, theta, features[rows], vectors, how.of(rows)):
            inside = members[rows[batch.rows]].to(theta.device)
            roles = loss.group_role_tangents(batch.embeddings, batch.moved, inside, batch.same)
            sums[batch.partition] += torch.stack(roles).cpu()
            visits[batch.partition] += len(batch.rows)
    sums, visits = distributed.add_up(sums), distributed.add_up(visits)
    # Rows that fill up a last batch are there twice.
    scale = len(features) / visits / (loss.TERMS * train_count)
    parts = sums * scale[:, None, None]
    error = _standard_error(parts.sum(dim=1))
    shape = query.shape[:-1]
    positive, negative = parts.mean(dim=0)
    return GroupScore(positive.reshape(shape), negative.reshape(shape), error.reshape(shape))


def join_groups(parts: Iterable[GroupScore]) -> GroupScore:
    """Sums over the checkpoints of a response, each with partitions of its own."""
    positive, negative, stderr = map(torch.stack, zip(*parts, strict=True))
    error = stderr.square().sum(dim=0).sqrt()
    return GroupScore(positive.sum(dim=0), negative.sum(dim=0), error)


@dataclass(frozen=True)
class Batch:
    """A contrastive batch, pushed.

    Attributes:
        partition: number of its partition.
        rows: ``(B,)``, of the chunk.
        embeddings: embeddings of the rows.
        moved: tangents of the embeddings, those that take part in this partition.
        same: ``(B, L)``, see `Pass`.
    """

    partition: int
    rows: Tensor
    embeddings: Embeddings
    moved: Embeddings
    same: Tensor | None


def pushed_batches(
    encoder: DualEncoder,
    theta: Tensor,
    features: Features,
    vectors: Tensor,
    how: Pass,
    lasting: int | None = None,
) -> Iterator[Batch]:
    """The batches of a chunk that are this process's to work on; `batches_of` says more."""
    return batches_of(*encoder.push(theta, vectors, features, how.tangents), how, lasting)


def batches_of(
    embeddings: Embeddings, moved: Embeddings, how: Pass, lasting: int | None = None
) -> Iterator[Batch]:
    """This process's batches of a chunk with these embeddings and tangents.

    Args:
        embeddings: ``(N, d)`` and so on, of the chunk.
        moved: ``(K, N, d)`` and so on, their tangents.
        how: they meet.
        lasting: tangents, the first ones, that take part in all partitions; the others leave after
            `PROBED` of them. All stay if absent.
    """
    batches, device = how.batches(len(embeddings.text)), embeddings.text.device
    fewer = Embeddings(*(part[:lasting] for part in moved))
    for number in distributed.share(len(batches)):
        partition, rows = batches[number]
        same, here = None if how.same is None else how.same[rows].to(device), rows.to(device)
        tangents = moved if partition < PROBED else fewer
        # As tangents.text[:, rows], but in a sixth of its time.
        text, image = (side.index_select(1, here) for side in tangents[:2])
        own = tangents._replace(text=text, image=image)
        yield Batch(partition, rows, _select(embeddings, here), own, same)


def row_chunks(features: Features, vectors: int, how: Pass, encoder: DualEncoder) -> list[Tensor]:
    """A random partition of the rows into chunks of equal size that fit in memory."""
    fit = encoder.rows_that_fit(features, max(1, vectors))  # as many without a query as with one
    size = max(fit, 4 * how.batch_size)
    order = torch.randperm(len(features), generator=stream(how.seed, "chunks"))
    return list(order.tensor_split(-(-len(features) // size)))


def _select(embeddings: Embeddings, rows: Tensor) -> Embeddings:
    here = rows.to(embeddings.text.device)
    return embeddings._replace(text=embeddings.text[here], image=embeddings.image[here])


def _score_batch(
    encoder: DualEncoder, batch: Batch, queries: int, form: RoleForm, train_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of the task score ``(Q, 2, B)``, products of probes ``(K, 4, B)``, and ``(2, B)``.

    The products estimate the squared norms of the positive, the negative and the whole change of
    the parameters, and the self-influence.
    """
    loss, embeddings = encoder.contrastive, batch.embeddings
    along = Roles(*embeddings.scale.new_zeros(2, 0, len(batch.rows)))
    if len(batch.moved.scale):
        along = loss.role_tangents(embeddings, batch.moved, form=form, same=batch.same)
    plain = torch.stack(
        [
            loss.pair_losses(embeddings, batch.same),
            (embeddings.text * embeddings.image).sum(dim=1),
        ]
    )
    return *parts_of_roles(along, queries, loss.TERMS * train_count), plain


def parts_of_roles(along: Roles, queries: int, terms: int) -> tuple[Tensor, Tensor]:
    """Parts of the task score ``(Q, 2, B)``, and products of probes ``(K, 4, B)``.

    Args:
        along: derivatives of the roles along a query's directions, the probes and the solved ones.
        queries: ``Q``, how many of them are of a query.
        terms: loss terms of the training set.
    """
    parts = torch.stack([along.positive, along.negative], dim=1) / terms
    count = (len(parts) - queries) // 2
    solved = parts[queries + count :]
    both = solved.sum(dim=1)
    # One factor 1 / 2N belongs to the pair's removal; the other factor is its plain loss.
    own = along.positive[queries : queries + count] * both
    products = torch.cat([solved.square(), both[:, None].square(), own[:, None]], dim=1)
    return parts[:queries], products


class ScoreTable:
    """Sums over the visits of every row.

    In float64, whatever the scores are: standard errors are small differences of large numbers.
    """

    def __init__(self, queries: int, probes: int, rows: int) -> None:
        self.parts = torch.zeros(queries, 2, rows, dtype=torch.float64)
        self.squares = torch.zeros(queries, rows, dtype=torch.float64)
        self.products = torch.zeros(probes, 4, rows, dtype=torch.float64)
        self.plain = torch.zeros(2, rows, dtype=torch.float64)
        self.visits = torch.zeros(rows, dtype=torch.float64)
        self.probed = torch.zeros(rows, dtype=torch.float64)  # those of them with probes

    def add(self, rows: Tensor, parts: Tensor, products: Tensor, plain: Tensor) -> None:
        here = parts.cpu().double()
        self.parts.index_add_(2, rows, here)
        self.squares.index_add_(1, rows, here.sum(dim=1).square())
        self.plain.index_add_(1, rows, plain.cpu().double())
        once = torch.ones_like(self.visits[rows])
        self.visits.index_add_(0, rows, once)
        if len(products):
            self.products.index_add_(2, rows, products.cpu().double())
            self.probed.index_add_(0, rows, once)

    def scores(self, shape: torch.Size, encoder: DualEncoder) -> Scores:
        for name, sums in vars(self).items():
            setattr(self, name, distributed.add_up(sums))
        parts = self.parts / self.visits
        task = parts.sum(dim=1)
        # Of a single visit nothing is known about the spread: its error is infinite, not zero.
        spread = (self.squares / self.visits - task.square()).clamp_min(0)
        spread = spread / (self.visits - 1).clamp_min(0)
        stderr = torch.where(self.visits > 1, spread, torch.inf).sqrt()
        (positive, negative, size, own), errors = self._over_probes()
        loss, cosine = self.plain / self.visits
        rows = (*shape, len(loss))
        values = {
            "positive": parts[:, 0].reshape(rows),
            "negative": parts[:, 1].reshape(rows),
            "stderr": stderr.reshape(rows),
            "positive_size": positive.sqrt(),
            "negative_size": negative.sqrt(),
            "size": size.sqrt(),
            "size_stderr": errors[2] / (2 * size.sqrt()),  # of a root, to first order
            "self_influence": own,
            "self_stderr": errors[3],
            "loss": loss,
            "clip_score": cosine,
        }
        rounded = {name: value.to(encoder.dtype) for name, value in values.items()}
        return Scores(**rounded, scale=encoder.scale, terms=encoder.contrastive.TERMS)

    def _over_probes(self) -> tuple[Tensor, Tensor]:
        """Means ``(4, N)`` over the probes, and their standard errors."""
        products = self.products / self.probed
        count = len(products)
        if count == 0:
            return torch.zeros_like(self.products.sum(dim=0)), self.products.sum(dim=0)
        return products.mean(dim=0), _standard_error(products)


def _standard_error(samples: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension; infinite for a single sample."""
    if len(samples) == 1:
        return torch.full_like(samples[0], torch.inf)
    return samples.std(dim=0) / len(samples) ** 0.5
