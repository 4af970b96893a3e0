"""What a contrastive loss has to offer; a module that has these functions is one (PEP 544)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hf_ecif.engine.objectives.linearised import LinearisedLoss
from hf_ecif.engine.objectives.similarity import Embeddings, RoleForm, Roles


class Contrastive(Protocol):
    """A loss over all pairs of a batch, and what each pair contributes to it.

    A pair ``n`` acts in two roles: *positive*, through its own terms, and *negative*, through what
    its presence adds to the terms of others. Both are in nats and unnormalised.

    In every function ``same``, if given, is ``(B, L)`` integers: pairs with an equal number in any
    of the columns (one caption, say, or one image) are not taken as negatives of each other; of a
    single column, ``(B,)`` will do. Tangents and cotangents of a batch have its form with a leading
    ``K``: ``(K, B, d)`` for text and image, ``(K,)`` for scale and bias.

    ``rows``, where a function has it, are the pairs whose terms are counted, all if absent: results
    of the parts of a batch add up to that of the whole, so that several processes can share one.

    Attributes:
        TERMS: loss terms per pair. Removing pair ``n`` from a batch of ``B`` changes
            ``TERMS * B * loss`` by ``-(Pos_n + Neg_n)`` when the mean keeps its denominator.
    """

    TERMS: int

    def loss(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        """The loss, in nats; scalar."""

    def pair_losses(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        """The positive role of every pair, as `roles` gives it, without the negative; ``(B,)``."""

    def linearise(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> LinearisedLoss:
        """The loss's gradient and curvature products near a batch."""

    def roles(
        self, embeddings: Embeddings, *, form: RoleForm = "exact", same: Tensor | None = None
    ) -> Roles:
        """Both roles of every pair, ``(B,)`` each."""

    def role_tangents(
        self,
        embeddings: Embeddings,
        tangents: Embeddings,
        *,
        form: RoleForm = "exact",
        same: Tensor | None = None,
    ) -> Roles:
        """Directional derivatives of `roles` along every tangent, ``(K, B)`` each.

        With a tangent the push-forward of ``s = H^-1 grad F``, their sum over ``TERMS * N`` is the
        predicted change of the query ``F`` when pair ``n`` is removed.
        """

    def partner_tangents(
        self,
        embeddings: Embeddings,
        tangents: Embeddings,
        pairs: Tensor,
        *,
        form: RoleForm = "exact",
        same: Tensor | None = None,
    ) -> Tensor:
        """Derivatives of the negative role of some pairs by partner, ``(K, B, n)``.

        A partner of a pair is another one in whose terms it is a negative. Over the partners they
        add up to the negative part of `role_tangents`.

        Args:
            embeddings: the batch.
            tangents: ``K`` of it.
            pairs: ``(n,)``, their places in the batch.
            form: of the negative role.
            same: as everywhere.
        """

    def group_roles(
        self, embeddings: Embeddings, members: Tensor, same: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(Pos_E, Neg_E)`` of pairs that leave the batch together, scalars.

        Exact: removing them changes ``TERMS * B * loss`` by ``-(Pos_E + Neg_E)``.

        Args:
            embeddings: the batch.
            members: ``(B,)`` booleans, true for the pairs that leave; none and all are allowed.
            same: as everywhere.
        """

    def group_role_tangents(
        self,
        embeddings: Embeddings,
        tangents: Embeddings,
        members: Tensor,
        same: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Directional derivatives of `group_roles` along every tangent, ``(K,)`` each."""

    def leaving_curvature(
        self, embeddings: Embeddings, tangents: Embeddings, same: Tensor | None = None
    ) -> Tensor:
        """Gauss-Newton curvature that goes with each pair, between all tangents; ``(B, K, K)``.

        ``<e'_a, (G - G_n) e'_b>``, with ``G`` the curvature of ``TERMS * B * loss`` and ``G_n``
        that of what remains of it without pair ``n``. Not of definite sign. Takes memory of
        ``K B (B + K)``.
        """
