"""The query: what is asked of the model, whose change under removal the scores predict.

Rows as a query mean their contrastive loss. A `Query` is any other function of embeddings: the
cross-entropy of a zero-shot classification, the margin of a retrieval, or your own. All are losses:
they fall when the model gets better, so that a negative score means harmful.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.functional import cross_entropy

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.neighbours import cluster
from hf_ecif.engine.objective import Objective
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.pairs import distinct_pairs
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.seeds import derive

Direction = Literal["text_to_image", "image_to_text"]
CHUNK = 64  # queries whose cotangents are held at a time


@dataclass(frozen=True)
class Query:
    """One or several quantities that depend on the model through embeddings.

    Attributes:
        features: inputs of the embeddings. Texts and images need not be pairs, nor equally many.
        function: ``Embeddings -> ()`` for one query, ``-> (Q,)`` for several; built from torch
            operations. Lower must be better.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> query = model.read(demo.query)
        >>> misfit = hf_ecif.Query(query.features, lambda e: -(e.text * e.image).sum(dim=1).mean())
        >>> model.fit(pairs, misfit).scores().task.shape
        torch.Size([60])
    """

    features: Features
    function: Callable[[Embeddings], Tensor]

    def values(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        """``F(theta)``; ``()`` or ``(Q,)``."""
        return self.function(encoder.embed(theta, self.features))

    def gradients(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        """``grad F``; ``(P,)`` or ``(Q, P)``."""
        values, pull = vjp(self.function, encoder.embed(theta, self.features))[:2]
        basis = torch.eye(values.numel()).to(values).view(-1, *values.shape)
        rows = [
            encoder.pull(theta, Embeddings(*vmap(pull)(part)[0]), self.features)
            for part in basis.split(CHUNK)
        ]
        return torch.cat(rows).view(*values.shape, len(theta))


class Target(Protocol):
    """Quantities whose change the scores predict: one, or several."""

    def values(self, encoder: DualEncoder, theta: Tensor) -> Tensor: ...

    def gradients(self, encoder: DualEncoder, theta: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ContrastiveLoss:
    """Contrastive loss of any number of rows, batch by batch."""

    objective: Objective

    def values(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        return self.objective.value(theta)

    def gradients(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        return self.objective.gradient(theta)


@dataclass(frozen=True)
class Several:
    """Queries side by side, their values and gradients one after the other."""

    targets: list[Target]

    def values(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        return torch.cat([target.values(encoder, theta).reshape(-1) for target in self.targets])

    def gradients(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        gradients = [target.gradients(encoder, theta) for target in self.targets]
        return torch.cat([gradient.reshape(-1, len(theta)) for gradient in gradients])


def zero_shot(rows: Rows, *, each: bool = False) -> Query:
    """Cross-entropy of telling the images of ``rows`` by their captions, the class prompts.

    Args:
        rows: labelled images; the distinct captions are the classes.
        each: one query for every image, or their mean.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> classes = hf_ecif.zero_shot(model.read(demo.query))
        >>> model.fit(pairs, classes).scores().task.shape
        torch.Size([60])
    """
    labels = rows.same_text

    def function(embeddings: Embeddings) -> Tensor:
        logits = embeddings.scale * embeddings.image @ embeddings.text.T
        target = labels.to(logits.device)
        return cross_entropy(logits, target, reduction="none" if each else "mean")

    return Query(rows.features[first_rows(rows)].paired_with(rows.features), function)


def zero_shot_margin(rows: Rows, images: Sequence[int]) -> Query:
    """Margin of the other classes together over the right ones; one query per image.

    ``logsumexp_wrong S_c - logsumexp_right S_c``, in nats: the logarithm of the odds against them.

    Args:
        rows: labelled images; the distinct captions are the classes, two at least.
        images: numbers of the rows in question.
    """
    chosen = torch.tensor(list(images))
    classes = first_rows(rows)
    right = rows.are_pairs(chosen[:, None], classes)

    def function(embeddings: Embeddings) -> Tensor:
        return _log_odds(embeddings.scale * embeddings.image @ embeddings.text.T, right)

    return Query(rows.features[classes].paired_with(rows.features[chosen]), function)


def first_rows(rows: Rows) -> Tensor:
    """``(C,)``, the first row of every distinct caption, in order."""
    return firsts(rows.keys.captions)[0]


def retrieval_margin(
    rows: Rows,
    pairs: Sequence[int],
    direction: Direction = "text_to_image",
) -> Query:
    """Margin of the wrong answers together over the right ones; one query per pair.

    ``logsumexp_wrong S_nj - logsumexp_right S_nj``, in nats: the logarithm of the odds against a
    right answer. Every image, or every caption, counts once.

    Args:
        rows: the candidates. An image and a caption that are a pair of them are right.
        pairs: numbers of the rows in question.
        direction: what is looked for with what.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> margins = hf_ecif.retrieval_margin(model.read(demo.query), [3, 14, 15])
        >>> model.fit(pairs, margins).scores().task.shape
        torch.Size([3, 60])
    """
    chosen = torch.tensor(list(pairs))
    if direction == "text_to_image":
        candidates = firsts(rows.keys.images)[0]
        right = rows.are_pairs(candidates, chosen[:, None])
    else:
        candidates = first_rows(rows)
        right = rows.are_pairs(chosen[:, None], candidates)

    def function(embeddings: Embeddings) -> Tensor:
        anchors, keys = anchors_and_keys(embeddings, direction)
        asked, among = anchors[chosen.to(anchors.device)], keys[candidates.to(keys.device)]
        return _log_odds(embeddings.scale * asked @ among.T, right)

    return Query(rows.features, function)


def _log_odds(logits: Tensor, right: Tensor) -> Tensor:
    """Log-odds against the right columns of every row, ``(n,)`` of ``(n, C)``."""
    right = right.to(logits.device)
    against, in_favour = (logits.masked_fill(mask, -torch.inf) for mask in (right, ~right))
    return against.logsumexp(dim=1) - in_favour.logsumexp(dim=1)


def anchors_and_keys(embeddings: Embeddings, direction: Direction) -> tuple[Tensor, Tensor]:
    """Embeddings that search, and those that are searched."""
    text, image = embeddings[:2]
    return (text, image) if direction == "text_to_image" else (image, text)


def choose_query(rows: Rows, encoder: DualEncoder, *, share: float = 0.1, seed: int = 0) -> Rows:
    """The pairs best aligned under the model itself, balanced over clusters of images.

    Without the balance the query would be what the model knows best already, and say nothing of the
    rest of the data.

    Args:
        rows: the data, of which copies count once.
        encoder: embeds them, with the model's own parameters.
        share: share of every cluster that is chosen; two pairs at least in all.
        seed: seed of the clustering.
    """
    rows = distinct_pairs(rows).rows
    embeddings = encoder.embed_as_given(rows.features)
    aligned = (embeddings.text * embeddings.image).sum(dim=1).cpu()  # as the clusters are
    count = max(1, round(len(rows) ** 0.5 / 4))
    clusters = cluster(embeddings.image, count, derive(seed, "clusters"))
    chosen = [_best(aligned, (clusters == c).nonzero()[:, 0], share) for c in range(count)]
    return rows.select(torch.cat(chosen))


def _best(aligned: Tensor, members: Tensor, share: float) -> Tensor:
    order = aligned[members].argsort(descending=True)
    return members[order[: max(2, round(share * len(members)))]]
