"""Protocol of a contrastive loss, and the choice of the loss that a model is trained with.

A module or an object with the functions of `Contrastive` is a loss (PEP 544). `register` adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from hf_ecif.engine.objectives import infonce, sigmoid
from hf_ecif.engine.objectives.joining import Alike, Pushed
from hf_ecif.engine.objectives.linearised import LinearisedLoss
from hf_ecif.engine.objectives.similarity import Embeddings, RoleForm, Roles


class Contrastive(Protocol):
    """A loss over all pairs of a batch, and what each pair contributes to it.

    A pair ``n`` acts in two roles: *positive*, through its own terms, and *negative*, through what
    its presence adds to the terms of others. Both are in nats and unnormalised.

    In every function ``same``, if given, is ``(B, L)`` integers: pairs with an equal number in any
    of the columns (one caption, for example, or one image) are not negatives of each other; a
    single column may be ``(B,)``. Tangents and cotangents of a batch have its shapes with a leading
    ``K``: ``(K, B, d)`` for text and image, ``(K,)`` for scale and bias.

    ``rows`` are the pairs whose terms are counted, all if absent: results for the parts of a batch
    add up to the result for the whole, so several processes can share a batch.

    Attributes:
        TERMS: loss terms per pair. Removing pair ``n`` from a batch of ``B`` changes
            ``TERMS * B * loss`` by ``-(Pos_n + Neg_n)`` when the mean keeps its denominator.
        FULL_LENGTH: whether models with this loss are trained on captions padded to full length,
            and therefore need such captions.
    """

    TERMS: int
    FULL_LENGTH: bool

    def loss(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        """Loss of the batch in nats; scalar."""

    def pair_losses(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        """Positive role of every pair, as in `roles`; ``(B,)``."""

    def linearise(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> LinearisedLoss:
        """Gradient and curvature products of the loss at a batch."""

    def roles(
        self, embeddings: Embeddings, *, form: RoleForm = "exact", same: Tensor | None = None
    ) -> Roles:
        """Both roles of every pair, ``(B,)`` each, in nats."""

    def role_tangents(
        self,
        embeddings: Embeddings,
        tangents: Embeddings,
        *,
        form: RoleForm = "exact",
        same: Tensor | None = None,
    ) -> Roles:
        """Directional derivatives of `roles` along every tangent, ``(K, B)`` each.

        If a tangent is the push-forward of ``s = H^-1 grad F``, the sum of both divided by
        ``TERMS * N`` is the predicted change of the query ``F`` when pair ``n`` is removed.
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

        A partner of a pair is another pair that has it as a negative. Summed over the partners,
        the derivatives are the negative part of `role_tangents`.

        Args:
            embeddings: the batch.
            tangents: ``K`` tangents of the batch.
            pairs: ``(n,)``, places of the pairs in the batch.
            form: form of the negative role.
            same: see the class.
        """

    def group_roles(
        self, embeddings: Embeddings, members: Tensor, same: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(Pos_E, Neg_E)`` of pairs that leave the batch together, scalars.

        Exact: removing them changes ``TERMS * B * loss`` by ``-(Pos_E + Neg_E)``.

        Args:
            embeddings: the batch.
            members: ``(B,)`` booleans, true for the pairs that leave; none and all are allowed.
            same: see the class.
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
        """Gauss-Newton curvature that leaves with each pair, between all tangents; ``(B, K, K)``.

        ``<e'_a, (G - G_n) e'_b>``, with ``G`` the curvature of ``TERMS * B * loss`` and ``G_n`` the
        curvature of what remains without pair ``n``. Indefinite. Memory: ``K B (B + K)`` numbers.
        """

    def joining_tangents(
        self, context: Pushed, new: Pushed, *, form: RoleForm = "exact", same: Alike | None = None
    ) -> Roles:
        """Directional derivatives of the roles of pairs that join a batch, ``(K, C)`` each.

        Args:
            context: the batch, and its tangents.
            new: ``C`` pairs that join it, each without the others.
            form: form of the negative role.
            same: see the class; ``(B,)`` for the batch and ``(C,)`` for the pairs.
        """

    def joining_losses(
        self, context: Embeddings, new: Embeddings, same: Alike | None = None
    ) -> Tensor:
        """Losses of pairs that join a batch, as in `pair_losses` of the larger one; ``(C,)``.

        Args:
            context: the batch.
            new: ``C`` pairs that join it, each without the others.
            same: as in `joining_tangents`.
        """


_REGISTERED: list[tuple[Callable[[nn.Module], bool], Contrastive]] = [
    (lambda model: hasattr(model, "logit_bias"), sigmoid),
    (lambda model: True, infonce),
]


def register(loss: Contrastive, suits: Callable[[nn.Module], bool]) -> None:
    """Add a loss, which takes precedence over earlier ones for all models that it suits.

    Args:
        loss: a module or an object with the functions of `Contrastive`.
        suits: returns whether a model is trained with this loss.
    """
    _REGISTERED.insert(0, (suits, loss))


def loss_of(model: nn.Module) -> Contrastive:
    """Loss that a model is trained with: sigmoid if it has a logit bias, else InfoNCE."""
    return next(loss for suits, loss in _REGISTERED if suits(model))
