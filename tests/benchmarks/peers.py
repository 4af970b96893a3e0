"""What scoring the embedded data for one query costs and is worth, beside other tools.

    pip install --no-deps kronfluence traker && pip install einops einconv opt-einsum tqdm
    python -m tests.benchmarks.peers            # some minutes
    python -m tests.benchmarks.peers --quick    # fewer trainings, every method timed once

The query is the contrastive loss of the validation split. Every method attributes it to the 1,492
training rows through the same two projections, fitted alike, over the same contrastive batches and
the same cached activations of what lies below. Measured, for each in a process of its own:

* *seconds* from the fitted parameters to the scores, the smallest of several processes, and the
  *peak memory*, of the process and beyond what it held when model and data were loaded. Imports and
  reading are not counted;
* *AUROC* of finding the misaligned rows, where a row whose removal is predicted to lower the loss
  most is the most suspicious;
* *LDS*, how well the true losses after training on random halves are foretold; see
  `tests.benchmarks.lds`. A half has half the batches: trained for as many *epochs* as the fit,
  it is trained half as long, and another fit is foretold than the one that all methods look at.
  So there is a second truth, with as many *steps*.

Ours runs at its defaults, and with small damping beside. The others have a damping to choose: the
best of several is given, separately for AUROC and LDS, and its name in brackets. It is chosen with
the truth in hand, which flatters them. The time is that of the first choice alone, which sees every
row in one batch; a choice with *6 partitions*, as many as ours averages over, takes longer. A tool
that is not installed is left out, with a line that says how to get it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp
from torch.nn.functional import normalize

from hf_ecif.config import InfluenceConfig
from hf_ecif.influence.model import InfluenceModel
from tests.benchmarks.heads import average_visits, heads_of, losses_at, partitions
from tests.benchmarks.lds import (
    CONFIG,
    Floats,
    Problem,
    Truth,
    lds,
    raw_features,
    read_problem,
    train_on_halves,
)
from tests.benchmarks.shared import RESULTS
from tests.benchmarks.tools import (
    OWN_DAMPING,
    Batched,
    Kronfluence,
    Variants,
    ek_fac,
    ek_fac_scores,
    is_installed,
    trak,
)

# Epochs of a training on half the rows.
TRUTHS = {"epochs": CONFIG.fit_epochs, "steps": 2 * CONFIG.fit_epochs}
JACOBIAN_ROWS = 64  # per-sample gradients that are taken at a time

Along = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""Products of per-sample gradients with a direction, of a function, where, and along what."""
Prepare = Callable[[Problem, Path], Callable[[], Variants]]
"""Imports and builds what is not timed; the second argument is a folder to write into. Of what the
function then yields, the first is timed."""


@dataclass(frozen=True)
class Method:
    """A way to score all rows for one query."""

    prepare: Prepare
    note: str
    module: str = ""  # that must be installed
    package: str = ""


@dataclass(frozen=True)
class Figures:
    """Of a method; the names are those of the variant that is best at it. LDS by `TRUTHS`."""

    method: str
    seconds: float
    cpu_seconds: float
    peak_mib: float
    beyond_load_mib: float
    auroc: float
    auroc_variant: str
    lds: dict[str, float]
    lds_error: dict[str, float]
    lds_variant: dict[str, str]
    variants: dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="10 halves, one seed, one timing")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--halves", type=int, default=100, help="random halves trained on")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each half")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each method")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--variants", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bars()
    if args.one:
        do_one(args.one[0], Path(args.one[1]), args)
        return
    if args.quick:
        args.halves, args.seeds, args.repeats = 10, 1, 1
    results, absent = [], {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        in_own_process("prepare", work, args)
        for name in args.methods:
            if METHODS[name].module and not is_installed(METHODS[name].module):
                absent[name] = f"not installed: pip install --no-deps {METHODS[name].package}"
                continue
            try:
                results.append(measure(name, work, args))
            except JobError as error:  # a tool that breaks does not keep us from the others
                print(error, file=sys.stderr)
                absent[name] = str(error).splitlines()[-1]
        facts = json.loads((work / "facts.json").read_text())
    report(results, absent, facts, args)


def report(
    results: list[Figures], absent: dict[str, str], facts: dict[str, Any], args: argparse.Namespace
) -> None:
    """Print, and write as JSON; ``absent`` says why a method is missing."""
    print_table(results, facts, args)
    for name, reason in absent.items():
        print(f"{name} was not run: {reason}")
    content = {
        "settings": {"threads": args.threads, "repeats": args.repeats, "halves": args.halves}
        | {"seeds of each half": args.seeds, "config": CONFIG.to_dict()},
        "machine": {"cpu": platform.processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "facts": facts,
        "results": [asdict(result) | {"note": METHODS[result.method].note} for result in results],
        "not run": absent,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")


# ----------------------------------------------------------------------------------- processes


class JobError(Exception):
    """A process came to grief; the message is the end of what it said."""


def in_own_process(
    job: str, work: Path, args: argparse.Namespace, *, variants: bool = True
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "USE_TF": "0"}
    options = ["--halves", str(args.halves), "--seeds", str(args.seeds)]
    options += ["--variants"] if variants else []
    command = [sys.executable, "-m", "tests.benchmarks.peers", "--one", job, str(work), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise JobError(f"{job} failed:\n{done.stderr[-4000:]}")


def do_one(job: str, work: Path, args: argparse.Namespace) -> None:
    """In this process: read, fit and train on halves, or run a method."""
    if job == "prepare":
        prepare(work, args.halves, args.seeds)
        return
    problem = Problem.load(work)
    problem.encoder()
    torch.manual_seed(CONFIG.seed)  # the other tools draw from the common generator
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        run = METHODS[job].prepare(problem, Path(scratch))
        before = peak_mib()
        start, cpu_start = time.perf_counter(), time.process_time()
        variants = run()
        name, scores = next(variants)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak = peak_mib()
        if args.variants:
            named = {name: scores, **dict(variants)}
            np.savez(work / "scores.npz", **{k: v.double().numpy() for k, v in named.items()})
    costs = {"seconds": seconds, "cpu": cpu_seconds, "peak": peak, "beyond": peak - before}
    (work / "costs.json").write_text(json.dumps(costs))


def prepare(work: Path, halves: int, seeds: int) -> None:
    """Write what all processes share, and the truth."""
    problem = read_problem()
    problem.save(work)
    torch.save((raw_features("train"), raw_features("validation")), work / "raw.pt")
    facts: dict[str, Any] = {
        "training rows": len(problem.train),
        "query rows": len(problem.query),
        "attributed parameters": len(problem.theta),
        "misaligned": float(problem.wrong.double().mean()),
    }
    for name, epochs in TRUTHS.items():
        truth = train_on_halves(problem, halves, seeds, epochs)
        np.savez(work / f"truth-{name}.npz", wrong=problem.wrong.numpy(), **vars(truth))
        noise = float(truth.losses.std(axis=1, ddof=1).mean()) if seeds > 1 else 0
        facts[f"same {name}"] = {
            "spread of the true losses": float(truth.mean.std()),
            "noise of a true loss": noise,
            "highest LDS that the noise allows": truth.reliability,
        }
    (work / "facts.json").write_text(json.dumps(facts))


def measure(name: str, work: Path, args: argparse.Namespace) -> Figures:
    costs = []
    for repeat in range(args.repeats):
        in_own_process(name, work, args, variants=repeat == 0)
        costs.append(json.loads((work / "costs.json").read_text()))
    saved = {truth: np.load(work / f"truth-{truth}.npz") for truth in TRUTHS}
    truths = {truth: Truth(of["kept"], of["losses"]) for truth, of in saved.items()}
    scores, wrong = dict(np.load(work / "scores.npz")), saved["epochs"]["wrong"]
    variants = {key: judge(value, wrong, truths) for key, value in scores.items()}
    detects = max(variants, key=lambda key: variants[key]["AUROC"])
    predicts = {
        truth: max(variants, key=lambda key: variants[key][f"LDS, {truth}"]) for truth in TRUTHS
    }
    return Figures(
        method=name,
        seconds=min(cost["seconds"] for cost in costs),
        cpu_seconds=min(cost["cpu"] for cost in costs),
        peak_mib=min(cost["peak"] for cost in costs),
        beyond_load_mib=min(cost["beyond"] for cost in costs),
        auroc=variants[detects]["AUROC"],
        auroc_variant=detects,
        lds={truth: variants[best][f"LDS, {truth}"] for truth, best in predicts.items()},
        lds_error={truth: variants[best][f"error, {truth}"] for truth, best in predicts.items()},
        lds_variant=predicts,
        variants=variants,
    )


def judge(scores: Floats, wrong: np.ndarray, truths: dict[str, Truth]) -> dict[str, float]:
    finite = bool(np.isfinite(scores).all())
    found = {"AUROC": float(roc_auc_score(wrong, -scores)) if finite else 0.0}
    for name, truth in truths.items():
        correlation, error = lds(scores, truth) if finite else (-1.0, 0.0)
        found |= {f"LDS, {name}": correlation, f"error, {name}": error}
    return found


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------------------------------- ours


def ours(problem: Problem, folder: Path, **settings: Any) -> Callable[[], Variants]:
    """The public way; with no epochs of its own, from the fit that is there already."""
    config = InfluenceConfig(probes=1, **settings)
    model = InfluenceModel(problem.model, problem.processor, config)
    model.encoder.load(problem.start if config.fit_epochs else problem.theta)
    model.encoder.freeze(problem.example)

    def run() -> Variants:
        yield "default", model.fit(problem.train, problem.query).scores().task

    return run


# ------------------------------------------------------------------------------------- EK-FAC


def ek_fac_cached(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """On the projections and the cached activations."""
    return partial(ek_fac_scores, ek_fac(problem, folder))


class Whole(nn.Module):
    """The whole model, which is run again in every pass."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        visual, textual = heads_of(problem.theta, problem)
        self.clip = problem.model
        self.clip.visual_projection.weight.data.copy_(visual)
        self.clip.text_projection.weight.data.copy_(textual)

    def forward(self, text: dict[str, Tensor], image: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised embeddings."""
        return (
            normalize(self.clip.get_text_features(**text).pooler_output, dim=1),
            normalize(self.clip.get_image_features(**image).pooler_output, dim=1),
        )


def ek_fac_whole(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """On the projections of the whole model, as a user would who caches nothing."""
    train, query = problem.train, problem.query
    raw, raw_query = torch.load(folder.parent / "raw.pt", weights_only=False)
    data = [
        Batched(raw.text, raw.image, train.same_text, torch.cat(problem.batches)),
        Batched(raw_query.text, raw_query.image, query.same_text, torch.cat(problem.query_batches)),
    ]
    names = ["clip.visual_projection", "clip.text_projection"]
    tool = Kronfluence(problem, Whole(problem), names, data, folder)

    def run() -> Variants:
        tool.fit()
        yield OWN_DAMPING, tool.score(None)

    return run


# ---------------------------------------------------------------------------- TracIn, baselines


def tracin(problem: Problem, folder: Path, along: Along) -> Callable[[], Variants]:
    """At checkpoints of the fit; the first choice with ``along``, the rest in the fastest way."""

    def run() -> Variants:
        every, last = problem.checkpoints, problem.checkpoints[-1:]
        yield "1 partition", tracin_scores(problem, problem.batches, every, along)
        yield "last checkpoint", tracin_scores(problem, problem.batches, last, by_forward_mode)
        more = partitions(problem, CONFIG.partitions)
        yield "6 partitions", tracin_scores(problem, more, every, by_forward_mode)
        yield (
            "last checkpoint, 6 partitions",
            tracin_scores(problem, more, last, by_forward_mode),
        )

    return run


def tracin_scores(
    problem: Problem,
    batches: list[Tensor],
    checkpoints: list[tuple[float, Tensor]],
    along: Along,
) -> Tensor:
    """``sum_t lr_t <grad F, grad of the pair's own terms>``: not to have trained on it.

    A pair's gradient is that of its own two terms in the loss of its batch. It leaves out what the
    pair does in the terms of others.
    """
    scale = float(problem.model.logit_scale.exp())

    def query_loss(theta: Tensor) -> Tensor:
        of_batch = partial(losses_at, rows=problem.query, problem=problem, scale=scale)
        parts = [of_batch(theta, batch).mean() for batch in problem.query_batches]
        return torch.stack(parts).mean()

    total = torch.zeros(len(torch.cat(batches)))
    for rate, theta in checkpoints:
        slope = grad(query_loss)(theta)
        products = []
        for batch in batches:
            own = partial(losses_at, batch=batch, rows=problem.train, problem=problem, scale=scale)
            products.append(along(own, theta, slope))
        total += rate * torch.cat(products).detach()
    return average_visits(batches, total, len(problem.train))


def by_gradients(own: Callable[[Tensor], Tensor], theta: Tensor, slope: Tensor) -> Tensor:
    """The gradient of every pair, ``(B, P)``, then the products: what users of TracIn do."""
    return jacrev(own, chunk_size=JACOBIAN_ROWS)(theta) @ slope


def by_forward_mode(own: Callable[[Tensor], Tensor], theta: Tensor, slope: Tensor) -> Tensor:
    """The same products without any pair's gradient, which one query allows."""
    return jvp(own, (theta,), (slope,))[1]


def neg_clip_loss(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """The pair's own loss at the fitted parameters: the higher, the more suspicious."""
    scale = float(problem.model.logit_scale.exp())

    def run() -> Variants:
        batches = partitions(problem, CONFIG.partitions)
        losses = [losses_at(problem.theta, b, problem.train, problem, scale) for b in batches]
        yield "default", -average_visits(batches, torch.cat(losses), len(problem.train))

    return run


METHODS = {
    "ours": Method(
        partial(ours, fit_epochs=0),
        "fit(...) with no epochs, then score(...); one probe",
    ),
    "ours, unrolled": Method(
        partial(ours, response="unrolled"),
        "response='unrolled', no damping; the fit of ten epochs is in its time",
    ),
    "ours, damping 0.01": Method(
        partial(ours, fit_epochs=0, damping=0.01),
        "the same; the solve does not reach its tolerance",
    ),
    "EK-FAC": Method(
        ek_fac_cached,
        "kronfluence; a pair's gradient is that of the whole batch's loss through its own "
        "embeddings, so it mixes the pair's roles",
        "kronfluence",
        "kronfluence",
    ),
    "EK-FAC, whole model": Method(
        ek_fac_whole,
        "the same at its own damping alone, the frozen part run again in every pass, not cached",
        "kronfluence",
        "kronfluence",
    ),
    "TRAK": Method(
        trak,
        "traker's output function for CLIP, one checkpoint, projected on the CPU",
        "trak",
        "traker",
    ),
    "TracIn": Method(
        partial(tracin, along=by_gradients),
        "five checkpoints, weighted by learning rate; the gradient of each pair's own terms",
    ),
    "TracIn, by jvp": Method(
        partial(tracin, along=by_forward_mode),
        "the same scores without per-sample gradients, by the forward mode that our pass rests on",
    ),
    "NegCLIPLoss": Method(
        neg_clip_loss, "no influence: the loss itself, for reference; it knows nothing of the query"
    ),
}


# --------------------------------------------------------------------------------------- output


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("hf_ecif", "torch", "transformers", "kronfluence", "traker"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def print_table(results: list[Figures], facts: dict[str, Any], args: argparse.Namespace) -> None:
    title = (
        f"{facts['training rows']:,} rows, one query, {facts['attributed parameters']:,} "
        f"parameters, {args.threads} thread(s); LDS over {args.halves} halves"
    )
    table = Table(
        "method",
        "seconds",
        "CPU s",
        "peak MiB",
        "beyond load",
        "AUROC",
        *(f"LDS, same {truth}" for truth in TRUTHS),
        title=title,
    )
    for result in results:
        table.add_row(
            result.method,
            f"{result.seconds:.2f}",
            f"{result.cpu_seconds:.2f}",
            f"{result.peak_mib:.0f}",
            f"{result.beyond_load_mib:.0f}",
            f"{result.auroc:.3f} ({result.auroc_variant})",
            *(
                f"{result.lds[t]:.2f} ± {result.lds_error[t]:.2f} ({result.lds_variant[t]})"
                for t in TRUTHS
            ),
        )
    console = Console(width=170)
    console.print(table)
    for result in results:
        console.print(f"{result.method}: {METHODS[result.method].note}.", highlight=False)


if __name__ == "__main__":
    main()
