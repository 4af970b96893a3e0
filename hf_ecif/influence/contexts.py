"""Scores of rows that a model was not fitted to: each joins batches of rows that it was fitted to.

A training row is scored in batches of other training rows, and what its loss would be without it
is estimated. A row outside joins batches of the same kind, the *context batches*, which are drawn
once and have a place free. Its loss there *is* the loss without it, and its influence is that of
the enlarged batch: the change of the query if it were trained on, too, with the sign of a removal.

What is said of a row depends on that row alone: not on those that are read with it, nor on which
process scores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.objectives import Embeddings, Roles
from hf_ecif.engine.objectives.joining import Alike, Pushed
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import PROBED, Directions, Scores, ScoreTable, parts_of_roles
from hf_ecif.utils.seeds import stream


@dataclass(frozen=True, eq=False)
class Contexts:
    """Context batches: training rows, each batch with a place free.

    Attributes:
        rows: the rows that are in some batch.
        batches: ``(M, B - 1)``, their numbers, batch by batch.
    """

    rows: Rows
    batches: Tensor

    @classmethod
    def draw(cls, rows: Rows, config: InfluenceConfig) -> Contexts:
        """Random batches, as many as a training row is scored in; all processes call it together.

        Args:
            rows: the training rows.
            config: of the fit.
        """
        size = min(config.batch_size, len(rows)) - 1
        generator = stream(config.seed, "contexts")
        drawn = [
            torch.randperm(len(rows), generator=generator)[:size] for _ in range(config.partitions)
        ]
        used, batches = torch.unique(torch.stack(drawn), return_inverse=True)
        return cls(replace(rows.select(used), features=rows.features.brought(used)), batches)


@dataclass(frozen=True, eq=False)
class Newcomers:
    """Scores rows that join context batches.

    Attributes:
        influence: of the fit.
        contexts: batches of its training rows.
    """

    influence: Influence
    contexts: Contexts

    def scores(self, rows: Rows) -> Scores:
        """Scores of rows, at least one; signs and units are those of training rows.

        Nothing of a row's loss is due to a training on it, so `Scores.self_influence` is zero;
        `Scores.self_stderr` is the standard error of the loss over the context batches.
        """
        first, *others = [self._score(rows, *place) for place in self._places]
        if not others:
            return first
        return replace(
            first,
            positive=reduce(torch.add, (part.positive for part in others)),
            negative=reduce(torch.add, (part.negative for part in others)),
            stderr=reduce(torch.add, (part.stderr.square() for part in others)).sqrt(),
        )

    def score_as_given(self, rows: Rows) -> Scores:
        """Losses and cosines by the model as given; influence parts are of no query."""
        model = self.influence.model
        new, there = (model.embed_as_given(some) for some in (rows, self.contexts.rows))
        table = ScoreTable(0, 0, len(rows))
        for batch, same in self._alike(rows):
            context = _rows_of(there, batch)
            self._add(table, context, new, same, _no_roles(len(rows), new), 0)
        return table.scores(torch.Size([0]), model.encoder)

    @cached_property
    def _places(self) -> list[tuple[Tensor, Directions, list[Pushed]]]:
        """Parameters and directions to score at, and the context batches pushed there."""
        fitted = self.influence.fitted
        places = [(fitted.theta, fitted.directions)]
        if fitted.checkpoints:
            places = [(fitted.theta, fitted.directions.without_query())]
            none = Directions.none(fitted.theta)
            places += [(at.theta, none._replace(query=at.directions)) for at in fitted.checkpoints]
        return [(*place, self._push_contexts(*place)) for place in places]

    def _push_contexts(self, theta: Tensor, directions: Directions) -> list[Pushed]:
        pushed = self._push(theta, directions, self.contexts.rows)
        queries = len(directions.query.reshape(-1, len(theta)))
        batches = [
            Pushed(*(_rows_of(part, batch) for part in pushed)) for batch in self.contexts.batches
        ]
        return batches[:PROBED] + [_first(batch, queries) for batch in batches[PROBED:]]

    def _push(self, theta: Tensor, directions: Directions, rows: Rows) -> Pushed:
        encoder, config = self.influence.model.encoder, self.influence.config
        return Pushed(*encoder.push(theta, directions.stack(), rows.features, config.tangents))

    def _score(
        self, rows: Rows, theta: Tensor, directions: Directions, contexts: Sequence[Pushed]
    ) -> Scores:
        encoder = self.influence.model.encoder
        size = encoder.rows_that_fit(rows.features, max(1, len(directions.stack())))
        chunks = list(torch.arange(len(rows)).split(size))
        parts = [
            self._score_chunk(rows.select(chunk), theta, directions, contexts) for chunk in chunks
        ]
        return Scores.join(parts, chunks)

    def _score_chunk(
        self, rows: Rows, theta: Tensor, directions: Directions, contexts: Sequence[Pushed]
    ) -> Scores:
        encoder, config = self.influence.model.encoder, self.influence.config
        new = self._push(theta, directions, rows)
        queries = len(directions.query.reshape(-1, len(theta)))
        table, losses = ScoreTable(queries, len(directions.probes), len(rows)), []
        for number, (context, (_, same)) in enumerate(
            zip(contexts, self._alike(rows), strict=True)
        ):
            along = _no_roles(len(rows), new.here)
            if number == PROBED:
                new = _first(new, queries)
            if len(new.moved.scale):
                along = encoder.contrastive.joining_tangents(
                    context, new, form=config.role, same=same
                )
            losses.append(self._add(table, context.here, new.here, same, along, queries))
        scores = table.scores(directions.query.shape[:-1], encoder)
        error = torch.stack(losses).double().std(dim=0) / len(losses) ** 0.5
        return replace(
            scores,
            self_influence=torch.zeros_like(scores.loss),
            self_stderr=error.to(scores.loss),
        )

    def _add(
        self,
        table: ScoreTable,
        context: Embeddings,
        new: Embeddings,
        same: Alike | None,
        along: Roles,
        queries: int,
    ) -> Tensor:
        """Add one context batch to the sums over them; returns the losses there."""
        loss, count = self.influence.model.encoder.contrastive, len(new.text)
        terms = loss.TERMS * self.influence.fitted.train_count
        cosine = (new.text * new.image).sum(dim=1)
        losses = loss.joining_losses(context, new, same)
        parts = parts_of_roles(along, queries, terms)
        table.add(torch.arange(count), *parts, torch.stack([losses, cosine]))
        return losses.cpu()

    def _alike(self, rows: Rows) -> list[tuple[Tensor, Alike | None]]:
        """Every context batch, and what says which of its rows are no negatives of newcomers."""
        device = self.influence.theta.device
        there, new = (some.siblings.to(device) for some in (self.contexts.rows, rows))
        is_masked = self.influence.config.mask_repeated
        return [
            (batch, (there[batch.to(device)], new) if is_masked else None)
            for batch in self.contexts.batches
        ]


def _rows_of(embeddings: Embeddings, rows: Tensor) -> Embeddings:
    """Some rows of embeddings, or of tangents of them."""
    here = rows.to(embeddings.text.device)
    text, image = (side.index_select(-2, here) for side in embeddings[:2])
    return embeddings._replace(text=text, image=image)


def _first(pushed: Pushed, count: int) -> Pushed:
    """The same rows with their first tangents alone."""
    return pushed._replace(moved=Embeddings(*(part[:count] for part in pushed.moved)))


def _no_roles(count: int, like: Embeddings) -> Roles:
    """Derivatives of the roles of some rows where there are no directions."""
    return Roles(*like.scale.new_zeros(2, 0, count))
