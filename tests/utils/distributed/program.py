"""What every process of a distributed test runs.

    python -m tests.utils.distributed.program OUTPUT float64 float32

The main process writes all results. Rows are divided unevenly, and with three processes one of them
has none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_ecif import DetectionConfig, InfluenceConfig, InfluenceModel, load_rows
from hf_ecif.detection.injection import inject_mismatches
from hf_ecif.engine import features as inputs
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Curvature, Objective, random_batches
from hf_ecif.engine.objectives import similarity
from hf_ecif.engine.solvers import ConjugateGradients, solve
from hf_ecif.engine.system import System, estimate_spectrum
from hf_ecif.influence.fitting import Epoch, fit_parameters
from hf_ecif.influence.queries import choose_query, retrieval_margin, zero_shot
from hf_ecif.influence.removal import remove
from hf_ecif.influence.response import unroll
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Directions, Pass, score_group, score_rows
from hf_ecif.utils import distributed
from tests.support import DEMO
from tests.support.families import build, build_inputs

COUNT = 13
CASES = {
    "float64": (("clip", "last_block"), ("clip", "projections"), ("siglip", "projections")),
    "float32": (("clip", "projections"),),
}


def main(output: str, *dtypes: str) -> None:
    torch.set_num_threads(1)
    assert distributed.count() == int(os.environ.get("WORLD_SIZE", "1")), "they work apart"
    results: dict[str, Tensor] = {}
    for dtype in dtypes:
        for family, parameters in CASES[dtype]:
            for name, value in engine(family, parameters, getattr(torch, dtype)):
                results[f"{dtype}/{family}/{parameters}/{name}"] = value
    if "float32" in dtypes:
        results |= {f"float32/model/{name}": value for name, value in model()}
    everywhere = distributed.collect({name: value.sum().item() for name, value in results.items()})
    assert all(own == everywhere[0] for own in everywhere), "the processes disagree"
    if distributed.is_main():
        save_file({name: value.contiguous() for name, value in results.items()}, output)
    distributed.leave()


def engine(family: str, parameters: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every operation of the engine on a tiny model."""
    torch.manual_seed(0)
    encoder = DualEncoder(build(family).to(dtype), parameters, micro_batch_size=4)
    built = build_inputs(family, COUNT)
    raw = Features(
        built.text,
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in built.image.items()},
    )
    frozen = encoder.freeze(raw)
    features = divided(frozen)
    theta = encoder.theta
    vectors = torch.randn(3, len(theta), dtype=dtype, generator=torch.Generator().manual_seed(1))
    same = torch.tensor([0, *range(COUNT - 1)])

    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))
    yield "embedded", torch.cat(encoder.embed(theta, features)[:2])
    yield "exchanged", torch.cat(encoder.embed(theta, features.with_texts_of(order))[:2])
    yield "replicated", torch.cat(encoder.embed(theta, frozen[order])[:2])
    yield "difference", encoder.push(theta, vectors, features, "difference")[1].text

    few = Objective(encoder, features, [order], same, l2=0.1)  # one batch, shared row by row
    generator = torch.Generator().manual_seed(3)
    many = Objective(encoder, features, random_batches(COUNT, 3, generator), same, l2=0.1)
    for name, objective in (("few", few), ("many", many)):
        yield f"{name}/value", objective.value(theta)[None]
        yield f"{name}/gradient", objective.gradient(theta)
        yield f"{name}/ggn", objective.ggn(theta, vectors)
        yield f"{name}/hessian", objective.hessian(theta, vectors)
        inputs.SENT_ROWS = 4  # so that rows are sent in several parts
        for kind in get_args(Curvature):
            yield f"{name}/operator/{kind}", objective.operator(kind, theta)(vectors)
    similarity.BLOCK = 4  # so that a share is more than one block
    yield "few/blocks", few.ggn(theta, vectors)
    similarity.BLOCK = 1024

    spectrum = estimate_spectrum(lambda v: many.ggn(theta, v), theta)
    system = System(lambda v: many.ggn(theta, v), spectrum, relative_damping=10.0)
    solved, _ = solve(system, vectors, ConjugateGradients())
    yield "solved", solved
    trajectory: list[Epoch] = []
    fitted, _ = fit_parameters(
        many,
        theta,
        batch_size=5,
        epochs=2,
        learning_rate=1e-3,
        generator=torch.Generator().manual_seed(4),
        trajectory=trajectory,
    )
    yield "fitted", fitted
    for number, station in enumerate(unroll(many, trajectory, vectors, "ggn")):
        yield f"{number}/unrolled", station.directions

    members = torch.arange(COUNT) % 4 == 0
    removed, _ = remove(many, theta, members, spectrum, relative_damping=10.0)
    yield "removed", removed

    how = Pass(5, 3, seed=5, same=same)
    directions = Directions(vectors[0], vectors[1:2], vectors[2:])
    scores = score_rows(encoder, theta, features, directions, how, train_count=COUNT)
    yield from scores.to_state().tensors.items()
    group = score_group(encoder, theta, features, vectors[0], members, how, train_count=COUNT)
    yield "group", torch.stack([group.positive, group.negative, group.stderr])

    texts = [f"caption {number % 4}" for number in range(COUNT)]
    rows = Rows(features, torch.arange(COUNT), texts, {}, COUNT)
    for name, query in (("classes", zero_shot(rows)), ("margin", retrieval_margin(rows, [3, 7]))):
        yield f"{name}/values", query.values(encoder, theta).reshape(-1)
        yield f"{name}/gradients", query.gradients(encoder, theta)
    yield "chosen", choose_query(rows, encoder, share=0.3).positions


def divided(features: Features) -> Features:
    """The same rows, each process with a part of its own; of unequal size, or empty."""
    bounds = {1: [0, COUNT], 2: [0, 9, COUNT], 3: [0, 8, 8, COUNT]}[distributed.count()]
    first, last = bounds[distributed.rank()], bounds[distributed.rank() + 1]
    if distributed.count() == 1:
        return features
    text, image = (
        {key: value[first:last] for key, value in side.items()}
        for side in (features.text, features.image)
    )
    return Features(text, image, range(first, last), COUNT)


def model() -> Iterator[tuple[str, Tensor]]:
    """From a data set to scores; one row in the middle cannot be read."""
    config = InfluenceConfig(
        batch_size=16,
        micro_batch_size=8,
        fit_epochs=2,
        probes=2,
        partitions=2,
        tolerance=1e-6,  # a solve that stops early may stop a step earlier or later
    )
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    cells = load_rows(str(DEMO / "data"), "validation").select_columns(["image", "text"])
    texts = ["" if row == 20 else text for row, text in enumerate(cells[:]["text"])]
    dataset = cells.remove_columns("text").add_column("text", texts)
    rows, query = (
        model.read(dataset.select(range(41))),
        model.read(dataset.select(range(50, 90))),
    )
    assert list(rows.reasons) == [20]
    influence = model.fit(rows, query)
    yield "theta", influence.theta
    yield "positions", rows.positions
    yield from influence.scores().to_state().tensors.items()
    injected = inject_mismatches(model, influence, query, detection=DetectionConfig(injections=1))
    yield "injected", torch.from_numpy(np.concatenate(injected.kinds))
    yield "reference", torch.from_numpy(injected.reference)


if __name__ == "__main__":
    main(*sys.argv[1:])
