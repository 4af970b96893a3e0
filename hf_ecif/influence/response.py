"""How a fitted model responds to a change of its training rows: where, along which directions.

*Stationary*: an influence function. It asks how a minimum moves when a pair is left out, and the
inverse curvature there says it.

*Unrolled*: by differentiating through the steps of the fit. A fit of some epochs ends at no
minimum, and Adam goes along every coordinate at a speed of its own; no single damping makes up for
that. But its steps are known. Going through them backwards gives, for each, the direction ``d_t``
by which a change of the gradient in step ``t`` changes the query at the end:

    dF = sum_t d_t . dg_t

The removal of pair ``n`` takes ``grad(Pos_n + Neg_n) / (TERMS B)`` from the gradients of the steps
whose batch holds it, one step of an epoch, whichever: so that, with ``s_e = - sum_t d_t`` over
the steps of epoch ``e``, the predicted change of the query is

    sum_e s_e . grad(Pos_n + Neg_n)(theta_e) / (TERMS N)

in place of the ``s . grad(Pos_n + Neg_n)(theta) / (TERMS N)`` of an inverse curvature: the same
pass, once for every epoch. Hara, Nitanda & Maehara (2019) unroll SGD so, and Bae et al. (2024) in
segments; here it is Adam, with what a gradient does to the moments of later steps. That part is
not small: without the second moment's, the rank correlation with true retrainings of the demo
falls from 0.90 to 0.50.

With the curvature of every step's batch, later steps answer to the change of earlier ones: the
other pairs make up for the one that is gone, as they do when a model is trained again. Without it,
the same sum is the pair's *contribution*: what its own gradients have moved, whoever else would
have done it in its place. The first predicts a removal, the second tells a cause.
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
    """Parameters on the way of a fit, and the directions along which a pair is scored there.

    Attributes:
        theta: ``(P,)``.
        directions: ``s`` of every query, ``(P,)`` or ``(Q, P)``.
    """

    theta: Tensor
    directions: Tensor


class Answer(NamedTuple):
    """A response to some queries.

    Attributes:
        directions: at the end of the training; of the queries none where they have checkpoints.
        checkpoints: on the way, by which the queries are scored; none where the end is enough.
        solvers: reports by purpose.
    """

    directions: Directions
    checkpoints: list[Checkpoint]
    solvers: dict[str, SolveReport]

    def scored_at(self, theta: Tensor) -> list[Checkpoint]:
        """Where and along which directions the queries are scored, the end ``theta`` or others."""
        return self.checkpoints or [Checkpoint(theta, self.directions.query)]


class Response(Protocol):
    """How the model answers to the removal of a pair.

    Attributes:
        needs_trajectory: whether it goes through the steps of the training.
    """

    needs_trajectory: bool

    def answer(
        self,
        training: Training,
        gradients: Tensor,
        probes: Tensor,
        progress: ProgressFactory = silent,
    ) -> Answer:
        """Directions for queries with some gradients at the end of the training.

        Args:
            training: training in question.
            gradients: gradients of the queries, ``(P,)`` or ``(Q, P)``.
            probes: ``(K, P)``, solved for along the way; none is fine.
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
        """Solves for queries and probes at once, which takes fewer products than one by one."""
        rows = gradients.reshape(-1, len(training.theta))
        both, report = training.inverse.solve(torch.cat([rows, probes]))
        found, solved = both.split([len(rows), len(probes)])
        directions = Directions(found.view(gradients.shape), probes, solved)
        return Answer(directions, [], {"task score and self-influence": report})


@dataclass(frozen=True)
class Unrolled:
    """Response of the fit itself, step by step: a checkpoint for every epoch.

    Attributes:
        curvature: by which later steps make up for the change of earlier ones; None where they do
            not, for contributions.
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
        """Goes back through the training; only the probes are solved for."""
        directions, solvers = Directions.none(training.theta), {}
        if len(probes):
            solved, solvers["self-influence"] = training.inverse.solve(probes)
            directions = directions._replace(probes=probes, solved=solved)
        advance = progress("Unroll", training.report.epochs)
        checkpoints = unroll(
            training.objective, training.trajectory, gradients, self.curvature, advance
        )
        return Answer(directions, checkpoints, solvers)


def choose_response(config: InfluenceConfig) -> Response:
    """The response to a removal that a config asks for; without a fit, nothing can be unrolled."""
    if config.response == "unrolled" and config.fit_epochs:
        return Unrolled(config.curvature)
    return Stationary()


def choose_contribution(config: InfluenceConfig) -> Response:
    """The response that tells what pairs have contributed, whoever else would have.

    A model that was not fitted here has moved nowhere; the inverse curvature answers for its pairs.
    """
    return Unrolled(None) if config.fit_epochs else Stationary()


def respond(response: Response, training: Training, gradients: Tensor) -> list[Checkpoint]:
    """Where and along which directions pairs are scored for queries.

    Args:
        response: to a removal, or of a contribution.
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
    """The directions of every epoch, in the order of the fit.

    Costs the fit once more, and a product with the curvature per step if there is one. Held are, in
    vectors of parameters, three for each epoch, four for each step of one epoch, and four for each
    query.

    Args:
        objective: that of the fit; its own batches are not used.
        trajectory: trajectory of the fit.
        gradients: gradients of the queries at its end, ``(P,)`` or ``(Q, P)``.
        curvature: by which later steps answer; None for contributions.
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
    """Scores of all rows, summed over checkpoints; losses and cosines are those at the last one.

    Every checkpoint has partitions of its own, see `share_partitions`. Sizes and self-influence are
    zero.

    Args:
        encoder: encoder with the attributed parameters.
        checkpoints: checkpoints of a response.
        features: ``N`` rows.
        how: they are pushed, and meet.
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
    """Every checkpoint with partitions of its own, together about as many as there were to be.

    Two each at least, which a standard error takes, unless only one was to be. The first one has
    the seed that was given, so that one alone is scored as by a pass of its own.
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
        theta: before it.
        gradient: there.
        first: moment after the gradient was taken in.
        second: second moment, likewise.
    """

    number: int
    learning_rate: float
    batch: Tensor
    theta: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor


def _replay(objective: Objective, epoch: Epoch) -> Iterator[_Step]:
    """The steps of an epoch, once more."""
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
    """Adam's mean gradient and root mean square, without their bias towards zero."""
    decay, decay_of_squares = DECAYS
    mean = step.first / (1 - decay**step.number)
    return mean, (step.second / (1 - decay_of_squares**step.number)).sqrt()


@dataclass
class _Adjoint:
    """Derivatives of the queries with respect to Adam's state, ``(Q, P)`` each.

    Attributes:
        query: to the parameters.
        first: to the first moment.
        second: to the second.
    """

    query: Tensor
    first: Tensor
    second: Tensor

    def through(self, step: _Step) -> Tensor:
        """Go back before a step, but for its gradient's own dependence on the parameters.

        Returns:
            The derivative with respect to the gradient of the step, ``(Q, P)``.
        """
        decay, decay_of_squares = DECAYS
        mean, root = _corrected(step)
        # Without any gradient so far, of an adapter's first step for instance, no pair has one. To
        # divide by nothing there would be a direction for later gradients of the epoch.
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
