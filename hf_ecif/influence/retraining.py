"""Does it help? The same model fine-tuned on several versions of its rows, on an untouched test.

Every version gets the same number of steps with batches of the same size, however many rows it has:
with equal epochs, fewer rows would mean less training. The recipe is that of the fit of an
`InfluenceModel`, Adam with a rate that falls along a cosine, on the attributed parameters, from the
model as given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from hf_ecif import metrics
from hf_ecif.data.cleaning import UNTRAINED
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.errors import UserError
from hf_ecif.influence.batching import false_negatives
from hf_ecif.influence.classification import Classes, zero_shot_accuracy
from hf_ecif.influence.fitting import adam, cosine_fall, run_epoch
from hf_ecif.influence.loaded import LoadedModel
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import derive, stream

RECALLS = tuple(
    f"{direction}_recall@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 10)
)


MEASURES = (*RECALLS, "loss")  # and, where the test has classes:
ACCURACY = "zero_shot_accuracy"


@dataclass(frozen=True)
class Version:
    """Rows to fine-tune on.

    Attributes:
        rows: the readable ones.
        weights: ``(n,)`` in [0, 1], how often a row is drawn beside the others; None draws all
            alike.
    """

    rows: Rows
    weights: Tensor | None = None

    def __len__(self) -> int:
        """Rows of an epoch."""
        if self.weights is None:
            return len(self.rows)
        return round(self.weights.sum().item())

    def epoch(self, batch_size: int, generator: torch.Generator) -> list[Tensor]:
        """Random batches, numbers of rows; every row once at most, but to fill the last batch."""
        batches = random_batches(len(self), batch_size, generator)
        if self.weights is None:
            return batches
        drawn = torch.multinomial(self.weights.double(), len(self), generator=generator)
        return [drawn[batch] for batch in batches]


@dataclass(frozen=True)
class Outcome:
    """Result of training on a version.

    Attributes:
        version: its name.
        rows: number of rows of an epoch, as a mean over the repeats.
        values: values of each measure, one for each repeat, and a single one for the model as
            given. Recalls and accuracy are shares in [0, 1], higher is better; the loss is the mean
            contrastive loss in nats.
    """

    version: str
    rows: float
    values: Mapping[str, list[float]]

    def mean(self, measure: str) -> float:
        """Mean over the repeats."""
        return float(np.mean(self.values[measure]))

    def stderr(self, measure: str) -> float | None:
        """Standard error of `mean` over the repeats, for this test; None for a single repeat."""
        return _stderr(self.values[measure])

    def gain(self, other: Outcome, measure: str) -> tuple[float, float | None]:
        """Difference to another, repeat by repeat: mean and standard error."""
        differences = np.subtract(self.values[measure], other.values[measure])
        return float(differences.mean()), _stderr(differences.tolist())


def compare(
    model: LoadedModel,
    versions: Mapping[str, Sequence[Version]],
    test: Rows,
    *,
    classes: Classes | None = None,
    seed: int = 0,
    progress: ProgressFactory = silent,
) -> list[Outcome]:
    """Fine-tune on every version, and measure on ``test``.

    Args:
        model: its attributed parameters are trained, from its own values, as its config says. It
            need not be fitted, and is not changed.
        versions: by name; of each as many as there are repeats, the same or not. In a repeat, all
            versions share the seed of their batches.
        test: rows that no version has, and that no decision was based on.
        classes: of the test rows, for zero-shot accuracy; none if absent.
        seed: seed of the run; every repeat has one of its own.
        progress: makes a progress bar.

    Returns:
        The model as given, then the versions in their order.

    Raises:
        UserError: the config trains nothing, or a version or the test has fewer than two rows.
    """
    _check(model, versions, test)
    config = model.config
    sizes = [len(version) for repeats in versions.values() for version in repeats]
    batch_size = min(config.batch_size, *sizes)
    steps = math.ceil(max(sizes) / batch_size)
    advance = progress("Fine-tune", len(sizes))

    def run(version: Version, repeat: int) -> dict[str, float]:
        theta = train(
            model,
            version,
            steps=steps,
            batch_size=batch_size,
            seed=derive(seed, "retraining", repeat),
        )
        advance(1)
        return measure(model, theta, test, classes)

    outcomes = [_outcome(UNTRAINED, 0.0, [measure(model, model.encoder.theta, test, classes)])]
    for name, repeats in versions.items():
        rows = float(np.mean([len(version) for version in repeats]))
        found = [run(version, repeat) for repeat, version in enumerate(repeats)]
        outcomes.append(_outcome(name, rows, found))
    return outcomes


def train(
    model: LoadedModel, version: Version, *, steps: int, batch_size: int, seed: int
) -> Tensor:
    """Attributed parameters ``(P,)`` after the config's epochs on a version of the rows.

    Args:
        model: its config says how, its own parameters are the start.
        version: what is trained on.
        steps: number of steps of an epoch, however many rows the version has. The rate falls from
            epoch to epoch, as that of a fit does.
        batch_size: pairs of a contrastive batch.
        seed: seed of the batches.
    """
    config, rows, start = model.config, version.rows, model.encoder.theta
    same = false_negatives(rows, config)
    objective = Objective(model.encoder, rows.features, [], same, config.l2, start)
    current = start.clone()
    optimizer = adam(current)
    batches = _endless(version, batch_size, stream(seed, "fit"))
    for epoch in range(config.fit_epochs):
        rate = config.learning_rate * cosine_fall(epoch, config.fit_epochs)
        run_epoch(objective, current, optimizer, rate, islice(batches, steps))
    return current


def measure(
    model: LoadedModel, theta: Tensor, test: Rows, classes: Classes | None = None
) -> dict[str, float]:
    """`MEASURES` on test rows, and their zero-shot accuracy where they have classes.

    A caption and an image are right for each other if some row has both.
    """
    embeddings = model.encoder.embed(theta, test.features)
    text, image = embeddings.text.float().cpu(), embeddings.image.float().cpu()
    recall = metrics.load("retrieval_recall").compute(
        text_embeddings=text.numpy(),
        image_embeddings=image.numpy(),
        text_ids=test.same_text.tolist(),
        image_ids=test.same_image.tolist(),
        k=(1, 10),
    )
    found = {name: recall[name] for name in RECALLS}
    found["loss"] = model.query_value(test, theta).item()
    if classes is not None:
        found[ACCURACY] = zero_shot_accuracy(model, theta, test, classes)
    return found


def random_subset(rows: Rows, count: int, seed: int) -> Rows:
    """Some of the rows, the control for versions of as many rows."""
    generator = stream(seed, "subsets")
    return rows.select(torch.randperm(len(rows), generator=generator)[:count])


def _check(model: LoadedModel, versions: Mapping[str, Sequence[Version]], test: Rows) -> None:
    if model.config.fit_epochs == 0:
        raise UserError("`fit_epochs=0` trains nothing, so there is nothing to compare.")
    counts = {name: min(map(len, repeats)) for name, repeats in versions.items()}
    for name, count in (counts | {"test": len(test)}).items():
        if count < 2:
            raise UserError(
                f"{name!r} has {count} readable rows, and a contrastive loss needs at least two."
            )


def _endless(version: Version, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from version.epoch(batch_size, generator)


def _outcome(name: str, rows: float, found: list[dict[str, float]]) -> Outcome:
    return Outcome(name, rows, {key: [values[key] for values in found] for key in found[0]})


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
