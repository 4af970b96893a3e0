"""The problem that all methods of `tests.benchmarks.peers` share, and the truth they predict.

*Linear datamodeling score* (Park et al., 2023): train again on many random halves of the rows and
look at the query's true loss after each. A method that says of every row how the loss changes
without it (``score_n``, positive where the row is of use) predicts, for the half ``S``,

    loss(S) = constant - sum of score_n over S,

since what is in ``S`` was not removed. The LDS is Spearman's rank correlation of predicted and true
losses; its error is the standard deviation over bootstrap samples of the halves. Training again
means: from the pretrained projections, by the recipe of `InfluenceModel.fit`, for several seeds of
the batches whose losses are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_ecif import metrics
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.data.schema import check_columns
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.influence.fitting import fit_parameters
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.models.load import load_model
from tests.benchmarks.shared import DEMO

CONFIG = InfluenceConfig()
CHECKPOINTS = (2, 4, 6, 8, 10)  # epochs after which the fit is looked at
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Rows to be valued, the query, and the fit that all methods start from.

    Attributes:
        model: the Hugging Face model, as it was before the fit.
        processor: its processor.
        train: rows at the frozen boundary, pooled activations.
        query: the same of the validation split.
        wrong: ``(N,)``, which training rows are misaligned.
        example: two rows as the towers take them.
        start: pretrained projections, ``(P,)``.
        theta: fitted ones.
        checkpoints: learning rate and parameters of the fit after some epochs.
        batches: the contrastive batches of the training objective.
        query_batches: those of the query's loss.
    """

    model: Any
    processor: Any
    train: Rows
    query: Rows
    wrong: Tensor
    example: Features
    start: Tensor
    theta: Tensor
    checkpoints: list[tuple[float, Tensor]]
    batches: list[Tensor]
    query_batches: list[Tensor]

    def save(self, folder: Path) -> None:
        """All but the model, which is loaded anew."""
        values = {k: v for k, v in vars(self).items() if k not in ("model", "processor")}
        torch.save(values, folder / "problem.pt")

    @classmethod
    def load(cls, folder: Path) -> Problem:
        """What `save` wrote."""
        model, processor = load_model(str(DEMO / "model"))
        values = torch.load(folder / "problem.pt", weights_only=False)
        return cls(model=model, processor=processor, **values)

    def encoder(self) -> DualEncoder:
        """Of the projections, knowing what lies below them."""
        encoder = DualEncoder(self.model, CONFIG.parameters)
        encoder.freeze(self.example)
        return encoder


def read_problem() -> Problem:
    """Read the embedded data, and fit."""
    wrapped = InfluenceModel.from_pretrained(DEMO / "model", CONFIG)
    train = check_columns(load_rows(str(DEMO / "data"), "train"), "image", "text")
    rows = wrapped.read(train)
    query = wrapped.read(load_rows(str(DEMO / "data"), "validation"))
    return pose(wrapped, rows, query, torch.tensor(train["is_misaligned"][:])[rows.positions])


def pose(wrapped: InfluenceModel, rows: Rows, query: Rows, wrong: Tensor) -> Problem:
    """Fit the projections of the embedded model to the rows, with the seed of its config."""
    generator = torch.Generator().manual_seed(wrapped.config.seed)
    # The solve that `fit` goes on to is not used: one that takes few iterations will do.
    given = wrapped.config
    wrapped.config = replace(given, damping=1000, probes=1)
    influence, checkpoints = fit(wrapped, rows, query)
    theta = influence.theta
    wrapped.config = given
    return Problem(
        model=wrapped.encoder.model,
        processor=wrapped.processor,
        train=rows,
        query=query,
        wrong=wrong,
        example=raw_features("train", 2),
        start=wrapped.encoder.theta,
        theta=theta,
        checkpoints=checkpoints,
        batches=random_batches(len(rows), CONFIG.batch_size, generator),
        query_batches=random_batches(len(query), CONFIG.batch_size, generator),
    )


def raw_features(split: str, count: int | None = None) -> Features:
    """What goes into the towers: tokens and pixels."""
    wrapped = InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig(parameters="all"))
    rows = load_rows(str(DEMO / "data"), split)
    return wrapped.read(rows if count is None else rows.select(range(count))).features


def fit(
    model: InfluenceModel, train: Rows, query: Rows
) -> tuple[Influence, list[tuple[float, Tensor]]]:
    """The fit, and with their learning rates the parameters on the way."""
    seen: list[tuple[float, Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group["params"][0].detach().clone()))

    hook = register_optimizer_step_post_hook(note)
    influence = model.fit(train, query)
    hook.remove()
    steps = len(seen) // CONFIG.fit_epochs
    return influence, [seen[epoch * steps - 1] for epoch in CHECKPOINTS]


def refit(objective: Objective, start: Tensor, generator: torch.Generator, epochs: int) -> Tensor:
    """By the recipe of `InfluenceModel.fit`, but for the epochs."""
    return fit_parameters(
        objective,
        start,
        batch_size=CONFIG.batch_size,
        epochs=epochs,
        learning_rate=CONFIG.learning_rate,
        generator=generator,
    )[0]


# ---------------------------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Truth:
    """Losses of the query after training on parts of the rows.

    Attributes:
        kept: ``(M, N)``, which rows each part has.
        losses: ``(M, seeds)``, in nats.
    """

    kept: NDArray[np.bool_]
    losses: Floats

    @property
    def mean(self) -> Floats:
        """Over the seeds."""
        return self.losses.mean(axis=1)

    @property
    def reliability(self) -> float | None:
        """The LDS that a perfect prediction would reach; None of one seed, which does not tell."""
        return compare(self.mean, self, resamples=0)["noise_ceiling"]


def train_on_halves(problem: Problem, count: int, seeds: int, epochs: int) -> Truth:
    """The query's loss after training on ``count`` random halves, each ``seeds`` times."""
    encoder, rows, total = problem.encoder(), problem.train, len(problem.train)
    query = Objective(
        encoder, problem.query.features, problem.query_batches, problem.query.siblings
    )
    kept = np.zeros((count, total), dtype=bool)
    losses = np.zeros((count, seeds))
    for half in range(count):
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(half))[: total // 2]
        kept[half, chosen.numpy()] = True
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(10_000 * (seed + 1) + half)
            objective = objective_of(encoder, rows, chosen, generator)
            theta = refit(objective, problem.start, generator, epochs)
            losses[half, seed] = query.value(theta).item()
    return Truth(kept, losses)


def objective_of(
    encoder: DualEncoder, rows: Rows, chosen: Tensor, generator: torch.Generator
) -> Objective:
    """Of some of the rows alone."""
    batches = random_batches(len(chosen), CONFIG.batch_size, generator)
    return Objective(encoder, rows.features[chosen], batches, rows.siblings[chosen])


def lds(scores: Floats, truth: Truth) -> tuple[float, float]:
    """The score of a method, and its error over bootstrap samples of the halves."""
    result = compare(-(truth.kept @ scores), truth)
    return result["lds"], result["stderr"]


def compare(predicted: Floats, truth: Truth, resamples: int = 1000) -> dict[str, Any]:
    """Predicted and true losses of the halves."""
    metric = metrics.load("linear_datamodeling_score")
    return metric.compute(predictions=predicted, references=truth.losses, resamples=resamples)
