"""What a second process brings: strong and weak scaling of scoring and of curvature products.

    python -m tests.benchmarks.scaling            # both models, about half an hour
    python -m tests.benchmarks.scaling --quick    # the embedded model, few rows

Two processes of one thread each, started by `torchrun` and joined by gloo. Four runs take turns,
so that what else the machine does disturbs all of them alike, and the smallest time of each counts:

* *one*: the main process works alone on ``n`` rows while the other waits (`processes.alone`, which
  is what a single process does);
* *each*: both do that at once and know nothing of each other, the floor: what memory, cache and
  clock leave of two cores;
* *two*: both share ``n`` rows;
* *double*: both share ``2 n`` rows.

Strong scaling is ``one / (2 two)``, weak scaling ``one / double``, the floor ``one / each``. Before
the clock runs, the results of *one* and *two* are compared. Rows are at the frozen boundary, but in
*read and score*, which is all that a user waits for; the processes then hold a part of them each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import concatenate_datasets, disable_progress_bars
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_ecif import processes
from hf_ecif.config import InfluenceConfig
from hf_ecif.data import load_rows
from hf_ecif.encoders import DualEncoder, Features
from hf_ecif.influence import InfluenceModel
from hf_ecif.operators import Objective, random_batches
from hf_ecif.scoring import Batching, Directions, score_rows
from tests.benchmarks.detection import DEMO, RESULTS
from tests.benchmarks.engine import repeat, vit_b_32
from tests.benchmarks.rows import provenance

GOAL = 0.85
PROBES = 4
Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much work a case of a model is.

    Attributes:
        rows: ``n``, which a single process has.
        batch: rows of a contrastive batch.
        micro: rows encoded at a time.
    """

    rows: int
    batch: int
    micro: int


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
        "all": Size(1024, 256, 64),
        "last_block": Size(2048, 256, 64),
        "projections": Size(16384, 256, 64),
    },
    "vit-b-32": {
        "all": Size(8, 8, 4),
        "last_block": Size(64, 16, 8),
        "projections": Size(4096, 256, 64),
    },
}
QUICK = {
    "embedded": {
        "all": Size(128, 64, 32),
        "last_block": Size(256, 64, 32),
        "projections": Size(4096, 256, 64),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", choices=SIZES)
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
        for model in args.models or sizes
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
    assert processes.count() == 2, "they do not know each other"
    results = []
    for case in cases(model, sizes):
        result = {"model": model, "case": case.name, "rows": case.rows} | scaling(case, repeats)
        results.append(result)
        if processes.is_main():
            print(result, file=sys.stderr, flush=True)
            output.write_text(json.dumps(results))
    processes.leave()


def scaling(case: Case, repeats: int) -> Figures:
    alone = in_turn(lambda: apart(case, case.rows), lambda: None)
    difference = case.run(case.rows)
    if alone is not None:
        difference = difference - alone
        assert difference.norm() < 1e-3 * alone.norm(), "one process and two differ"
    one, n = partial(apart, case, case.rows), case.rows
    runs: dict[str, Callable[[], object]] = {
        "one": lambda: in_turn(one, lambda: None),
        "each": one,
        "two": lambda: case.run(n),
        "double": lambda: case.run(2 * n),
    }
    times = {name: [timed(run) for _ in range(0)] for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run))
    best = {name: min(seconds) for name, seconds in times.items()}
    return {
        "seconds": times,
        "strong": best["one"] / (2 * best["two"]),
        "weak": best["one"] / best["double"],
        "floor": best["one"] / best["each"],
    }
