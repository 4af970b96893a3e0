"""What an audit costs over plainly embedding the same rows, and what else that time would buy.

    pip install cleanlab datasets; pip install --no-deps kronfluence    # optional, for two columns
    python -m tests.benchmarks.audit_cost                 # those cases that take minutes on a core
    python -m tests.benchmarks.audit_cost --only 32,000   # cases whose name matches this
    python -m tests.benchmarks.audit_cost --quick         # 300 rows of the demo

A *case* is a model and a number of rows, in a process of its own, with one thread on a CPU:

* *demo*: the embedded model and its training rows. More rows are these again, each image with noise
  of its own and each caption with a number, so that none is another's copy.
* *ViT-B/32*: a CLIP of that size with random weights, on the same rows at 224 pixels. What it
  finds is worth nothing; what it costs is what a trained one costs.

*Embedding* is what `InfluenceModel.read` and `embed_as_given` do: decode, tokenise, both towers.
It is run before and after the audit, in the same process, and the *ratio* is that of the audit to
the mean of the two. *Seconds* are of the processor, where the clock would count what else the
machine does, and of the clock on a GPU. *Memory* is the peak of the process during the audit, above
what it held once it had embedded.

Beside it, on the same embeddings, each with the embedding's own seconds:

* *CLIPScore*, the cosine of each pair;
* *LEMoN* (its fixed variant), with faiss for its neighbours;
* *Datalab* of cleanlab: outliers and near duplicates among image embeddings;
* *EK-FAC* of kronfluence: scores of all rows for one query, on cached activations.

A tool that is not installed is left out. Finished cases are kept in the record, a run adds to it.
Ten lines of a profile show where the audit's time goes. On a GPU the model is in bfloat16, and the
share of its peak is that of a plain product of large matrices there.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import AutoProcessor, CLIPConfig, CLIPModel

from hf_ecif.applications.audit import audit
from hf_ecif.data.loading import load_rows
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.progress import silent
from tests.benchmarks.lds import pose
from tests.benchmarks.shared import (
    DEMO,
    as_markdown,
    parser,
    print_table,
    save,
    write_page,
)
from tests.benchmarks.signals import Lemon
from tests.benchmarks.tools import OWN_DAMPING, ek_fac, ek_fac_scores, is_installed

ON_GPU = torch.cuda.is_available()
QUERY_ROWS = 200
PROFILED = 2000  # rows up to which a second audit is profiled
LONGEST = 10  # lines of a profile
FAISS_CELLS = 20_000  # rows from which LEMoN's neighbours are looked for in cells
STAGES = ("load", "embed", "fit", "score", "detect", "compare")


@dataclass(frozen=True)
class Case:
    """A model and a number of rows.

    Attributes:
        size: demo, or ViT-B/32.
        rows: to be audited.
        by_default: whether it runs without being named.
    """

    size: str
    rows: int
    by_default: bool = True

    @property
    def name(self) -> str:
        return f"{self.size}, {self.rows:,} rows"


CASES = (
    Case("demo", 1492),
    Case("ViT-B/32", 128, by_default=False),
    Case("ViT-B/32", 512, by_default=ON_GPU),
    Case("ViT-B/32", 5000, by_default=ON_GPU),
    Case("demo", 8000),
    Case("demo", 32_000, by_default=ON_GPU),
    Case("demo", 1_000_000, by_default=False),
)
QUICK = (Case("demo", 300),)


def main() -> None:
    options = parser(__doc__, "audit_cost")
    options.add_argument("--only", help="cases whose name matches this regex")
    options.add_argument("--case", help="run this one here, and print its figures as JSON")
    args = options.parse_args()
    every = {case.name: case for case in (*CASES, *QUICK)}
    if args.case:
        print(json.dumps(measure(every[args.case])))
        return
    known = json.loads(args.output.read_text())["results"] if args.output.exists() else {}
    chosen = QUICK if args.quick else CASES
    todo = [c for c in chosen if (re.search(args.only, c.name) if args.only else c.by_default)]
    for case in chosen if args.quick else todo:
        Console(stderr=True).print(f"{case.name} ...")
        known[case.name] = _apart(case)
        results = {name: known[name] for name in every if name in known}
        save(args.output, {"cases": [asdict(case) for case in CASES]}, results)
        report(args.output, results)


def _apart(case: Case) -> dict[str, Any]:
    """Figures from a process of its own, since memory that was once used stays with a process."""
    command = [sys.executable, "-m", "tests.benchmarks.audit_cost", "--case", case.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------- the measurement


def measure(case: Case) -> dict[str, Any]:
    """Seconds, memory, stages and the longest lines of a case, and seconds of other methods."""
    disable_progress_bars()
    if not ON_GPU:
        torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        data = make_rows(case.rows, Path(folder))
        query = load_rows(str(DEMO / "data"), "validation").select(range(QUERY_ROWS))
        model = load(case.size)
        embed(model, data.select(range(min(64, case.rows))))  # what is loaded late is loaded
        before, (rows, embeddings) = seconds(lambda: embed(model, data))
        held = peak_mib()
        whole, found = seconds(lambda: audit(load(case.size), data, query, progress=silent))
        peak = peak_mib()
        after, _ = seconds(lambda: embed(model, data))
        plain = (before + after) / 2
        others = dict(_others(model, rows, embeddings, query, case))
        return {
            "embedding": [before, after],
            "audit": whole,
            "ratio": whole / plain,
            "stages": {name: found.summary.seconds.get(name, 0.0) for name in STAGES},
            "memory_mib": max(0.0, peak - held),
            "rows_per_second": case.rows / plain,
            "others": {name: plain + own for name, own in others.items()},
            "longest": _longest(case, data, query) if case.rows <= PROFILED else [],
            "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
            "share_of_peak": _share_of_peak(model, rows, plain) if ON_GPU else None,
        }


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Of the processor; of the clock, with a GPU."""
    clock = time.perf_counter if ON_GPU else time.process_time
    start = clock()
    result = run()
    if ON_GPU:
        torch.cuda.synchronize()
    return clock() - start, result


def peak_mib() -> float:
    """Largest memory that this process has held so far, on the GPU where it works there."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def embed(model: InfluenceModel, data: Dataset) -> tuple[Rows, Embeddings]:
    """What everybody has to do who looks at the rows with this model."""
    rows = model.read(data)
    return rows, model.embed_as_given(rows)


def load(size: str) -> InfluenceModel:
    """A model of a size, on the GPU in bfloat16 if there is one."""
    options = {"device": "cuda", "dtype": "bfloat16"} if ON_GPU else {}
    if size == "demo":
        return InfluenceModel.from_pretrained(DEMO / "model", **options)
    processor = AutoProcessor.from_pretrained(DEMO / "model")
    processor.image_processor.size = {"shortest_edge": 224}
    processor.image_processor.crop_size = {"height": 224, "width": 224}
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(text_config=text))  # ViT-B/32 is what is not said otherwise
    if ON_GPU:
        network = network.to("cuda", torch.bfloat16)
    return InfluenceModel(network, processor)


def make_rows(count: int, folder: Path) -> Dataset:
    """The demo's training rows, as often as it takes, none a copy of another."""
    given = load_rows(str(DEMO / "data"), "train").select_columns(["image", "text"])
    if count <= len(given):
        return given.select(range(count))
    pixels = [np.asarray(row["image"].convert("RGB"), dtype=np.int16) for row in given]
    texts = given["text"][:]

    def rows() -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(0)
        for number in range(count):
            image, turn = pixels[number % len(pixels)], number // len(pixels)
            noise = random.integers(-40, 41, image.shape) if turn else 0
            buffer = BytesIO()
            Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
            caption = texts[number % len(texts)] + (f", number {turn}" if turn else "")
            yield {"image": {"bytes": buffer.getvalue(), "path": None}, "text": caption}

    return Dataset.from_generator(rows, features=given.features, cache_dir=str(folder))


def _longest(case: Case, data: Dataset, query: Dataset) -> list[str]:
    """The functions that an audit spends most in, without what they call."""
    profile = cProfile.Profile(time.perf_counter if ON_GPU else time.process_time)
    profile.runcall(audit, load(case.size), data, query, progress=silent)
    table = pstats.Stats(profile).sort_stats("tottime")
    total = table.total_tt  # type: ignore[attr-defined]
    lines = []
    for key in table.fcn_list[:LONGEST]:  # type: ignore[attr-defined]
        file, line, name = key
        own = table.stats[key][2]  # type: ignore[attr-defined]
        where = name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
        lines.append(f"{own / total:.1%} {where}")
    return lines


def _share_of_peak(model: InfluenceModel, rows: Rows, plain: float) -> float:
    """Operations of the towers in a second, over those of a product of large matrices."""
    from torch.utils.flop_counter import FlopCounterMode

    few = rows.select(torch.arange(min(64, len(rows))))
    with FlopCounterMode(display=False) as counted:
        embed(model, load_rows(str(DEMO / "data"), "train").select(range(len(few))))
    large = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    taken = min(seconds(lambda: large @ large)[0] for _ in range(5))
    reached = counted.get_total_flops() / len(few) * len(rows) / plain
    return reached / (2 * 8192**3 / taken)


# -------------------------------------------------------------------------------- other methods


def _others(
    model: InfluenceModel, rows: Rows, embeddings: Embeddings, query: Dataset, case: Case
) -> Iterator[tuple[str, float]]:
    """Names and seconds, without the embedding's."""
    text, image = (side.float().cpu() for side in embeddings[:2])
    yield "CLIPScore", seconds(lambda: (text * image).sum(dim=1))[0]
    if is_installed("faiss"):
        yield "LEMoN", seconds(lambda: lemon_by_faiss(text, image, Lemon()))[0]
    if is_installed("cleanlab"):
        yield "Datalab", seconds(lambda: _datalab(image))[0]
    if is_installed("kronfluence") and case.size == "demo" and not ON_GPU:
        yield "EK-FAC", _seconds_of_ek_fac(model, rows, query)


def lemon_by_faiss(text: Tensor, image: Tensor, one: Lemon) -> Tensor:
    """As `tests.benchmarks.signals.lemon`, with neighbours by faiss: in cells where rows are many.

    Args:
        text: ``(N, d)``, normalised.
        image: ``(N, d)``, normalised.
        one: settings.
    """
    mismatch = 1 - (text * image).sum(dim=1)

    def average(anchors: Tensor, others: Tensor) -> Tensor:
        cosines, near = _search(anchors.numpy(), one.neighbours + 1)
        own = near == np.arange(len(near))[:, None]
        distance = torch.from_numpy(np.where(own, np.inf, 1 - cosines))
        order = distance.argsort(dim=1)[:, : one.neighbours]
        distance, rows = distance.gather(1, order), torch.from_numpy(near).gather(1, order)
        apart = 1 - (others[:, None] * others[rows]).sum(dim=2)
        return (apart * (-one.tau1 * distance - one.tau2 * mismatch[rows]).exp()).mean(dim=1)

    return mismatch + one.beta * average(image, text) + one.gamma * average(text, image)


def _search(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    if len(vectors) > FAISS_CELLS:
        centroids = int(len(vectors) ** 0.5)
        index = faiss.IndexIVFFlat(index, vectors.shape[1], centroids, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.nprobe = 16
    index.add(vectors)
    return index.search(vectors, count)


def _datalab(image: Tensor) -> None:
    from cleanlab import Datalab

    lab = Datalab(data={"row": list(range(len(image)))}, verbosity=0)
    lab.find_issues(features=image.numpy(), issue_types={"outlier": {}, "near_duplicate": {}})


def _seconds_of_ek_fac(model: InfluenceModel, rows: Rows, query: Dataset) -> float:
    """Of factors and scores; the fit of the projections, which ours has to do as well, is not."""
    problem = pose(model, rows, model.read(query), torch.zeros(len(rows), dtype=torch.bool))
    with TemporaryDirectory() as folder:
        tool = ek_fac(problem, Path(folder))
        taken, (name, _) = seconds(lambda: next(ek_fac_scores(tool)))
    assert name == OWN_DAMPING
    return taken


# ------------------------------------------------------------------------------------ the report

OTHERS = ("CLIPScore", "LEMoN", "Datalab", "EK-FAC")
HEADING = ("case", "embedding", "audit", "ratio", "memory", *OTHERS)


def report(path: Path, results: dict[str, Any]) -> None:
    """Print, write and draw what was measured."""
    rows = [_line(name, found) for name, found in results.items()]
    absent = [[case.name, "not run"] + [""] * 7 for case in CASES if case.name not in results]
    table = [*rows, *(absent if path.stem == "audit_cost" else [])]
    print_table("Seconds of an audit, and of other methods", HEADING, table)
    draw(path, results)
    longest = [
        f"Where an audit of {name} spends its time, function by function:\n\n"
        + "\n".join(f"* {line}" for line in found["longest"])
        for name, found in results.items()
        if found["longest"]
    ]
    write_page(path, "What an audit costs", [NOTE, as_markdown(HEADING, table), *longest])


def _line(name: str, found: dict[str, Any]) -> list[str]:
    others = [found["others"].get(other) for other in OTHERS]
    return [
        name,
        " and ".join(f"{one:.1f} s" for one in found["embedding"]),
        f"{found['audit']:.1f} s",
        f"{found['ratio']:.2f}",
        f"{found['memory_mib']:.0f} MiB",
        *("-" if one is None else f"{one:.1f} s" for one in others),
    ]


NOTE = (
    "Processor seconds of one thread (of the clock on a GPU). *Embedding* was measured before and "
    "after the audit, in the same process; *ratio* is the audit's seconds over the mean of both. "
    "*Memory* is the audit's peak above what embedding had taken. The other methods' seconds hold "
    "the embedding; a dash stands for what is not installed, or cannot take the case."
)


def draw(path: Path, results: dict[str, Any]) -> None:
    """A bar of stages for each case, in units of plain embedding."""
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(results)), layout="constrained")
    left = np.zeros(len(results))
    for stage in STAGES:
        shares = [
            found["ratio"] * found["stages"][stage] / max(sum(found["stages"].values()), 1e-9)
            for found in results.values()
        ]
        axes.barh(list(results), shares, left=left, label=stage)
        left += shares
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds over those of plain embedding")
    figure.legend(ncols=len(STAGES), fontsize=8, loc="outside upper center")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
