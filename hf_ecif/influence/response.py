"""What a pair did to a fit, by differentiating through the fit's own steps.

An influence function asks how a minimum moves when a pair is left out. A fit of some epochs ends at
no minimum, and Adam goes along every coordinate at a speed of its own; no single damping makes up
for that. But its steps are known. Going through them backwards gives, for each, the direction
``d_t`` by which a change of the gradient in step ``t`` changes the query at the end:

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
have done it in its place. The first foretells a removal, the second tells a cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Curvature, Objective
from hf_ecif.influence.fitting import DECAYS, EPSILON, Epoch
from hf_ecif.influence.scoring import Directions, Pass, Scores, score_rows
from hf_ecif.utils.checkpoints import Checkpoints


class Station(NamedTuple):
    """Parameters on the way of a fit, and the directions along which a pair is scored there.

    Attributes:
        theta: ``(P,)``.
        directions: ``s`` of every query, ``(P,)`` or ``(Q, P)``.
    """

    theta: Tensor
    directions: Tensor


def unroll(
    objective: Objective,
    course: Sequence[Epoch],
    gradients: Tensor,
    curvature: Curvature | None = None,
    advance: Callable[[int], None] = lambda epochs: None,
) -> list[Station]:
    """The directions of every epoch, in the order of the fit.

    Costs the fit once more, and a product with the curvature per step if there is one. Held are, in
    vectors of parameters, three for each epoch, four for each step of one epoch, and four for each
    query.

    Args:
        objective: that of the fit; its own batches are not used.
        course: of the fit.
        gradients: of the queries at its end, ``(P,)`` or ``(Q, P)``.
        curvature: by which later steps answer; None for contributions.
        advance: called after every epoch, for a progress bar.
    """
    theta = course[0].theta
    end = gradients.reshape(-1, len(theta))
    adjoint = _Adjoint(end.clone(), torch.zeros_like(end), torch.zeros_like(end))
    stations = []
    for epoch in reversed(course):
        steps = list(_replay(objective, epoch))
        total = torch.zeros_like(end)
        for step in reversed(steps):
            along = adjoint.through(step)
            total -= along
            if curvature is not None:
                at_step = objective.over([step.batch]).operator(curvature, step.theta)
                adjoint.query += at_step(along)
        middle = steps[len(steps) // 2].theta
        stations.append(Station(middle, total.view(gradients.shape)))
        advance(1)
    return stations[::-1]


def score_through(
    encoder: DualEncoder,
    stations: Sequence[Station],
    features: Features,
    how: Pass,
    *,
    train_count: int,
    checkpoints: Checkpoints | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Scores of all rows, summed over stations; losses and cosines are those at the last one.

    Every station has partitions of its own, see `share_partitions`. Sizes and self-influence are
    zero.

    Args:
        encoder: of the attributed parameters.
        stations: from `unroll`.
        features: ``N`` rows.
        how: they are pushed, and meet.
        train_count: rows of the training set, the ``N`` of ``1 / 2N``.
        checkpoints: where the scores of finished chunks are kept.
        advance: called with the number of rows done at a station, for a progress bar.
    """
    known = checkpoints or Checkpoints()
    parts = [
        score_rows(
            encoder,
            station.theta,
            features,
            Directions.none(station.theta)._replace(query=station.directions),
            own,
            train_count=train_count,
            checkpoints=known.within(f"station-{number:03d}"),
            advance=advance,
        )
        for number, (station, own) in enumerate(share_partitions(how, stations))
    ]
    return replace(
        parts[-1],
        positive=sum(part.positive for part in parts),
        negative=sum(part.negative for part in parts),
        stderr=sum(part.stderr.square() for part in parts).sqrt(),
    )


def share_partitions(how: Pass, stations: Sequence[Station]) -> list[tuple[Station, Pass]]:
    """Every station with partitions of its own, together about as many as there were to be.

    Two each at least, which a standard error takes, unless only one was to be.
    """
    each = max(min(2, how.partitions), -(-how.partitions // len(stations)))
    return [
        (station, replace(how, partitions=each, seed=how.seed + number))
        for number, station in enumerate(stations)
    ]


class _Step(NamedTuple):
    """A step of Adam.

    Attributes:
        number: from one.
        learning_rate: of its epoch.
        batch: of its gradient.
        theta: before it.
        gradient: there.
        first: moment after the gradient was taken in.
        second: likewise.
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
