"""Why did it get this one wrong? The training pairs behind retrieval errors.

For every error the query is its retrieval margin, the log-odds against the right answer. A pair
whose removal is predicted to lower it most, for the size of the change that it causes, is the most
responsible: its relative score is the most negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ecif.features import Rows
from hf_ecif.influence import InfluenceModel
from hf_ecif.progress import ProgressFactory, silent
from hf_ecif.queries import Direction, anchors_and_keys, retrieval_margin

CHUNK = 32  # errors whose tangents are pushed together


@dataclass(frozen=True)
class Errors:
    """Rows of a paired set for which something else is retrieved.

    Attributes:
        rows: ``(E,)``, their numbers, the worst margin first.
        retrieved: ``(E,)``, the row that is retrieved instead.
        margin: ``(E,)``, log-odds against the right answer, in nats.
    """

    rows: Tensor
    retrieved: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Traces:
    """The ``k`` most responsible training pairs of every error, ``(E, k)`` each.

    Attributes:
        pairs: numbers of the training rows, the most responsible first.
        score: predicted change of the error's margin if the pair were removed, in nats; negative
            means that the error would shrink.
        positive: the part of the score from the pair's role as a positive.
        negative: the part from its role as a negative of other pairs.
        relative: the score over the size of the change that the removal causes; what is ranked by.
        stderr: standard error of the score over random partitions.
    """

    pairs: Tensor
    score: Tensor
    positive: Tensor
    negative: Tensor
    relative: Tensor
    stderr: Tensor


def find_errors(
    model: InfluenceModel, rows: Rows, direction: Direction = "text_to_image"
) -> Errors:
    """Retrieval errors of the fitted model; an equal caption's image is no error.

    Args:
        model: fitted.
        rows: pairs among which is looked for each.
        direction: what is looked for with what.
    """
    embeddings = model.encoder.embed(model.theta, rows.features)
    anchors, keys = anchors_and_keys(embeddings, direction)
    same = rows.same_text.to(anchors.device)
    found = torch.cat([(part @ keys.T).argmax(dim=1) for part in anchors.split(1024)])
    wrong = (same[found] != same).nonzero()[:, 0]
    query = retrieval_margin(rows, wrong.tolist(), direction)
    margin = query.values(model.encoder, model.theta)
    order = margin.argsort(descending=True)
    return Errors(wrong[order].cpu(), found[wrong[order]].cpu(), margin[order].cpu())


def trace(
    model: InfluenceModel,
    train: Rows,
    rows: Rows,
    errors: Tensor,
    *,
    direction: Direction = "text_to_image",
    top_k: int = 10,
    progress: ProgressFactory = silent,
) -> Traces:
    """The training pairs responsible for errors.

    Memory does not grow with the number of errors: `CHUNK` are solved for and scored at a time.

    Args:
        model: fitted on ``train``.
        train: the training rows.
        rows: the set that the errors are of.
        errors: numbers of its rows, from `find_errors` or your own, ``(E,)``.
        direction: of the retrieval.
        top_k: pairs per error.
        progress: makes a progress bar.
    """
    size = model.score(train).size
    advance = progress("Trace", len(errors))
    parts = []
    for chunk in errors.split(CHUNK):
        query = retrieval_margin(rows, chunk.tolist(), direction)
        scores = model.score_for(train, query)
        relative = scores.task / size
        pairs = relative.topk(min(top_k, len(train)), dim=1, largest=False).indices
        values = (scores.task, scores.positive, scores.negative, relative, scores.stderr)
        parts.append((pairs, *(value.gather(1, pairs) for value in values)))
        advance(len(chunk))
    return Traces(*(torch.cat(column) for column in zip(*parts, strict=True)))
