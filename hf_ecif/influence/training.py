"""A finished training: what it minimised, where it ended, and the way it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.inverse import InverseCurvature
from hf_ecif.engine.low_rank import CHUNK, nystrom
from hf_ecif.engine.objective import Objective
from hf_ecif.engine.system import Spectrum
from hf_ecif.errors import UserError
from hf_ecif.influence.batching import training_objective
from hf_ecif.influence.fitting import Epoch, FitReport, fit_parameters
from hf_ecif.influence.leverage import change_without, implied_penalty, leverage, sample_leverage
from hf_ecif.influence.removal import RemovalReport, remove
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.seeds import stream

ROUGH = 0.1  # residual of a solve whose answer is a step to a place, not a number
# Rows, at random, whose curvature stands for that of all. Scores of the demo's 1,492 rows by the
# curvature of a single batch of 256 correlate by 0.97 with those of all in rank, of two batches by
# 0.985, of four by 0.995; with other partitions into batches it is 0.95.
CURVATURE_ROWS = 2048
LEAST_DAMPING = 1e-3  # in units of the mean eigenvalue


@dataclass(frozen=True, eq=False)
class Training:
    """The attributed parameters trained on some rows, and all that a question about it needs.

    Attributes:
        rows: training rows.
        config: config of the training.
        objective: training objective, with the batches of its value and its curvature.
        start: ``(P,)``, the model's own parameters.
        theta: ``(P,)``, where the training ended.
        report: how it went.
        seed: seed of the batches.
        known_spectrum: spectrum of the curvature, where it need not be estimated.
    """

    rows: Rows
    config: InfluenceConfig
    objective: Objective
    start: Tensor
    theta: Tensor
    report: FitReport
    seed: int = 0
    known_spectrum: Spectrum | None = None
    _recorded: list[Epoch] = field(default_factory=list)

    @cached_property
    def inverse(self) -> InverseCurvature:
        """Inverse curvature at the end, of as many batches as hold `CURVATURE_ROWS`."""
        batches = self.objective.batches
        enough = -(-CURVATURE_ROWS // len(batches[0]))
        some = self.objective if enough >= len(batches) else self.objective.over(batches[:enough])
        return InverseCurvature(some, self.theta, self.config, self.known_spectrum)

    @property
    def spectrum(self) -> Spectrum:
        """Spectrum of the curvature at the end."""
        return self.inverse.spectrum

    @cached_property
    def trajectory(self) -> list[Epoch]:
        """All epochs, as they were recorded, or from a second run through them.

        It takes three vectors of parameters an epoch, so it is recorded only for a response that
        asks for it.
        """
        if len(self._recorded) == self.report.epochs:
            return self._recorded
        trajectory: list[Epoch] = []
        _minimise(self.objective, self.config, self.seed, trajectory=trajectory)
        return trajectory

    @property
    def is_still(self) -> bool:
        """Whether the parameters are those of the model as given."""
        return torch.equal(self.theta, self.start)

    def changes_without(self, sets: Tensor) -> Tensor:
        """Predicted changes of the parameters ``(K, P)`` without sets of rows, each on its own.

        Args:
            sets: ``(K, n)`` booleans, true for rows that leave.
        """
        changes = [
            change_without(
                self.objective,
                self.theta,
                some,
                self.spectrum,
                curvature=self.config.curvature,
                relative_damping=self.config.damping,
                tolerance=ROUGH,
                max_iterations=self.config.max_iterations,
            )[0]
            for some in sets.split(CHUNK)
        ]
        return torch.cat(changes)

    def leverage(self, directions: Tensor, rank: int) -> Tensor:
        """Lower bounds ``(n,)`` of the leverages of all rows, from a subspace.

        Args:
            directions: ``(P,)`` or ``(Q, P)``, held in the subspace, too.
            rank: eigenvectors of the curvature that span the rest of it.
        """
        product = partial(self.objective.ggn, self.theta)
        vectors = nystrom(product, self.theta, rank).vectors
        damping = self._damping_of_fit()
        # Of the scores that come along nothing is used: the directions are of another damping.
        found = leverage(self.objective, self.theta, directions, directions, damping, vectors)
        return found.leverage

    def sample_leverage(self, count: int) -> Tensor:
        """Lower bounds of the leverages of ``count`` random rows, a solve for each."""
        generator = stream(self.config.seed, "leverage")
        rows = torch.randperm(len(self.rows), generator=generator)[:count]
        damping = self._damping_of_fit()
        return sample_leverage(self.objective, self.theta, self.spectrum, rows, damping)

    def remove(
        self,
        members: Tensor,
        steps: int = 1,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> tuple[Tensor, RemovalReport]:
        """Parameters ``(P,)`` as if it had gone without some rows, in closed form.

        What holds the change back is the penalty that would have held the training where it
        stopped: its pull is as strong as the gradient that is left there. The config's damping is
        that of the scores, and taken only where nothing was trained.

        Args:
            members: ``(n,)`` booleans, true for rows that leave.
            steps: Newton steps, each with fresh curvature; see `hf_ecif.influence.removal`.
            advance: called after every step, for a progress bar.

        Raises:
            UserError: nothing is to be removed, or nearly everything.
        """
        if not 0 < members.sum() < len(members) - 1:
            raise UserError(
                f"{int(members.sum())} of {len(members)} rows are to be removed: choose at least "
                "one row, and leave at least two."
            )
        damping, way = self.config.damping, (self.theta - self.start).norm().item()
        if way:
            penalty = self.report.gradient_norm / way
            damping = max(penalty / self.spectrum.mean_eigenvalue, LEAST_DAMPING)
        return remove(
            self.objective,
            self.theta,
            members,
            self.spectrum,
            steps=steps,
            rescale=True,
            curvature=self.config.curvature,
            relative_damping=damping,
            tolerance=ROUGH,
            max_iterations=self.config.max_iterations,
            advance=advance,
        )

    def _damping_of_fit(self) -> float:
        """Absolute damping that would hold the parameters where the training stopped."""
        penalty = implied_penalty(self.objective, self.theta, self.start)
        return max(penalty, LEAST_DAMPING * self.spectrum.mean_eigenvalue)


def train(
    encoder: DualEncoder,
    rows: Rows,
    config: InfluenceConfig,
    seed: int,
    *,
    record: bool = False,
    spectrum: Spectrum | None = None,
    checkpoints: Checkpoints | None = None,
    advance: Callable[[int], None] = lambda epochs: None,
) -> Training:
    """Train the attributed parameters on rows, from the model's own, as a config says.

    Args:
        encoder: encoder with the attributed parameters.
        rows: to train on.
        config: how.
        seed: seed of the batches.
        record: whether the trajectory is kept.
        spectrum: spectrum of the curvature at the end, where it is known.
        checkpoints: store of the state after the last epoch.
        advance: called after every epoch, for a progress bar.
    """
    objective, trajectory = training_objective(encoder, rows, config, seed), list[Epoch]()
    theta, report = _minimise(
        objective,
        config,
        seed,
        checkpoints=checkpoints,
        trajectory=trajectory if record else None,
        advance=advance,
    )
    start = encoder.theta
    return Training(rows, config, objective, start, theta, report, seed, spectrum, trajectory)


def _minimise(
    objective: Objective,
    config: InfluenceConfig,
    seed: int,
    *,
    checkpoints: Checkpoints | None = None,
    trajectory: list[Epoch] | None = None,
    advance: Callable[[int], None] = lambda epochs: None,
) -> tuple[Tensor, FitReport]:
    return fit_parameters(
        objective,
        objective.encoder.theta,
        batch_size=config.batch_size,
        epochs=config.fit_epochs,
        learning_rate=config.learning_rate,
        generator=stream(seed, "fit"),
        checkpoints=checkpoints,
        trajectory=trajectory,
        advance=advance,
    )
