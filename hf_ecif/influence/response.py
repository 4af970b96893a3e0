"""Response of a fitted model to a change of its training rows.

*Stationary*: the influence function, which predicts by the inverse curvature how a minimum moves
when a pair is left out.

*Unrolled*: differentiation through the steps of the fit. A fit of a few epochs does not end at a
minimum, and Adam moves at a different speed along every coordinate; no single damping accounts for
that. But its steps are known. A pass backwards through them gives the direction ``d_t`` along which
a change of the gradient in step ``t`` changes the query at the end:

    dF = sum_t d_t . dg_t

Removing pair ``n`` subtracts ``grad(Pos_n + Neg_n) / (TERMS B)`` from the gradient of one step per
epoch, the one whose batch holds it. On average over batches, with ``s_e = - sum_t d_t`` over the
steps of epoch ``e``, the predicted change of the query is

    sum_e s_e . grad(Pos_n + Neg_n)(theta_e) / (TERMS N)

instead of ``s . grad(Pos_n + Neg_n)(theta) / (TERMS N)`` for an inverse curvature: the same pass,
once for every epoch. Hara, Nitanda & Maehara (2019) unroll SGD in this way, and Bae et al. (2024)
in segments; here it is Adam, including the effect of a gradient on the moments of later steps. That
effect is not small: without that of the second moment, the rank correlation with true retrainings
of the demo falls from 0.90 to 0.50.

With the curvature of every step's batch, later steps respond to the change of earlier ones: the
remaining pairs compensate for the removed one, as in a real retraining. Without it, the sum is the
pair's *contribution*: the effect of its own gradients, even if other pairs would have had it in its
absence. The first predicts a removal, the second identifies a cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Curvature, Objective
from hf_ecif.engine.solvers import SolveReport
from hf_ecif.influence.fitting import DECAYS, EPSILON, Epoch
from hf_ecif.influence.scoring import Directions, Pass, Scores, score_rows
from hf_ecif.influence.training import Training
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import derive


class Checkpoint(NamedTuple):
    """Parameters on the trajectory of a fit, and directions along which pairs are scored there.

    Attributes:
        theta: ``(P,)``.
        directions: ``s`` for every query, ``(P,)`` or ``(Q, P)``.
    """

    theta: Tensor
    directions: Tensor


class Answer(NamedTuple):
    """Response for some queries.

    Attributes:
        directions: directions at the end of the training; none for queries with checkpoints.
        checkpoints: checkpoints by which the queries are scored; none if the end is enough.
        solvers: reports by purpose.
    """

    directions: Directions
    checkpoints: list[Checkpoint]
    solvers: dict[str, SolveReport]

    def scored_at(self, theta: Tensor) -> list[Checkpoint]:
        """Checkpoints at which the queries are scored: ``theta``, the end, or earlier ones."""
        return self.checkpoints or [Checkpoint(theta, self.directions.query)]


class Response(Protocol):
    """Response of a model to the removal of a pair.

    Attributes:
        needs_trajectory: whether it uses the steps of the training.
    """

    needs_trajectory: bool

    def answer(
        self,
        training: Training,
        gradients: Tensor,
        probes: Tensor,
        progress: ProgressFactory = silent,
    ) -> Answer:
        """Directions for queries, given their gradients at the end of the training.

        Args:
            training: training in question.
            gradients: gradients of the queries, ``(P,)`` or ``(Q, P)``.
            probes: ``(K, P)``, further right-hand sides to solve for; may be empty.
            progress: makes a progress bar.
        """


@dataclass(frozen=True)
class Stationary:
    """Response of a minimum: the inverse curvature at the end of the training."""

    needs_trajectory = False

    def answer(
        self,
        training: Training,
        gradients: Tensor,
        probes: Tensor,
        progress: ProgressFactory = silent,
    ) -> Answer:
        """Answer from a solve for the queries, and a rough one for the probes."""
        rows = gradients.reshape(-1, len(training.theta))
        found, report = training.inverse.solve(rows)
        directions, solvers = _solve_probes(training, probes)
        directions = directions._replace(query=found.view(gradients.shape))
        return Answer(directions, [], {"task score": report} | solvers)


@dataclass(frozen=True)
class Unrolled:
    """Response of the fit itself, step by step: a checkpoint for every epoch.

    Attributes:
        curvature: curvature by which later steps respond to the change of earlier ones; None for
            contributions.
    """

    curvature: Curvature | None
    needs_trajectory = True

    def answer(
        self,
        training: Training,
        gradients: Tensor,
        probes: Tensor,
        progress: ProgressFactory = silent,
    ) -> Answer:
        """Answer from a pass backwards through the training; only the probes are solved for."""
        directions, solvers = _solve_probes(training, probes)
        advance = progress("Unroll", training.report.epochs)
        checkpoints = unroll(
            training.objective, training.trajectory, gradients, self.curvature, advance
        )
        return Answer(directions, checkpoints, solvers)


def _solve_probes(training: Training, probes: Tensor) -> tuple[Directions, dict[str, SolveReport]]:
    """Directions of the probes alone, and the report of their solve; neither without probes."""
    nothing = Directions.none(training.theta)
    if not len(probes):
        return nothing, {}
    solved, report = training.inverse.solve_probes(probes)
    return nothing._replace(probes=probes, solved=solved), {"self-influence": report}


def choose_response(config: InfluenceConfig) -> Response:
    """Response to a removal that a config names; stationary without a fit to unroll."""
    if config.response == "unrolled" and config.fit_epochs:
        return Unrolled(config.curvature)
    return Stationary()


def choose_contribution(config: InfluenceConfig) -> Response:
    """Response that gives contributions of pairs, even if others would have made them.

    A model that was not fitted here has no steps; for its pairs, the inverse curvature is used.
    """
    return Unrolled(None) if config.fit_epochs else Stationary()


def respond(response: Response, training: Training, gradients: Tensor) -> list[Checkpoint]:
    """Checkpoints at which pairs are scored for queries.

    Args:
        response: response to a removal, or for contributions.
        training: training in question.
        gradients: gradients of the queries at its end, ``(P,)`` or ``(Q, P)``.
    """
    no_probes = training.theta.new_zeros(0, len(training.theta))
    return response.answer(training, gradients, no_probes).scored_at(training.theta)


def unroll(
    objective: Objective,
    trajectory: Sequence[Epoch],
    gradients: Tensor,
    curvature: Curvature | None = None,
    advance: Callable[[int], None] = lambda epochs: None,
) -> list[Checkpoint]:
    """Checkpoint of every epoch, in the order of the fit.

    It costs as much as the fit, plus a product with the curvature per step if there is one. Memory,
    in vectors of parameters: three for each epoch, four for each step of one epoch, and four for
    each query.

    Args:
        objective: objective of the fit; its own batches are not used.
        trajectory: trajectory of the fit.
        gradients: gradients of the queries at its end, ``(P,)`` or ``(Q, P)``.
        curvature: curvature by which later steps respond; None for contributions.
        advance: called after every epoch, for a progress bar.
    """
    theta = trajectory[0].theta
    end = gradients.reshape(-1, len(theta))
    adjoint = _Adjoint(end.clone(), torch.zeros_like(end), torch.zeros_like(end))
    checkpoints = []
    for epoch in reversed(trajectory):
        steps = list(_replay(objective, epoch))
        total = torch.zeros_like(end)
        for step in reversed(steps):
            along = adjoint.through(step)
            total -= along
            if curvature is not None:
                at_step = objective.over([step.batch]).operator(curvature, step.theta)
                adjoint.query += at_step(along)
        middle = steps[len(steps) // 2].theta
        checkpoints.append(Checkpoint(middle, total.view(gradients.shape)))
        advance(1)
    return checkpoints[::-1]


def score_through(
    encoder: DualEncoder,
    checkpoints: Sequence[Checkpoint],
    features: Features,
    how: Pass,
    *,
    train_count: int,
    kept: Checkpoints | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Scores of all rows, summed over checkpoints; losses and cosines come from the last one.

    Every checkpoint has its own partitions, see `share_partitions`. Sizes and self-influence are
    zero.

    Args:
        encoder: encoder with the attributed parameters.
        checkpoints: checkpoints of a response.
        features: ``N`` rows.
        how: how rows are pushed and batched.
        train_count: rows of the training set, the ``N`` of ``1 / 2N``.
        kept: store of the scores of finished chunks.
        advance: called with the number of rows done at a checkpoint, for a progress bar.
    """
    known = kept or Checkpoints()
    parts = [
        score_rows(
            encoder,
            checkpoint.theta,
            features,
            Directions.none(checkpoint.theta)._replace(query=checkpoint.directions),
            own,
            train_count=train_count,
            checkpoints=known.within(f"checkpoint-{number:03d}"),
            advance=advance,
        )
        for number, (checkpoint, own) in enumerate(share_partitions(how, checkpoints))
    ]
    return replace(
        parts[-1],
        positive=reduce(torch.add, (part.positive for part in parts)),
        negative=reduce(torch.add, (part.negative for part in parts)),
        stderr=reduce(torch.add, (part.stderr.square() for part in parts)).sqrt(),
    )


def share_partitions(how: Pass, checkpoints: Sequence[Checkpoint]) -> list[tuple[Checkpoint, Pass]]:
    """Every checkpoint with its own partitions, in total about as many as asked for.

    Each has at least two, which a standard error needs, unless only one was asked for. The first
    checkpoint has the given seed, so a single checkpoint is scored as by an ordinary pass.
    """
    each = max(min(2, how.partitions), -(-how.partitions // len(checkpoints)))
    seeds = [how.seed, *(derive(how.seed, "checkpoints", n) for n in range(1, len(checkpoints)))]
    return [
        (checkpoint, replace(how, partitions=each, seed=seed))
        for checkpoint, seed in zip(checkpoints, seeds, strict=True)
    ]


class _Step(NamedTuple):
    """A step of Adam.

    Attributes:
        number: number of the step, from one.
        learning_rate: learning rate of its epoch.
        batch: rows of its batch.
        theta: parameters before the step.
        gradient: gradient at these.
        first: first moment, with this gradient.
        second: second moment, with this gradient.
    """

    number: int
    learning_rate: float
    batch: Tensor
    theta: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor


def _replay(objective: Objective, epoch: Epoch) -> Iterator[_Step]:
    """Steps of an epoch, computed again."""
    theta, first, second = epoch[:3]
    decay, decay_of_squares = DECAYS
    for number, batch in enumerate(epoch.batches, epoch.steps + 1):
        gradient = objective.over([batch]).gradient(theta)
        first = torch.lerp(gradient, first, decay)
        second = torch.lerp(gradient.square(), second, decay_of_squares)
        step = _Step(number, epoch.learning_rate, batch, theta, gradient, first, second)
        yield step
        mean, root = _corrected(step)
        theta = theta - epoch.learning_rate * mean / (root + EPSILON)


def _corrected(step: _Step) -> tuple[Tensor, Tensor]:
    """Adam's mean gradient and root mean square, corrected for their bias towards zero."""
    decay, decay_of_squares = DECAYS
    mean = step.first / (1 - decay**step.number)
    return mean, (step.second / (1 - decay_of_squares**step.number)).sqrt()


@dataclass
class _Adjoint:
    """Derivatives of the queries with respect to Adam's state, ``(Q, P)`` each.

    Attributes:
        query: derivatives with respect to the parameters.
        first: derivatives with respect to the first moment.
        second: derivatives with respect to the second moment.
    """

    query: Tensor
    first: Tensor
    second: Tensor

    def through(self, step: _Step) -> Tensor:
        """Step backwards, except for the dependence of the gradient on the parameters.

        Returns:
            The derivative with respect to the gradient of the step, ``(Q, P)``.
        """
        decay, decay_of_squares = DECAYS
        mean, root = _corrected(step)
        # If all gradients so far are zero, as in an adapter's first step, no pair has one either.
        # Division by zero would give a direction for later gradients of the epoch.
        speed = (step.learning_rate / (root + EPSILON)).where(root > 0, 0)
        slope = (mean / (2 * root * (root + EPSILON))).where(root > 0, 0)
        moved = speed * self.query
        self.first -= moved / (1 - decay**step.number)
        self.second += moved * slope / (1 - decay_of_squares**step.number)
        along = (1 - decay) * self.first
        along += 2 * (1 - decay_of_squares) * step.gradient * self.second
        self.first *= decay
        self.second *= decay_of_squares
        return along
