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
  `tests.benchmarks.lds`.

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
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
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
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import Dataset

from hf_ecif.config import InfluenceConfig
from hf_ecif.features import Rows
from hf_ecif.influence import InfluenceModel
from hf_ecif.operators import random_batches
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

DAMPINGS = (0.01, 1.0, 10.0, 30.0, 100.0, 1000.0)  # of EK-FAC, in units of its mean eigenvalue
RIDGES = (0.1, 1.0, 10.0, 100.0)  # of TRAK, in units of the mean diagonal of its matrix
TRAK_DIMENSIONS = (512, 2048)
JACOBIAN_ROWS = 64  # per-sample gradients that are taken at a time

Variants = Iterator[tuple[str, Tensor]]
"""Names and scores: the predicted change of the query without a row. The first is timed."""
Along = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""Products of per-sample gradients with a direction, of a function, where, and along what."""
Prepare = Callable[[Problem, Path], Callable[[], Variants]]
"""Imports and builds what is not timed; the second argument is a folder to write into."""


@dataclass(frozen=True)
class Method:
    """A way to score all rows for one query."""

    prepare: Prepare
    note: str
    module: str = ""  # that must be installed
    package: str = ""


@dataclass(frozen=True)
class Figures:
    """Of a method; the names are those of the variant that is best at it."""

    method: str
    seconds: float
    cpu_seconds: float
    peak_mib: float
    beyond_load_mib: float
    auroc: float
    auroc_variant: str
    lds: float
    lds_error: float
    lds_variant: str
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
            if not is_installed(METHODS[name]):
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
    truth = train_on_halves(problem, halves, seeds)
    np.savez(work / "truth.npz", wrong=problem.wrong.numpy(), **vars(truth))
    facts = {
        "training rows": len(problem.train),
        "query rows": len(problem.query),
        "attributed parameters": len(problem.theta),
        "misaligned": float(problem.wrong.double().mean()),
        "spread of the true losses": float(truth.mean.std()),
        "noise of a true loss": float(truth.losses.std(axis=1, ddof=1).mean()) if seeds > 1 else 0,
        "highest LDS that the noise allows": truth.reliability,
    }
    (work / "facts.json").write_text(json.dumps(facts))


def measure(name: str, work: Path, args: argparse.Namespace) -> Figures:
    costs = []
    for repeat in range(args.repeats):
        in_own_process(name, work, args, variants=repeat == 0)
        costs.append(json.loads((work / "costs.json").read_text()))
    saved = np.load(work / "truth.npz")
    truth = Truth(saved["kept"], saved["losses"])
    scores = dict(np.load(work / "scores.npz"))
    variants = {key: judge(value, saved["wrong"], truth) for key, value in scores.items()}
    detects = max(variants, key=lambda key: variants[key]["AUROC"])
    predicts = max(variants, key=lambda key: variants[key]["LDS"])
    return Figures(
        method=name,
        seconds=min(cost["seconds"] for cost in costs),
        cpu_seconds=min(cost["cpu"] for cost in costs),
        peak_mib=min(cost["peak"] for cost in costs),
        beyond_load_mib=min(cost["beyond"] for cost in costs),
        auroc=variants[detects]["AUROC"],
        auroc_variant=detects,
        lds=variants[predicts]["LDS"],
        lds_error=variants[predicts]["error"],
        lds_variant=predicts,
        variants=variants,
    )


def judge(scores: Floats, wrong: np.ndarray, truth: Truth) -> dict[str, float]:
    if not np.isfinite(scores).all():
        return {"AUROC": 0.0, "LDS": -1.0, "error": 0.0}
    correlation, error = lds(scores, truth)
    auroc = float(roc_auc_score(wrong, -scores))
    return {"AUROC": auroc, "LDS": correlation, "error": error}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ----------------------------------------------------------------------- the loss, written out


def logits_of(text: Tensor, image: Tensor, scale: float, same: Tensor) -> Tensor:
    """Pairs of a batch with equal captions are not told apart, as in ours."""
    repeated = (same[:, None] == same) & ~torch.eye(len(same), dtype=torch.bool)
    return (scale * text @ image.T).masked_fill(repeated, -torch.inf)


def pair_losses(logits: Tensor, labels: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """``(B,)``, whose mean is CLIP's loss; the labels of both ways are the pairs' own if absent."""
    images, texts = labels or (torch.arange(len(logits)),) * 2
    to_image = cross_entropy(logits, images, reduction="none")
    to_text = cross_entropy(logits.T, texts, reduction="none")
    return (to_image + to_text) / 2


def heads_of(theta: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Matrices of the visual and the textual projection."""
    model = problem.model
    shapes = [model.visual_projection.weight.shape, model.text_projection.weight.shape]
    visual, textual = theta.split([shape.numel() for shape in shapes])
    return visual.view(shapes[0]), textual.view(shapes[1])


def losses_at(theta: Tensor, batch: Tensor, rows: Rows, problem: Problem, scale: float) -> Tensor:
    """`pair_losses` of a contrastive batch as a function of the flat parameters."""
    visual, textual = heads_of(theta, problem)
    text = normalize(rows.features.text["hidden"][batch] @ textual.T, dim=1)
    image = normalize(rows.features.image["hidden"][batch] @ visual.T, dim=1)
    return pair_losses(logits_of(text, image, scale, rows.same_text[batch]))


def partitions(problem: Problem, count: int) -> list[Tensor]:
    """The training batches, and those of as many random partitions as ours averages over."""
    generator = torch.Generator().manual_seed(CONFIG.seed + 1)
    more = [
        batch
        for _ in range(count - 1)
        for batch in random_batches(len(problem.train), CONFIG.batch_size, generator)
    ]
    return [*problem.batches, *more]


def average_visits(batches: list[Tensor], values: Tensor, count: int) -> Tensor:
    """Mean over the visits of each row, from values in the order of the batches."""
    rows = torch.cat(batches)
    total = torch.zeros(count).index_add_(0, rows, values.float())
    return total / torch.bincount(rows, minlength=count)


# ---------------------------------------------------------------------------------------- ours


def ours(problem: Problem, folder: Path, damping: float) -> Callable[[], Variants]:
    """The public way, but that the fit is done already."""
    config = InfluenceConfig(damping=damping, fit_epochs=0, probes=1)
    model = InfluenceModel(problem.model, problem.processor, config)
    model.encoder.load(problem.theta)
    model.encoder.freeze(problem.example)

    def run() -> Variants:
        model.fit(problem.train, problem.query)
        yield "default", model.score(problem.train).task

    return run


def ours_unrolled(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """The same through the steps of the fit, which is done again for it, and timed, too."""
    config = InfluenceConfig(response="unrolled", probes=1)
    model = InfluenceModel(problem.model, problem.processor, config)
    model.encoder.load(problem.start)
    model.encoder.freeze(problem.example)

    def run() -> Variants:
        model.fit(problem.train, problem.query)
        yield "default", model.score(problem.train).task

    return run


# ------------------------------------------------------------------------------ EK-FAC, kronfluence


class Heads(nn.Module):
    """The two projections as layers; as the other tools look for them."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        for name, weight in zip(("visual", "text"), heads_of(problem.theta, problem), strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data.copy_(weight)
            self.add_module(f"{name}_projection", layer)

    def forward(self, text: dict[str, Tensor], image: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised embeddings."""
        embedded = self.text_projection(text["hidden"]), self.visual_projection(image["hidden"])
        return normalize(embedded[0], dim=1), normalize(embedded[1], dim=1)


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


class Batched(Dataset):
    """Rows in the order of contrastive batches, so that a loader without shuffling makes these."""

    def __init__(
        self, text: dict[str, Tensor], image: dict[str, Tensor], same: Tensor, order: Tensor
    ) -> None:
        self.text, self.image, self.same, self.order = text, image, same, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.order[position]
        return {
            "text": {key: value[row] for key, value in self.text.items()},
            "image": {key: value[row] for key, value in self.image.items()},
            "same": self.same[row],
        }


def ek_fac(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """On the projections and the cached activations."""
    train, query = problem.train, problem.query
    data = [
        Batched(rows.features.text, rows.features.image, rows.same_text, torch.cat(batches))
        for rows, batches in (
            (train, problem.batches),
            (query, problem.query_batches),
            (train, partitions(problem, CONFIG.partitions)),
        )
    ]
    names = ["visual_projection", "text_projection"]
    return partial(ek_fac_scores, Kronfluence(problem, Heads(problem), names, data, folder))


def ek_fac_whole(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """On the projections of the whole model, as a user would who caches nothing."""
    train, query = problem.train, problem.query
    raw, raw_query = torch.load(folder.parent / "raw.pt", weights_only=False)
    data = [
        Batched(raw.text, raw.image, train.same_text, torch.cat(problem.batches)),
        Batched(raw_query.text, raw_query.image, query.same_text, torch.cat(problem.query_batches)),
    ]
    names = ["clip.visual_projection", "clip.text_projection"]
    return partial(ek_fac_scores, Kronfluence(problem, Whole(problem), names, data, folder))


def ek_fac_scores(tool: Kronfluence) -> Variants:
    """By the tool's own damping, a tenth of a layer's mean eigenvalue, then by others."""
    tool.fit()
    yield "0.1, by layer", tool.score(None)
    if len(tool.data) == 2:
        return
    yield "1e-8, absolute", tool.score(1e-8)
    mean = tool.mean_eigenvalue()
    for relative in DAMPINGS:
        yield f"{relative:g}", tool.score(relative * mean)
        yield f"{relative:g}, 6 partitions", tool.score(relative * mean, more=True)


class Kronfluence:
    """The library, with the batch's loss for its per-sample loss.

    It differentiates the sum of the batch's pair losses by what each row's projections put out.
    So a row's gradient holds its own terms and its share, through its embeddings, in those of all
    others; it is not that of the row's terms, nor of the row's removal.
    """

    def __init__(
        self,
        problem: Problem,
        model: nn.Module,
        names: list[str],
        data: list[Batched],
        folder: Path,
    ) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model

        scale = float(problem.model.logit_scale.exp())
        task = kronfluence_task(names, scale, len(problem.query_batches))
        self.problem, self.data = problem, data
        self.analyzer = Analyzer(
            "peers",
            prepare_model(model, task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(folder),
        )
        self.scored = 0

    def fit(self) -> None:
        """Covariances, their eigenvectors, and the eigenvalues."""
        self.analyzer.fit_all_factors("factors", self.data[0], CONFIG.batch_size)

    def mean_eigenvalue(self) -> float:
        """Over both layers."""
        factors = self.analyzer.load_lambda_matrices("factors")
        counts = factors["num_lambda_processed"]
        sums = [matrix.sum() / counts[name] for name, matrix in factors["lambda_matrix"].items()]
        return float(sum(sums) / len(self.problem.theta))

    def score(self, damping: float | None, *, more: bool = False) -> Tensor:
        """Predicted change of the query without each row."""
        from kronfluence.arguments import ScoreArguments

        self.scored += 1
        batches = partitions(self.problem, CONFIG.partitions if more else 1)
        self.analyzer.compute_pairwise_scores(
            f"scores{self.scored}",
            "factors",
            self.data[1],
            self.data[2 if more else 0],
            per_device_query_batch_size=len(self.problem.query_batches[0]),
            per_device_train_batch_size=CONFIG.batch_size,
            score_args=ScoreArguments(damping_factor=damping, aggregate_query_gradients=True),
        )
        # Up-weighting a row lowers the loss by the score over N, so its removal raises it by that.
        values = self.analyzer.load_pairwise_scores(f"scores{self.scored}")["all_modules"][0]
        count = len(self.problem.train)
        return average_visits(batches, values, count) / count


def kronfluence_task(names: list[str], scale: float, query_batches: int) -> Any:
    """CLIP's loss in the terms of the library; the true Fisher draws the partner of every row."""
    from kronfluence.task import Task

    class Contrastive(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = logits_of(*model(batch["text"], batch["image"]), scale, batch["same"])
            if not sample:
                return pair_losses(logits).sum()
            with torch.no_grad():
                drawn = tuple(s.softmax(dim=1).multinomial(1)[:, 0] for s in (logits, logits.T))
            return pair_losses(logits, drawn).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            logits = logits_of(*model(batch["text"], batch["image"]), scale, batch["same"])
            return pair_losses(logits).mean() / query_batches

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    return Contrastive()


# ------------------------------------------------------------------------------- TRAK, traker


class Clip(nn.Module):
    """The heads as open_clip has them, which the library's CLIP output asks for.

    Args:
        share: the power of the inverse temperature that is multiplied into each embedding. The
            library's output function knows no temperature; a half each puts it there.
    """

    def __init__(self, problem: Problem, share: float) -> None:
        super().__init__()
        self.heads = Heads(problem)
        scale = problem.model.logit_scale.exp().item()
        self.factor, self.temperature = scale**share, scale ** (1 - 2 * share)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, float]:
        """Embeddings of images and texts, and what still multiplies their products."""
        texts, images = self.heads({"hidden": text}, {"hidden": image})
        return self.factor * images, self.factor * texts, self.temperature


def trak(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """One checkpoint, the fitted one, and the library's output function for CLIP."""
    from trak import TRAKer

    def scores(number: int, ridge: float, dimension: int, share: float) -> tuple[Tensor, float]:
        tool = trak_task()
        model = Clip(problem, share).requires_grad_(True)
        traker = TRAKer(
            model,
            tool,
            len(problem.train),
            save_dir=str(folder / str(number)),
            device="cpu",
            proj_dim=dimension,
            use_half_precision=False,
            lambda_reg=ridge,
            logging_level=40,
        )
        return trak_scores(traker, model, tool, problem)

    def run() -> Variants:
        number = 0
        for share, temperature in ((0.0, "as shipped"), (0.5, "with temperature")):
            number += 1
            plain, diagonal = scores(number, 0.0, TRAK_DIMENSIONS[0], share)
            yield f"{temperature}, {TRAK_DIMENSIONS[0]}, ridge 0", plain
            for dimension, ridge in product(TRAK_DIMENSIONS, RIDGES):
                number += 1
                name = f"{temperature}, {dimension}, ridge {ridge:g}"
                yield name, scores(number, ridge * diagonal, dimension, share)[0]

    return run


def trak_task() -> Any:
    from trak.modelout_functions import CLIPModelOutput

    class Output(CLIPModelOutput):
        def get_out_to_loss_grad(self, *args: Any) -> Tensor:
            return super().get_out_to_loss_grad(*args)[:, None]  # a column, as the store has it

    return Output(simulated_batch_size=CONFIG.batch_size)


def trak_scores(traker: Any, model: nn.Module, task: Any, problem: Problem) -> tuple[Tensor, float]:
    """Predicted change of the query, and the mean diagonal of the library's matrix."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with redirect_stderr(open(os.devnull, "w")), redirect_stdout(open(os.devnull, "w")):
        contrast_with(task, model, problem.train)
        traker.load_checkpoint(state, model_id=0)
        for rows in torch.arange(len(problem.train)).split(CONFIG.batch_size):
            traker.featurize(inputs_of(problem.train, rows), inds=rows.numpy())
        diagonal = float(np.square(traker.saver.current_store["grads"]).sum(axis=0).mean())
        traker.finalize_features()
        contrast_with(task, model, problem.query)
        traker.start_scoring_checkpoint("query", state, 0, num_targets=len(problem.query))
        for rows in torch.arange(len(problem.query)).split(CONFIG.batch_size):
            traker.score(inputs_of(problem.query, rows), inds=rows.numpy())
        scores = torch.tensor(np.array(traker.finalize_scores("query")))
    # A row's score is what it adds to the output of a query pair; the loss falls with the output
    # by one less the pair's probability.
    weights = query_weights(task, model, problem)
    return scores @ weights, diagonal


def contrast_with(task: Any, model: nn.Module, rows: Rows) -> None:
    """What `get_embeddings` of the library does, which insists on CUDA."""
    kind = type(task).__mro__[1]
    with torch.no_grad():
        image, text, _ = model(rows.features.image["hidden"], rows.features.text["hidden"])
    kind.image_embeddings, kind.text_embeddings = image, text
    kind.num_computed_embeddings = len(rows)
    kind.sim_batch_size = min(CONFIG.batch_size, len(rows))


def inputs_of(rows: Rows, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Images, then texts."""
    return rows.features.image["hidden"][chosen], rows.features.text["hidden"][chosen]


def query_weights(task: Any, model: nn.Module, problem: Problem) -> Tensor:
    """By how much the mean loss falls with the output of each query pair."""
    parts = [
        task.get_out_to_loss_grad(model, dict(model.named_parameters()), {}, inputs)[:, 0]
        for inputs in (inputs_of(problem.query, batch) for batch in problem.query_batches)
    ]
    return average_visits(problem.query_batches, torch.cat(parts), len(problem.query)) / len(
        problem.query
    )


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
        partial(ours, damping=InfluenceConfig().damping),
        "fit(...) with no epochs, then score(...); one probe",
    ),
    "ours, unrolled": Method(
        ours_unrolled, "response='unrolled', no damping; the fit of ten epochs is in its time"
    ),
    "ours, damping 0.01": Method(
        partial(ours, damping=0.01), "the same; the solve does not reach its tolerance"
    ),
    "EK-FAC": Method(
        ek_fac,
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


def is_installed(method: Method) -> bool:
    return not method.module or find_spec(method.module) is not None


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
    highest = facts["highest LDS that the noise allows"]
    title += "" if highest is None else f", at most {highest:.2f}"
    table = Table(
        "method", "seconds", "CPU s", "peak MiB", "beyond load", "AUROC", "LDS", title=title
    )
    for result in results:
        table.add_row(
            result.method,
            f"{result.seconds:.2f}",
            f"{result.cpu_seconds:.2f}",
            f"{result.peak_mib:.0f}",
            f"{result.beyond_load_mib:.0f}",
            f"{result.auroc:.3f} ({result.auroc_variant})",
            f"{result.lds:.2f} ± {result.lds_error:.2f} ({result.lds_variant})",
        )
    console = Console(width=150)
    console.print(table)
    for result in results:
        console.print(f"{result.method}: {METHODS[result.method].note}.", highlight=False)


if __name__ == "__main__":
    main()
