"""Candidates for thousands of queries at once: an inner product each, in place of a pass.

The gradients of the queries span few directions, and what a pair contributes to a query is linear
in the gradient. In an orthonormal basis ``q_1 ... q_r``, it is nearly ``sum_k (grad F . q_k) c_kn``
with ``c_kn`` the contribution of pair ``n`` to ``q_k``. These do not depend on the query: they
are the index, passes with ``r`` tangents. The basis is found from random
combinations of all gradients (Halko, Martinsson & Tropp, 2011), so that neither these nor their
directions are ever held together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.engine.low_rank import CHUNK
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.queries import Query
from hf_ecif.influence.response import choose_contribution, respond
from hf_ecif.utils.seeds import stream


@dataclass(frozen=True)
class Index:
    """A sketch of what every training pair does to any query of a kind.

    Attributes:
        basis: ``(r, P)``, orthonormal rows.
        sketch: ``(2, r, N)``, both parts of the scores of the training rows along each of them.
    """

    basis: Tensor
    sketch: Tensor

    def estimate(self, gradients: Tensor) -> Tensor:
        """The positive and the negative part of all rows' scores, ``(2, Q, N)``.

        As far as the basis reaches.

        Args:
            gradients: gradients of the queries, ``(Q, P)``.
        """
        return (gradients @ self.basis.T).to(self.sketch) @ self.sketch


def build_index(
    influence: Influence,
    queries: Iterable[Query],
    rank: int,
    advance: Callable[[int], None] = lambda queries: None,
) -> Index:
    """Sketch the training rows for some queries.

    Args:
        influence: with its training rows.
        queries: all that will be asked, or others like them, some at a time.
        rank: vectors of the basis. With as many as there are queries nothing is lost.
        advance: called with the number of queries done.
    """
    generator = stream(influence.config.seed, "index")
    mixed = torch.zeros(rank, len(influence.theta)).to(influence.theta)
    for query in queries:
        # Every query counts alike, however steep it is.
        gradients = normalize(query.gradients(influence.model.encoder, influence.theta), dim=1)
        weights = torch.randn(rank, len(gradients), generator=generator).to(gradients)
        mixed += weights @ gradients
        advance(len(gradients))
    basis = torch.linalg.qr(mixed.T).Q.T.contiguous()
    training, response = influence.training, choose_contribution(influence.config)
    scores = [influence.scores_through(respond(response, training, c)) for c in basis.split(CHUNK)]
    parts = [torch.stack([some.positive, some.negative]) for some in scores]
    return Index(basis, torch.cat(parts, dim=1))
