"""What the engine costs, as ratios to a floor that is measured in the same process.

    python -m tests.benchmarks.engine                        # both models, one and all threads
    python -m tests.benchmarks.engine --models embedded --threads 1
    python -m tests.benchmarks.engine --measures memory      # takes its place among the results

Every figure is the smallest of several interleaved runs of a quantity over the smallest of its
floor. The models are the embedded CLIP on its own data, and a `CLIPModel` of the size of ViT-B/32
with random weights on noise. Each model and number of threads is measured in a process of its own,
as is the peak memory. On one thread the clock is that of the processor, so that other processes
disturb by the caches alone; on several it is that of the wall, and nothing else may run.

What bounds each quantity:

- *All* is bound by matrix products, of which a tangent needs two for every one of the plain pass
  (`W x'` and `W' x`), so three times the plain pass is the floor; the tangents of the elements
  (activations, normalisation, softmax) come on top. Adapters and the last layers leave out `W' x`
  where `W` is frozen: twice the plain pass. On the embedded CLIP, whose layers are narrow, matrix
  products are 64 % of a plain pass, and 44 % (1.6 plain passes) of a push along adapters by torch's
  profiler; nearly all of the other 1.5 are products and sums of elements.
- *A difference* is two plain passes, and some passes over the moved parameters (151 M of them at
  ViT size), which only many rows outweigh.
- *A further query* adds `W' x` of the heads, `N (D_t + D_v) d` multiplications, and the cells
  `u v'` and `u' v`, `2 N B d` more; two sums that run over `2 N` times `3 B` cells, too. With
  `B = 256` that is 1 + 2 * 256 / (128 + 128) = 3.0 heads for the embedded CLIP and
  1 + 2 * 256 / (512 + 768) = 1.4 at ViT size: no arrangement of dense products goes below.
  Tangents of short embeddings are many passes over memory beside few products, so heads take as
  many rows at a time as a cache holds.
- *A cached GGN product* is one of the products of a solve: an operator keeps the embeddings and the
  softmax. Eight of the floor's eleven matrix products are left (no vector changes those of the
  heads and the logits), so at ViT size it is below the floor. With the short embeddings of the
  embedded CLIP, half of its time goes to small things: the derivative of the normalisation,
  backwards twice, and seven passes over `B x B` cells. A fit solves for 17 vectors at once, for
  which matrix products are most of it.

Tried on one thread, and left out:

- `torch.compile`: role tangents take 0.7, pushes through a head 0.6, the loss's GGN products 0.9 of
  the time, after 3 to 9 seconds for every shape in every process, with a C++ compiler at hand. That
  pays from about 50,000 rows of the embedded CLIP on; at ViT size, where reading the rows takes
  most of an audit, hardly. A tower in forward mode does not compile (torch 2.13).
- `torch.set_float32_matmul_precision("medium")`: not faster on this CPU (AVX-512 with bf16), with
  results equal to rounding: it is not taken up.
- The vision tower with `channels_last`: level on the embedded CLIP, 5 % faster at ViT size.
- Other numbers of rows that pass a head at a time: level within 3 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPModel

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.engine.parameters import add_lora
from hf_ecif.engine.solvers import ConjugateGradients, solve
from hf_ecif.engine.system import System, estimate_spectrum
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.scoring import Directions, Pass, score_rows
from tests.benchmarks.shared import DEMO, RESULTS

MEASURES = ("projections", "all", "curvature", "lora", "memory")
MODELS = {"embedded": 1024, "vit-b-32": 16}  # rows
PEAK = {"embedded": "last_block", "vit-b-32": "projections"}  # attributed for the peak memory
BATCH, MICRO = 256, 64
SOLVE_ROWS = 10_000
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Quantity:
    """Something to be measured, and how large it may be."""

    name: str
    floor: str
    at_most: float


QUANTITIES = {
    q.name: q
    for q in (
        Quantity("score, all, exact", "plain embedding, same kernel", 3.5),
        Quantity("score, all, difference", "plain embedding, fused kernel", 2.2),
        Quantity("score, lora", "plain embedding, same kernel", 2.5),
        Quantity("score, projections", "plain embedding", 1.1),
        Quantity("a further query, projections", "one product with the heads", 1.5),
        Quantity("GGN product, all", "jvp and vjp written bare", 1.15),
        Quantity("GGN product, projections, cached", "its matrix products alone", 2.0),
        Quantity("solve, projections, 10,000 rows", "plain embedding of these rows", 1.0),
        Quantity("peak memory, batch 8,192 over 64", "-", 1.5),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(*args.one)))
        return
    results = read_results(args.output)
    for model in args.models:
        for threads in dict.fromkeys(args.threads):
            figures = results.setdefault((model, threads), {})
            for measure in args.measures:
                if measure == "memory" and threads > 1:
                    continue
                of_model = memory if measure == "memory" else partial(timing, measure)
                found = of_model(model, threads)
                figures |= {name: values | {"commit": commit()} for name, values in found.items()}
                write_results(args.output, results)
            print_table(model, threads, figures)


def commit() -> str:
    """Of the code that was measured; each figure keeps its own."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def timing(measure: str, model: str, threads: int) -> Figures:
    return in_own_process(threads, measure, model)


def memory(model: str, threads: int) -> Figures:
    """Of a large contrastive batch over that of a small one, each in a process of its own."""
    small, large = (
        in_own_process(threads, str(batch), model)["peak"]["MiB"] for batch in (64, 8192)
    )
    return {"peak memory, batch 8,192 over 64": {"ratio": large / small, "MiB": large}}


def read_results(path: Path) -> dict[tuple[str, int], Figures]:
    """Figures by model and number of threads."""
    known = json.loads(path.read_text())["results"] if path.exists() else []
    results: dict[tuple[str, int], Figures] = {}
    for result in known:
        results.setdefault((result["model"], result["threads"]), {}).update(result["figures"])
    return results


def write_results(path: Path, results: dict[tuple[str, int], Figures]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    rows = [
        {"model": model, "threads": threads, "figures": figures}
        for (model, threads), figures in results.items()
    ]
    path.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


def in_own_process(threads: int, *job: str) -> Figures:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "tests.benchmarks.engine", "--one", *job]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def measure_one(what: str, name: str) -> Figures:
    """In this process: a measure of a model by its function, or the memory of a batch size."""
    model, features = embedded() if name == "embedded" else vit_b_32()
    if what.isdigit():
        return peak_memory(model, features, PEAK[name], int(what))
    measures = {
        "projections": projections,
        "all": scoring_all,
        "curvature": curvature_all,
        "lora": scoring_lora,
    }
    return measures[what](model, features)


# ------------------------------------------------------------------------------------ inputs


def embedded() -> tuple[nn.Module, Features]:
    wrapped = InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig(parameters="all"))
    train = load_rows(str(DEMO / "data"), "train").select(range(MODELS["embedded"]))
    return wrapped.encoder.model, wrapped.read(train).features


def vit_b_32() -> tuple[nn.Module, Features]:
    torch.manual_seed(0)
    rows = MODELS["vit-b-32"]
    tokens = torch.randint(1, 49405, (rows, 77))
    tokens[:, -1] = 49407
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return CLIPModel(CLIPConfig()).eval(), Features(
        text, {"pixel_values": torch.randn(rows, 3, 224, 224)}
    )


# ------------------------------------------------------------------------------- quantities


def scoring_all(model: nn.Module, features: Features) -> Figures:
    encoder = DualEncoder(model, "all", MICRO)
    theta = encoder.theta
    directions = one_direction(encoder)
    encoder.embed(theta, features[:2])  # look at the towers before the clock runs
    times = race(
        plain=lambda: plain_embedding(model, features),
        plain_math=lambda: plain_embedding(model, features, SDPBackend.MATH),
        exact=lambda: score(encoder, theta, features, directions),
        difference=lambda: score(encoder, theta, features, directions, tangents="difference"),
    )
    exact = score(encoder, theta, features, directions).task
    near = score(encoder, theta, features, directions, tangents="difference").task
    return {
        "score, all, exact": ratio(times, "exact", "plain_math"),
        "score, all, difference": ratio(times, "difference", "plain")
        | {"rank correlation with exact": float(spearmanr(exact, near).statistic)},
    }


def scoring_lora(model: nn.Module, features: Features) -> Figures:
    encoder = DualEncoder(add_lora(model), "lora", MICRO)
    theta, directions = encoder.theta, one_direction(encoder)
    encoder.embed(theta, features[:2])
    times = race(
        plain_math=lambda: plain_embedding(encoder.model, features, SDPBackend.MATH),
        score=lambda: score(encoder, theta, features, directions),
    )
    return {"score, lora": ratio(times, "score", "plain_math")}


def curvature_all(model: nn.Module, features: Features) -> Figures:
    encoder = DualEncoder(model, "all", MICRO)
    theta = encoder.theta
    batches = random_batches(len(features), BATCH, torch.Generator().manual_seed(0))
    objective = Objective(encoder, features, batches)
    vector = one_direction(encoder).query[None]
    objective.ggn(theta, vector)
    times = race(
        bare=lambda: bare_products(model, encoder, features),
        ggn=lambda: objective.ggn(theta, vector),
    )
    return {"GGN product, all": ratio(times, "ggn", "bare")}


def projections(model: nn.Module, features: Features) -> Figures:
    encoder = DualEncoder(model, "projections", MICRO)
    theta = encoder.theta
    frozen = encoder.freeze(features)
    many = torch.randn(33, len(theta)) * 1e-3
    one, several = only(many[0]), only(many)
    times = race(
        plain=lambda: plain_embedding(model, features),
        whole=lambda: score(encoder, theta, encoder.freeze(features), one),
    )
    rows = repeat(frozen, 4096)
    light = race(
        3,
        one=lambda: score(encoder, theta, rows, one),
        several=lambda: score(encoder, theta, rows, several),
        heads=lambda: heads(encoder, theta, rows),
    )
    further = (light["several"] - light["one"]) / 32
    return {
        "score, projections": ratio(times, "whole", "plain"),
        "a further query, projections": {
            "ratio": further / light["heads"],
            "seconds": further,
            "floor": light["heads"],
        },
        **cached_product(encoder, theta, repeat(frozen, 4096)),
        **solving(encoder, theta, frozen, times["plain"] * SOLVE_ROWS / len(features)),
    }


def cached_product(encoder: DualEncoder, theta: Tensor, rows: Features) -> Figures:
    batches = random_batches(len(rows), BATCH, torch.Generator().manual_seed(0))
    objective = Objective(encoder, rows, batches)
    vector = only(torch.randn(len(theta)) * 1e-3).query[None]
    product = objective.operator("ggn", theta)
    parts = [(rows[b].text["hidden"], rows[b].image["hidden"]) for b in batches]
    times = race(
        3,
        ggn=lambda: product(vector),
        bare=lambda: bare_matrix_products(encoder, theta, parts),
    )
    return {"GGN product, projections, cached": ratio(times, "ggn", "bare")}


def solving(encoder: DualEncoder, theta: Tensor, frozen: Features, floor: float) -> Figures:
    """The floor is the plain embedding of as many rows, extrapolated from those embedded."""
    rows = repeat(frozen, SOLVE_ROWS)
    batches = random_batches(len(rows), BATCH, torch.Generator().manual_seed(0))
    objective = Objective(encoder, rows, batches)
    start = clock()
    gradient = objective.over(batches[:1]).gradient(theta)
    product = objective.operator("ggn", theta)
    spectrum = estimate_spectrum(product, theta)
    damping = InfluenceConfig().damping
    report = solve(System(product, spectrum, damping), gradient[None], ConjugateGradients())[1]
    seconds = clock() - start
    return {
        "solve, projections, 10,000 rows": {
            "ratio": seconds / floor,
            "seconds": seconds,
            "floor": floor,
            "iterations": report.iterations,
            "residual": report.relative_residual,
        }
    }


def peak_memory(model: nn.Module, features: Features, parameters: str, batch_size: int) -> Figures:
    """Of scoring and of a product, all else equal: 8,192 rows at the frozen boundary."""
    encoder = DualEncoder(model, parameters, MICRO)
    rows = repeat(encoder.freeze(features), 8192)
    theta, directions = encoder.theta, one_direction(encoder)
    score(encoder, theta, rows, directions, batch_size=batch_size)
    batches = random_batches(8192, batch_size, torch.Generator().manual_seed(0))
    Objective(encoder, rows, batches[:8]).ggn(theta, directions.query[None])
    return {"peak": {"MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}}


# ------------------------------------------------------------------------------------ floors


def plain_embedding(model: nn.Module, features: Features, kernel: SDPBackend | None = None) -> None:
    """What anyone would write to embed the rows."""
    kernels = [kernel] if kernel else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with torch.no_grad(), sdpa_kernel(kernels):
        for rows in micro_batches(len(features)):
            part = features[rows]
            model.get_text_features(**part.text)
            model.get_image_features(**part.image)


def bare_products(model: nn.Module, encoder: DualEncoder, features: Features) -> None:
    """One jvp and one vjp through each tower, without any loss."""
    weights = {name: model.get_parameter(name) for name in encoder.names}
    for rows in micro_batches(len(features)):
        part = features[rows]
        for side, inputs in (("text", part.text), ("image", part.image)):
            own = {n: w for n, w in weights.items() if n.startswith((side, PREFIX[side]))}
            tower = Bare(model, side)
            function = partial(run_bare, tower, inputs)
            tangents = {name: torch.ones_like(value) for name, value in own.items()}
            with sdpa_kernel(SDPBackend.MATH):
                with torch.no_grad():
                    features_of, _ = jvp(function, (own,), (tangents,))
                vjp(function, own)[1](features_of)


PREFIX = {"text": "text", "image": "vis"}  # vision_model and visual_projection


class Bare(nn.Module):
    def __init__(self, model: nn.Module, side: str) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return getattr(self.model, f"get_{self.side}_features")(**inputs).pooler_output


def run_bare(tower: Bare, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    return functional_call(tower, {f"model.{n}": w for n, w in weights.items()}, (inputs,))


def heads(encoder: DualEncoder, theta: Tensor, rows: Features) -> None:
    """The products of all rows with a tangent of the two heads."""
    visual, textual = head_weights(encoder, theta)
    for batch in rows.text["hidden"].split(BATCH):
        batch @ textual.T
    for batch in rows.image["hidden"].split(BATCH):
        batch @ visual.T


def bare_matrix_products(
    encoder: DualEncoder, theta: Tensor, parts: list[tuple[Tensor, Tensor]]
) -> None:
    """The matrix products of a GGN product with one vector, and nothing between them.

    Eleven: two of the heads and two of their tangents, one of the logits and two of their tangents,
    two to pull cells back to the embeddings, and two from there to the heads. Three of them are of
    no vector, so that an operator makes them once.
    """
    visual, textual = head_weights(encoder, theta)
    for text, image in parts:
        u, v = text @ textual.T, image @ visual.T
        u_moved, v_moved = text @ textual.T, image @ visual.T
        cells = u @ v.T
        cells = u_moved @ v.T
        cells = u @ v_moved.T
        (cells @ v).T @ text
        (cells.T @ u).T @ image


def head_weights(encoder: DualEncoder, theta: Tensor) -> tuple[Tensor, Tensor]:
    shapes = [encoder.model.get_parameter(name).shape for name in encoder.names]
    visual, textual = theta.split([shape.numel() for shape in shapes])
    return visual.view(shapes[0]), textual.view(shapes[1])


# ----------------------------------------------------------------------------------- helpers


def score(
    encoder: DualEncoder,
    theta: Tensor,
    features: Features,
    directions: Directions,
    *,
    batch_size: int = BATCH,
    **options: str,
):
    how = Pass(batch_size, 1, 0, **options)
    return score_rows(encoder, theta, features, directions, how, train_count=len(features))


def one_direction(encoder: DualEncoder) -> Directions:
    return only(torch.randn(encoder.count, generator=torch.Generator().manual_seed(0)) * 1e-3)


def only(query: Tensor) -> Directions:
    empty = query.new_zeros(0, query.shape[-1])
    return Directions(query, empty, empty)


def micro_batches(count: int) -> Iterator[slice]:
    return (slice(i, min(i + MICRO, count)) for i in range(0, count, MICRO))


def repeat(features: Features, count: int) -> Features:
    """As many rows as asked for, from fewer, told apart by a little noise."""
    rows = torch.arange(count) % len(features)
    generator = torch.Generator().manual_seed(0)
    repeated = features[rows]
    for side in (repeated.text, repeated.image):
        hidden = side["hidden"]
        side["hidden"] = hidden + 0.1 * hidden.std() * torch.randn(
            hidden.shape, generator=generator
        )
    return repeated


def race(repeats: int = 3, **runs: Callable[[], object]) -> dict[str, float]:
    """The smallest time of each, in turns, so that none has the better moments."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return best


def clock() -> float:
    """Seconds: of the processor where there is one thread, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ratio(times: dict[str, float], quantity: str, floor: str) -> dict[str, float]:
    seconds = times[quantity]
    return {"ratio": seconds / times[floor], "seconds": seconds, "floor": times[floor]}


SHOWN = ("ratio", "seconds", "floor", "commit")


def print_table(model: str, threads: int, results: Figures) -> None:
    title = f"{model}, {threads} thread{'s' if threads > 1 else ''}"
    table = Table("quantity", "floor", "ratio", "at most", "further", title=title)
    for name, figures in results.items():
        known = QUANTITIES.get(name)
        further = {k: v for k, v in figures.items() if k not in SHOWN}
        table.add_row(
            name,
            known.floor if known else "",
            f"{figures['ratio']:.2f}",
            f"{known.at_most:g}" if known else "",
            ", ".join(f"{key} {value:.4g}" for key, value in further.items()),
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
