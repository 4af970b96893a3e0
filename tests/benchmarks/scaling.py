"""What a second process brings: strong and weak scaling of scoring and of curvature products.

    python -m tests.benchmarks.scaling            # both models, about half an hour
    python -m tests.benchmarks.scaling --quick    # few rows, two repeats

Two processes of one thread each, started by `torchrun` and joined by gloo. Four runs take turns,
so that what else the machine does disturbs all of them alike, and the smallest time of each counts:

* *one*: the main process works alone on ``n`` rows while the other waits (`alone`, which
  is what a single process does);
* *each*: both do that at once and know nothing of each other, the floor: what memory, cache and
  clock leave of two cores;
* *two*: both share ``n`` rows;
* *double*: both share ``2 n`` rows.

Strong scaling is ``one / (2 two)``, weak scaling ``one / double``, the floor ``one / each``. All
three are taken of processor time, too, that of the busier process: it leaves out the waiting for
each other, but counts work that is done twice or unevenly, and the exchange. It still tells
something where the machine has other things to do. Before the clock runs, the results of *one* and
*two* are compared. Rows are at the frozen boundary, but in *read and score*, which is all that a
user waits for; the processes then hold a part of them each. A *GGN product* is one of many: the
rows that its processes need of each other were sent before the clock ran. *solve* counts that, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.inverse import InverseCurvature
from hf_ecif.engine.low_rank import Matvec
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.scoring import Directions, Pass, score_rows
from hf_ecif.utils import distributed
from tests.benchmarks.engine import vit_b_32
from tests.benchmarks.rows import provenance
from tests.benchmarks.shared import DEMO, RESULTS

GOAL = 0.85
KINDS = ("strong", "weak", "floor")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much work a case of a model is.

    Attributes:
        rows: ``n``, which a single process has.
        batch: rows of a contrastive batch.
        micro: rows encoded at a time.
        probes: beside the query; scoring has two directions of each, a product one vector.
    """

    rows: int
    batch: int
    micro: int
    probes: int


@dataclass(frozen=True)
class Case:
    """Work on any number of rows.

    Attributes:
        name: of the quantity and the attributed parameters.
        rows: ``n``.
        run: does it for a number of rows, with the processes that there are; gives a tensor to
            compare.
    """

    name: str
    rows: int
    run: Callable[[int], Tensor]


# Of the embedded model and of one like ViT-B/32, by attributed parameters.
SIZES = {
    "embedded": {
        "all": Size(512, 128, 64, probes=0),
        "last_block": Size(512, 128, 64, probes=1),
        "projections": Size(16384, 256, 64, probes=4),
    },
    "vit-b-32": {
        "all": Size(8, 8, 4, probes=0),
        "last_block": Size(16, 8, 4, probes=1),
        "projections": Size(4096, 256, 64, probes=4),
    },
}
QUICK = {
    "embedded": {
        "all": Size(64, 32, 16, probes=0),
        "last_block": Size(128, 32, 16, probes=1),
        "projections": Size(4096, 256, 64, probes=4),
    },
    "vit-b-32": {
        "all": Size(2, 2, 1, probes=0),
        "last_block": Size(8, 4, 2, probes=1),
        "projections": Size(2048, 256, 64, probes=4),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a model, in one of two processes
    args = parser.parse_args()
    sizes = QUICK if args.quick else SIZES
    repeats = args.repeats or (2 if args.quick else 5)
    if args.one:
        measure(args.one, sizes[args.one], repeats, args.output)
        return
    content = provenance() | {"threads of a process": 1, "repeats": repeats, "goal": GOAL}
    content["results"] = [
        result
        for model in args.models
        for result in in_two_processes(model, repeats, quick=args.quick)
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print_table(content["results"])
    draw(content["results"], args.output.with_suffix(".png"))


def in_two_processes(model: str, repeats: int, *, quick: bool) -> list[Figures]:
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with TemporaryDirectory() as folder:
        output = Path(folder, "results.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        job = ["-m", "tests.benchmarks.scaling", "--one", model, "--repeats", str(repeats)]
        options = ["--output", str(output), *(["--quick"] if quick else [])]
        command = [*torchrun, "--nproc_per_node=2", *job, *options]
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text())


# --------------------------------------------------------------------- in each of two processes


def measure(model: str, sizes: dict[str, Size], repeats: int, output: Path) -> None:
    """All cases of a model; the main process writes the results."""
    torch.set_num_threads(1)
    disable_progress_bars()
    assert distributed.count() == 2, "they do not know each other"
    results = []
    for case in cases(model, sizes):
        result = {"model": model, "case": case.name, "rows": case.rows} | scaling(case, repeats)
        results.append(result)
        if distributed.is_main():
            print(result, file=sys.stderr, flush=True)
            output.write_text(json.dumps(results))
    distributed.leave()


def scaling(case: Case, repeats: int) -> Figures:
    """Compare the results of one process and two, then the times."""
    shared, alone = case.run(case.rows), only_main(lambda: apart(case, case.rows))
    if alone is not None:
        assert (shared - alone).norm() < 1e-3 * alone.norm(), "one process and two differ"
    del shared, alone
    runs: dict[str, Callable[[], object]] = {
        "one": lambda: only_main(lambda: apart(case, case.rows)),
        "each": lambda: apart(case, case.rows),
        "two": lambda: case.run(case.rows),
        "double": lambda: case.run(2 * case.rows),
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds, busy = seconds_of(run)
            wall[name].append(seconds)
            processor[name].append(busy)
    return efficiency(wall) | {"processor": efficiency(processor)}


def efficiency(times: dict[str, list[float]]) -> Figures:
    best = {name: min(seconds) for name, seconds in times.items()}
    return {
        "strong": best["one"] / (2 * best["two"]),
        "weak": best["one"] / best["double"],
        "floor": best["one"] / best["each"],
        "seconds": times,
    }


def apart(case: Case, rows: int) -> Tensor:
    """As a process that knows of no other."""
    with distributed.alone():
        return case.run(rows)


def only_main(work: Callable[[], Tensor]) -> Tensor | None:
    return work() if distributed.is_main() else None


def seconds_of(run: Callable[[], object]) -> tuple[float, float]:
    """Until the last process is done; and processor time of the busiest."""
    torch.distributed.barrier()
    start, busy = time.perf_counter(), time.process_time()
    run()
    busy = time.process_time() - busy
    torch.distributed.barrier()
    return time.perf_counter() - start, max(distributed.collect(busy))


# ------------------------------------------------------------------------------------ cases


def cases(name: str, sizes: dict[str, Size]) -> Iterator[Case]:
    """Of every choice of attributed parameters; and from files, where there are any."""
    if name == "embedded":
        wrapped = InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig(parameters="all"))
        dataset = load_rows(str(DEMO / "data"), "train")
        with distributed.alone():
            raw = wrapped.read(dataset.select(range(256))).features
        model = wrapped.encoder.model
        yield reading(dataset, replace(sizes["projections"], rows=2 * sizes["all"].rows))
    else:
        model, raw = vit_b_32()
    for parameters, size in sizes.items():
        encoder = DualEncoder(model, parameters, size.micro)
        features = repeated(encoder.freeze(raw), 2 * size.rows)
        yield Case(f"score, {parameters}", size.rows, scoring(encoder, features, size))
        yield Case(f"GGN product, {parameters}", size.rows, product(encoder, features, size))
        if parameters == "projections":
            yield Case(f"solve, {parameters}", size.rows, solving(encoder, features, size))


def scoring(encoder: DualEncoder, features: Features, size: Size) -> Callable[[int], Tensor]:
    theta, directions = encoder.theta, random_directions(encoder, size.probes)
    how = Pass(size.batch, 2, seed=0)

    def run(rows: int) -> Tensor:
        held = share_of(features, rows)
        return score_rows(encoder, theta, held, directions, how, train_count=rows).task

    return run


def product(encoder: DualEncoder, features: Features, size: Size) -> Callable[[int], Tensor]:
    """One of many: the operator is built at the first call, which is not the fastest."""
    theta, directions = encoder.theta, random_directions(encoder, size.probes)
    vectors = torch.cat([directions.query[None], directions.probes])

    @cache
    def built(rows: int, alone: bool) -> Matvec:
        return objective(encoder, features, size, rows).operator("ggn", theta)

    return lambda rows: built(rows, distributed.count() == 1)(vectors)


def solving(encoder: DualEncoder, features: Features, size: Size) -> Callable[[int], Tensor]:
    """What a fit does for its directions: send the rows, estimate the spectrum, solve."""
    theta, directions = encoder.theta, random_directions(encoder, size.probes)
    vectors = torch.cat([directions.query[None], directions.probes])

    def run(rows: int) -> Tensor:
        inverse = InverseCurvature(
            objective(encoder, features, size, rows), theta, InfluenceConfig()
        )
        return inverse.solve(vectors)[0]

    return run


def objective(encoder: DualEncoder, features: Features, size: Size, rows: int) -> Objective:
    batches = random_batches(rows, size.batch, torch.Generator().manual_seed(0))
    return Objective(encoder, share_of(features, rows), batches)


def reading(dataset: Dataset, size: Size) -> Case:
    """Decode, preprocess, embed and score by the projections."""
    config = InfluenceConfig(batch_size=size.batch, micro_batch_size=size.micro)
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    theta, directions = model.encoder.theta, random_directions(model.encoder, size.probes)
    how = Pass(size.batch, 2, seed=0)

    def run(rows: int) -> Tensor:
        read = model.read(dataset.select(np.arange(rows) % len(dataset)))
        found = model.encoder, theta, read.features, directions, how
        return score_rows(*found, train_count=rows).task

    return Case("read and score, projections", size.rows, run)


def random_directions(encoder: DualEncoder, probes: int) -> Directions:
    generator = torch.Generator().manual_seed(0)
    rows = 1e-3 * torch.randn(1 + 2 * probes, encoder.count, generator=generator)
    return Directions(rows[0], rows[1 : 1 + probes], rows[1 + probes :])


def repeated(features: Features, count: int) -> Features:
    """As many rows as asked for, from fewer."""
    chosen = features[torch.arange(count) % len(features)]
    return Features(chosen.text, chosen.image)


def share_of(features: Features, rows: int) -> Features:
    """The first rows; of several processes, each holds a part."""
    if distributed.count() == 1:
        return features[:rows]
    own = distributed.share(rows)
    part = features[own.start : own.stop]
    return Features(part.text, part.image, own, rows)


# ----------------------------------------------------------------------------------- output


def print_table(results: list[Figures]) -> None:
    table = Table(
        "model", "case", "rows", "one, s", "strong", "weak", "floor", "strong", "weak", "floor",
        title=f"Efficiency of two processes of one thread, then in processor time; goal {GOAL}",
    )  # fmt: skip
    for one in results:
        row = one["model"], one["case"], f"{one['rows']:,}"
        figures = [times[kind] for times in (one, one["processor"]) for kind in KINDS]
        table.add_row(*row, *(f"{v:.2f}" for v in (min(one["seconds"]["one"]), *figures)))
    Console(width=120).print(table)


def draw(results: list[Figures], path: Path) -> None:
    """Strong, weak and floor of every case as bars, in processor time as ticks."""
    names = [f"{one['model']}\n{one['case']}".replace(", ", "\n") for one in results]
    figure, axis = plt.subplots(figsize=(1.2 + 0.9 * len(results), 3.8))
    places = np.arange(len(results))
    for number, kind in enumerate(KINDS):
        left = places + 0.27 * (number - 1)
        axis.bar(left, [one[kind] for one in results], 0.25, label=kind)
        ticks = [one["processor"][kind] for one in results]
        axis.scatter(left, ticks, marker="_", color="black", s=60, zorder=3)
    axis.axhline(GOAL, color="grey", linestyle="--", linewidth=0.8, label="goal")
    axis.set_xticks(places, names, fontsize=7)
    axis.set(ylabel="efficiency of two processes", ylim=(0, 1.3))
    axis.legend(fontsize=8, loc="upper center", ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
