"""What each method makes of rows: a number for every row, higher where it is more suspicious.

The methods see the same rows at the same parameters. *Fixed* ones run as published; those that have
something to tune are given in many settings, too, so that the best can be picked with the truth in
hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jacrev

from hf_ecif.config import DetectionConfig
from hf_ecif.detection.detect import Detection, detect
from hf_ecif.detection.injection import inject_mismatches
from hf_ecif.detection.signals import TRUST, Signals, signals_of_rows
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Pass, Scores
from tests.benchmarks.lds import fit

Signal = NDArray[np.float64]
Checkpoint = tuple[float, Tensor]  # learning rate and parameters

OURS = "ecif_noise_probability"
FIXED = (
    "CLIPScore",
    "NegCLIPLoss",
    "LEMoN-fix",
    "TracIn to the query",
    "TracIn to itself",
    "gradient norm",
)
TUNED = ("NegCLIPLoss, tuned", "LEMoN, tuned")
# Not compared with: see `lemon`.
COPIES = "LEMoN, tuned, sees copies"
BATCH = 256  # pairs of a contrastive batch, as in an audit
GRADIENTS = 64  # held in full at a time


def parts_of_ours(scores: Scores, witnesses: Signals, detection: Detection) -> dict[str, Signal]:
    """The detector's probability, and what a scored data set has in its columns."""
    tensors = {
        "ecif_loo_loss": scores.loo_loss,
        "ecif_self": scores.self_influence,
        "ecif_score": -scores.task,
        "ecif_positive": -scores.positive,
        "ecif_negative": -scores.negative,
        "ecif_relative": -scores.relative,
        "ecif_image_neighbours": witnesses.image_neighbours,
        "ecif_text_neighbours": witnesses.text_neighbours,
    }
    return {OURS: detection.probability} | {name: array(value) for name, value in tensors.items()}


def fixed(
    model: InfluenceModel, rows: Rows, query: Rows, scores: Scores, checkpoints: list[Checkpoint]
) -> dict[str, Signal]:
    """The baselines as published.

    Args:
        model: not asked for its fit.
        rows: to be judged.
        query: of TracIn.
        scores: of the rows at the last checkpoint.
        checkpoints: of the fit to the rows; a single one for the model as given.
    """
    embeddings = model.encoder.embed(checkpoints[-1][1], rows.features)
    return {
        "CLIPScore": array(-scores.clip_score),
        "NegCLIPLoss": array(scores.loss),
        "LEMoN-fix": array(*lemon(embeddings.text, embeddings.image, [Lemon()])),
    } | tracin(model.encoder, rows, query, checkpoints)


def tuned(model: InfluenceModel, rows: Rows, theta: Tensor) -> dict[str, dict[str, Signal]]:
    """Those with something to tune, in all settings, by method and setting."""
    embeddings = model.encoder.embed(theta, rows.features)
    batches = {"batch 256": (BATCH, 3), "all in one batch": (len(rows), 1)}
    losses = {
        f"temperature {1 / factor:g}x, {name}": array(
            pair_losses(model.encoder, embeddings, factor, Pass(*sizes, 0, rows.siblings))
        )
        for factor, (name, sizes) in product(FACTORS, batches.items())
    }
    settings = list(lemon_settings())
    lemons = {
        method: {
            one.name: array(values)
            for one, values in zip(
                settings, lemon(embeddings.text, embeddings.image, settings, same), strict=True
            )
        }
        for method, same in (("LEMoN, tuned", rows.same_text), (COPIES, None))
    }
    return {"NegCLIPLoss, tuned": losses} | lemons


def array(values: Tensor) -> Signal:
    return values.double().numpy()


# ----------------------------------------------------------------------------------- NegCLIPLoss

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the inverse temperature


def pair_losses(encoder: DualEncoder, embeddings: Embeddings, factor: float, how: Pass) -> Tensor:
    """Losses of the pairs ``(N,)`` at another temperature, averaged over random batches."""
    warm = embeddings._replace(scale=factor * embeddings.scale)
    total, visits = torch.zeros(2, len(warm.text), dtype=torch.float64)
    for _, batch in how.batches(len(warm.text)):
        chosen = warm._replace(text=warm.text[batch], image=warm.image[batch])
        same = None if how.same is None else how.same[batch]
        losses = encoder.contrastive.roles(chosen, form="exact", same=same).positive
        total.index_add_(0, batch, losses.double())
        visits.index_add_(0, batch, torch.ones(len(batch), dtype=torch.float64))
    return total / visits


# ----------------------------------------------------------------------------------------- LEMoN


@dataclass(frozen=True)
class Lemon:
    """Settings of LEMoN (Zhang et al., 2025); the defaults are those of its fixed variant.

    Attributes:
        neighbours: of a row, in the space of images and in that of texts.
        beta: weight of the neighbours by image.
        gamma: weight of the neighbours by text.
        tau1: how fast a neighbour's weight falls with its distance.
        tau2: how fast with its own mismatch.
    """

    neighbours: int = 30
    beta: float = 5.0
    gamma: float = 5.0
    tau1: float = 0.1
    tau2: float = 5.0

    @property
    def name(self) -> str:
        return (
            f"k {self.neighbours}, beta {self.beta:g}, gamma {self.gamma:g}, "
            f"tau1 {self.tau1:g}, tau2 {self.tau2:g}"
        )


def lemon_settings() -> Iterator[Lemon]:
    """What is tried, the fixed variant among it."""
    weights = ((1.0, 1.0), (5.0, 0.0), (0.0, 5.0), (5.0, 5.0), (20.0, 20.0))
    for count, (beta, gamma), tau1, tau2 in product((5, 30, 100), weights, (0.1, 5.0), (1.0, 5.0)):
        yield Lemon(count, beta, gamma, tau1, tau2)


def lemon(
    text: Tensor, image: Tensor, settings: Sequence[Lemon], same: Tensor | None = None
) -> list[Tensor]:
    """``d_mm + beta s_n + gamma s_m``, ``(N,)``, for each of the settings.

    A pair's own cosine distance ``d_mm``; the distance of its caption from those of the images
    nearest to its own, and of its image from those of the nearest captions. Neighbours count less
    the farther they are and the worse they match themselves; a row is no neighbour of its own.

    A wrong caption is the copy of another row's, and hardly a right one has a copy in these data.
    With few neighbours by caption, the nearest one then tells how the noise was made: the row that
    has the very same caption and a different image. ``same`` keeps such rows from being neighbours.

    Args:
        text: ``(N, d)``, normalised.
        image: ``(N, d)``, normalised.
        settings: weights.
        same: ``(N,)``, equal for equal captions, which are then no neighbours by caption.
    """
    mismatch = 1 - (text * image).sum(dim=1)
    most = min(max(one.neighbours for one in settings), len(text) - 1)

    def nearest(
        anchors: Tensor, others: Tensor, same: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Distance of the neighbours, their mismatch, and how far their other side is."""
        distances = (1 - anchors @ anchors.T).fill_diagonal_(torch.inf)
        if same is not None:
            distances[same[:, None] == same] = torch.inf
        distance, near = distances.topk(most, dim=1, largest=False)
        return distance, mismatch[near], 1 - (others[:, None] * others[near]).sum(dim=2)

    def average(found: tuple[Tensor, Tensor, Tensor], one: Lemon) -> Tensor:
        distance, its_mismatch, apart = (part[:, : one.neighbours] for part in found)
        return (apart * (-one.tau1 * distance - one.tau2 * its_mismatch).exp()).mean(dim=1)

    by_image, by_text = nearest(image, text), nearest(text, image, same)
    return [
        mismatch + one.beta * average(by_image, one) + one.gamma * average(by_text, one)
        for one in settings
    ]


# ---------------------------------------------------------------------------------------- TracIn


def tracin(
    encoder: DualEncoder, rows: Rows, query: Rows, checkpoints: list[Checkpoint]
) -> dict[str, Signal]:
    """TracIn to the query and to the row itself, and the gradient norm at the last checkpoint.

    ``sum_t lr_t <grad F, grad Pos_n>``, with the row itself for ``F`` in the second. Every gradient
    is there in full: estimates of the norm by random probes, as an audit has them, would rank worse
    (an AUPRC of 0.74 with 16 probes, of 0.84 with 64).
    """
    generator = torch.Generator().manual_seed(0)
    objective = Objective(
        encoder,
        query.features,
        random_batches(len(query), BATCH, generator),
        query.same_text,
    )
    to_query = to_self = norm = torch.zeros(len(rows), dtype=torch.float64)
    for rate, theta in checkpoints:
        product, norm = gradients(encoder, theta, rows, objective.gradient(theta), generator)
        to_query = to_query + rate * product
        to_self = to_self + rate * norm.square()
    return {
        "TracIn to the query": array(-to_query),
        "TracIn to itself": array(to_self),
        "gradient norm": array(norm),
    }


def gradients(
    encoder: DualEncoder, theta: Tensor, rows: Rows, along: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Products of ``along`` with the gradients of ``Pos_n``, and their norms; ``(N,)`` each."""
    product, norm = torch.zeros(2, len(rows), dtype=torch.float64)
    same = rows.same_text
    for batch in random_batches(len(rows), BATCH, generator):
        features = rows.features[batch]
        embeddings = encoder.embed(theta, features)

        def losses(
            text: Tensor, image: Tensor, batch: Tensor = batch, like: Embeddings = embeddings
        ) -> Tensor:
            here = like._replace(text=text, image=image)
            return encoder.contrastive.roles(here, form="exact", same=same[batch]).positive

        of_each = jacrev(losses, argnums=(0, 1))(embeddings.text, embeddings.image)
        for chosen in torch.arange(len(batch)).split(GRADIENTS):
            zeros = [
                None if part is None else torch.zeros(len(chosen)).to(part)
                for part in embeddings[2:]
            ]
            cotangents = Embeddings(*(side[chosen] for side in of_each), *zeros)
            found = encoder.pull(theta, cotangents, features)
            product[batch[chosen]] = (found @ along).double()
            norm[batch[chosen]] = found.norm(dim=1).double()
    return product, norm


# ------------------------------------------------------------------------------------ everything


@dataclass(frozen=True)
class Judged:
    """What all methods make of a data set at one state of the model.

    Attributes:
        signals: of fixed methods, ours among them, by name.
        tuned: by name and setting.
        detection: of ours.
    """

    signals: dict[str, Signal]
    tuned: dict[str, dict[str, Signal]]
    detection: Detection


def judge_all(
    model: InfluenceModel, rows: Rows, query: Rows, config: DetectionConfig | None = None
) -> Judged:
    """Every method, after the fit of the model's config; at the model as given if it has none."""
    influence, checkpoints = _fit(model, rows, query)
    scores = influence.scores()
    witnesses = signals_of_rows(model, rows, scores)
    injected = inject_mismatches(model, influence, query, detection=config)
    detection = detect(
        witnesses.stack(),
        injected.reference,
        injected.kinds,
        trust=TRUST,
        exchanged=injected.exchanged,
    )
    signals = parts_of_ours(scores, witnesses, detection) | fixed(
        model, rows, query, scores, checkpoints
    )
    return Judged(signals, tuned(model, rows, checkpoints[-1][1]), detection)


def _fit(model: InfluenceModel, rows: Rows, query: Rows) -> tuple[Influence, list[Checkpoint]]:
    if not model.config.fit_epochs:
        influence = model.fit(rows, query)
        return influence, [(1.0, influence.theta)]
    influence, checkpoints = fit(model, rows, query)
    return influence, checkpoints[::2]  # epochs 2, 6 and 10
