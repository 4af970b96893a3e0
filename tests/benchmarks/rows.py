"""Time and memory of scoring a thousand to a million rows with a saved fit.

    python -m tests.benchmarks.rows                      # a million rows with a tiny CLIP
    python -m tests.benchmarks.rows --model embedded     # the demo's; sizes of 25 minutes at most
    python -m tests.benchmarks.rows --quick              # up to 4,000 rows

The embedded pairs are streamed again and again from parquet files that are links to one, so that
nothing but the stream knows how many rows there are. The question is whether memory grows with
them, so by default the model is tiny; with the demo's CLIP, most of the time is its forward pass.
The rows take two ways: *run_score* writes shards, as `hf-ecif score --streaming` does, and *scorer*
maps the fit over an `IterableDataset`. What is known is written after every size.

Every size has a process of its own. Its memory is counted from where the model is loaded and has
scored two rows; the working memory of a block is still to come then, and counts. The peak is the
kernel's own of that process (`VmHWM`), since `ru_maxrss` goes over to a child from its parent.

A block of the demo's CLIP is taken apart: *reading* (stream, decode, preprocess) and *model*
(embed, tangents, scores) are timed alone, and both together with and without workers. ``overlap``
is the sum of the two over the time together: one where nothing overlaps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Image, IterableDataset, disable_progress_bars
from rich.console import Console
from rich.table import Table as Printed
from transformers import AutoConfig, AutoProcessor, CLIPConfig, CLIPModel

from hf_ecif.applications.score import ScoreRequest, run_score
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.images import read_pair
from hf_ecif.data.loading import Source, load_rows, stream_rows
from hf_ecif.data.schema import check_columns
from hf_ecif.engine.features import Features
from hf_ecif.influence.influence import Influence, influence_columns
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Preprocessor, Rows, Table
from hf_ecif.influence.scorer import Scorer
from hf_ecif.utils.progress import Advance
from tests.benchmarks.engine import race
from tests.benchmarks.shared import DEMO, RESULTS

SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = (1_000, 4_000)
FILE_ROWS = 1_000
CONFIG = InfluenceConfig(probes=4, partitions=2, fit_epochs=3)
WORKERS = (0, 2)
LIMIT = 2048  # MiB above the model
MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="rows")
    parser.add_argument("--minutes", type=float, default=25, help="of a size; longer is left out")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=RESULTS / "rows.json")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    disable_progress_bars()
    if args.one:
        job, *arguments = args.one
        print(json.dumps(JOBS[job](*arguments)))
        return
    sizes = [size for size in (QUICK_SIZES if args.quick else SIZES) if size <= args.most]
    with TemporaryDirectory(prefix="rows-") as folder:
        run = partial(in_own_process, args.threads)
        for name in {args.model, "embedded"}:
            run("prepare", str(Path(folder, name)), name)
        content = provenance() | {
            "model": args.model,
            "threads": args.threads,
            "config": CONFIG.to_dict(),
            "shares": run(
                "shares", f"{folder}/embedded", *(("1", "1") if args.quick else ("4", "3"))
            ),
            "results": [],
        }
        score = partial(run, "score", f"{folder}/{args.model}")
        for result in grow(args.ways, sizes, args.minutes, score):
            content["results"].append(result)
            write(content, args.output)
    print_tables(content)


def grow(
    ways: list[str], sizes: list[int], minutes: float, run: Callable[[str, str], Figures]
) -> Iterator[Figures]:
    """One size after the other, as long as the last one's rate lets hope for an end in time."""
    pace = dict.fromkeys(ways, float("inf"))
    for size, way in product(sizes, ways):
        expected = size / pace[way] / 60
        result: Figures = {"way": way, "rows": size}
        if expected > minutes:
            yield result | {"left out": f"about {expected:.0f} minutes"}
            continue
        result |= run(way, str(size))
        pace[way] = result["rows/s"]
        print(result | {"curve": "..."}, file=sys.stderr, flush=True)
        yield result


def write(content: Figures, path: Path) -> None:
    """The record and its figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, path.with_suffix(".png"))


def in_own_process(threads: int, *job: str) -> Figures:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tests.benchmarks.rows", "--one", *job]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def provenance() -> Figures:
    """Versions, commit and machine."""
    names = ("hf_ecif", "torch", "transformers", "datasets", "accelerate")
    git = partial(subprocess.run, capture_output=True, text=True, cwd=DEMO)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout)
    return {
        "versions": {"python": platform.python_version()} | {n: version(n) for n in names},
        "commit": commit + (" and changes" if changed else ""),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory GiB": round(PAGE * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load before": os.getloadavg()[0],
        },
    }


# --------------------------------------------------------------------- jobs, each in a process


def prepare(folder: str, name: str) -> Figures:
    """A saved fit, and a file of rows."""
    Path(folder).mkdir()
    rows = check_columns(load_rows(str(DEMO / "data"), "train"), "image", "text")
    model = MODELS[name]()
    query = load_rows(str(DEMO / "data"), "validation")
    influence = model.fit(model.read(rows), model.read(query))
    scorer = Scorer.from_influence(influence, Path(folder, "fit"))
    Path(folder, "scorer.json").write_text(json.dumps(asdict(scorer)))
    cells = rows.select_columns(["image", "text"]).select(range(FILE_ROWS))
    cells.cast_column("image", Image(decode=False)).to_parquet(Path(folder, "rows.parquet"))
    return {}


def embedded() -> InfluenceModel:
    """The demo's CLIP."""
    return InfluenceModel.from_pretrained(DEMO / "model", CONFIG)


def tiny() -> InfluenceModel:
    """One narrow layer a tower, random weights, the demo's words and a picture of four patches."""
    processor = AutoProcessor.from_pretrained(DEMO / "model")
    processor.image_processor.size = {"height": 16, "width": 16}
    processor.image_processor.crop_size = {"height": 16, "width": 16}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "projection_dim": 32}
    demo = AutoConfig.from_pretrained(DEMO / "model").text_config
    words = (
        "vocab_size",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    config = CLIPConfig(
        text_config=tower | heads | {name: getattr(demo, name) for name in words},
        vision_config=tower | heads | {"image_size": 16, "patch_size": 8},
        projection_dim=32,
    )
    torch.manual_seed(0)
    return InfluenceModel(CLIPModel(config).eval(), processor, CONFIG)


MODELS: dict[str, Callable[[], InfluenceModel]] = {"tiny": tiny, "embedded": embedded}


def score(folder: str, way: str, count: str) -> Figures:
    """Score ``count`` rows; seconds, and MiB above the loaded model."""
    source = link_files(Path(folder), int(count))
    scorer = saved_scorer(folder)
    scorer(next(iter(stream(source).iter(batch_size=2))))
    loaded = resident_memory()
    blocks: list[tuple[float, int]] = []
    start = time.perf_counter()
    with sampled_memory() as curve, TemporaryDirectory(dir=folder) as output:
        WAYS[way](
            scorer,
            source,
            Path(output),
            lambda rows: blocks.append((time.perf_counter() - start, rows)),
        )
    seconds = blocks[-1][0]
    assert sum(rows for _, rows in blocks) == int(count)
    parts = np.array_split([mib for _, mib in curve], 4)
    return {
        "seconds": seconds,
        "rows/s": int(count) / seconds,
        "rows/s in quarters": rates(blocks),
        "MiB of the model": loaded,
        "peak MiB above the model": peak_memory() - loaded,
        "growth from the second to the last quarter, MiB": float(parts[3].mean() - parts[1].mean())
        if len(curve) >= 40
        else None,
        "curve": [(round(s, 2), round(mib - loaded, 1)) for s, mib in thinned(curve)],
    }


def shares(folder: str, blocks: str, repeats: str) -> Figures:
    """Where the time of a block goes, each part alone and all together."""
    scorer = saved_scorer(folder)
    influence = Influence.from_pretrained(scorer.source)
    count = int(blocks) * scorer.rows
    source = link_files(Path(folder), -(-count // FILE_ROWS) * FILE_ROWS)
    parts = Parts(influence, stream(source).take(count), scorer.rows)
    times = race(
        int(repeats),
        stream=parts.stream,
        decode=parts.decode,
        preprocess=parts.preprocess,
        embed=parts.embed,
        tangents=parts.tangents,
        columns=parts.columns,
        **{f"together, {workers} workers": partial(parts.together, workers) for workers in WORKERS},
    )
    times["scores"] = times["columns"] - times["tangents"]
    reading = times["stream"] + times["decode"] + times["preprocess"]
    in_model = times["embed"] + times["columns"]
    together = {workers: times[f"together, {workers} workers"] for workers in WORKERS}
    parts_alone = ("stream", "decode", "preprocess", "embed", "tangents", "scores")
    return {
        "rows": count,
        "seconds alone": {name: times[name] for name in parts_alone},
        "reading": reading,
        "model": in_model,
        "together": {
            f"{workers} workers": {
                "seconds": seconds,
                "rows/s": count / seconds,
                "model, share of the time": in_model / seconds,
                "overlap": (reading + in_model) / seconds,
            }
            for workers, seconds in together.items()
        },
    }


JOBS: dict[str, Callable[..., Figures]] = {"prepare": prepare, "score": score, "shares": shares}


# --------------------------------------------------------------------------------- two ways


def with_scorer(scorer: Scorer, source: Path, output: Path, advance: Advance) -> None:
    """Map the fit over the stream."""
    rows = stream(source)
    scored = rows.map(scorer, batched=True, batch_size=scorer.rows, features=scorer.features(rows))
    for batch in scored.iter(batch_size=scorer.rows):
        assert None not in batch["ecif_score"]
        advance(len(batch["ecif_score"]))


def with_run_score(scorer: Scorer, source: Path, output: Path, advance: Advance) -> None:
    """Write shards."""
    request = ScoreRequest(
        influence=scorer.source, dataset=str(source), output=output, streaming=True
    )
    summary = run_score(request, lambda name, steps: advance)
    assert summary["unscored"] == 0


WAYS: dict[str, Callable[[Scorer, Path, Path, Advance], None]] = {
    "run_score": with_run_score,
    "scorer": with_scorer,
}


# --------------------------------------------------------------------------- parts of a block


class Parts:
    """What a block of rows goes through, one after the other, each to be run alone."""

    def __init__(self, influence: Influence, rows: IterableDataset, size: int) -> None:
        self.influence, self.model = influence, influence.model
        self.rows, self.size = rows, size
        encoder, processor = self.model.encoder, self.model.processor
        self.preprocessor = Preprocessor(encoder, processor, lambda: iter(()))
        self.cells = [cell for batch in self.blocks() for cell in zip(*batch.values(), strict=True)]
        self.pairs = self.decode()
        self.inputs = self.preprocess()
        self.read = [self.read_block(batch) for batch in self.blocks()]

    def blocks(self) -> Iterator[dict[str, list[Any]]]:
        """Undecoded cells of image and text."""
        return self.rows.iter(batch_size=self.size)

    def read_block(self, batch: dict[str, list[Any]]) -> Rows:
        """As `Scorer` does."""
        return self.model.read_any(Table(batch), "image", "text")

    def stream(self) -> None:
        for _ in self.blocks():
            pass

    def decode(self) -> list[Any]:
        return [read_pair(image, text, CONFIG.max_pixels) for image, text in self.cells]

    def preprocess(self) -> list[Features]:
        size = CONFIG.micro_batch_size
        starts = range(0, len(self.pairs), size)
        return [self.preprocessor(self.pairs[start : start + size]) for start in starts]

    def embed(self) -> None:
        for inputs in self.inputs:
            self.model.encoder.freeze(inputs)

    def tangents(self) -> None:
        fitted = self.influence.fitted
        for rows in self.read:
            self.model.encoder.push(fitted.theta, fitted.directions.stack(), rows.features)

    def columns(self) -> None:
        """Tangents among them."""
        for rows in self.read:
            influence_columns(self.influence, rows)

    def together(self, workers: int) -> None:
        self.model.config = replace(self.model.config, workers=workers)
        for batch in self.blocks():
            influence_columns(self.influence, self.read_block(batch))


# ----------------------------------------------------------------------------------- inputs


def link_files(folder: Path, count: int) -> Path:
    """A folder that looks like a data set of ``count`` rows."""
    source = folder / f"data-{count}"
    source.mkdir(exist_ok=True)
    for number in range(count // FILE_ROWS):
        link = source / f"part-{number:06d}.parquet"
        if not link.exists():
            link.hardlink_to(folder / "rows.parquet")
    return source


def stream(source: Path) -> IterableDataset:
    return stream_rows(Source(str(source), "train")).cast_column("image", Image(decode=False))


def saved_scorer(folder: str) -> Scorer:
    return Scorer(**json.loads(Path(folder, "scorer.json").read_text()))


# ----------------------------------------------------------------------------------- memory


@contextmanager
def sampled_memory() -> Iterator[list[tuple[float, float]]]:
    """Seconds and resident MiB, ten times a second."""
    curve: list[tuple[float, float]] = []
    start, end = time.perf_counter(), Event()

    def sample() -> None:
        while not end.wait(0.1):
            curve.append((time.perf_counter() - start, resident_memory()))

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield curve
    finally:
        end.set()
        thread.join()


def resident_memory() -> float:
    """Of this process now, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / MIB


def peak_memory() -> float:
    """Of this process so far, in MiB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def thinned(curve: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """The highest of neighbouring samples."""
    step = max(1, -(-len(curve) // most))
    return [
        max(curve[i : i + step], key=lambda point: point[1]) for i in range(0, len(curve), step)
    ]


def rates(blocks: list[tuple[float, int]]) -> list[float]:
    """Rows per second of the quarters of a run; none if it has few blocks."""
    if len(blocks) < 8:
        return []
    ends = [len(blocks) * quarter // 4 for quarter in range(5)]
    seconds = [0.0, *(second for second, _ in blocks)]
    return [
        sum(rows for _, rows in blocks[first:last]) / (seconds[last] - seconds[first])
        for first, last in pairwise(ends)
    ]


# ----------------------------------------------------------------------------------- output


def print_tables(content: Figures) -> None:
    console = Console(width=110)
    machine = content["machine"]
    table = Printed(
        "way", "rows", "seconds", "rows/s", "model MiB", "above it", "at most", "growth",
        title=f"{content['threads']} thread(s) on {machine['cores']} cores",
    )  # fmt: skip
    growth = "growth from the second to the last quarter, MiB"
    for one in content["results"]:
        if "left out" in one:
            table.add_row(one["way"], f"{one['rows']:,}", one["left out"])
            continue
        table.add_row(
            one["way"],
            f"{one['rows']:,}",
            f"{one['seconds']:.1f}",
            f"{one['rows/s']:.0f}",
            f"{one['MiB of the model']:.0f}",
            f"{one['peak MiB above the model']:.0f}",
            str(LIMIT),
            "" if one[growth] is None else f"{one[growth]:+.0f}",
        )
    console.print(table)
    found = content["shares"]
    alone = ", ".join(
        f"{name} {1e3 * s / found['rows']:.2f}" for name, s in found["seconds alone"].items()
    )
    console.print(f"Alone, ms per row: {alone}")
    shares = Printed("together", "rows/s", "model, share", "overlap")
    for name, one in found["together"].items():
        figures = one["rows/s"], one["model, share of the time"], one["overlap"]
        shares.add_row(name, *(f"{value:.2f}" for value in figures))
    console.print(shares)


def draw(content: Figures, path: Path) -> None:
    """Time by rows; memory in the course of the largest run of each way."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    done = [one for one in content["results"] if "seconds" in one]
    for way in dict.fromkeys(one["way"] for one in done):
        runs = [one for one in done if one["way"] == way]
        left.loglog([r["rows"] for r in runs], [r["seconds"] for r in runs], "o-", label=way)
        seconds, memory = np.array(runs[-1]["curve"]).T
        right.plot(seconds / seconds[-1], memory, label=f"{way}, {runs[-1]['rows']:,} rows")
    left.set(xlabel="rows", ylabel="seconds")
    right.axhline(LIMIT, color="grey", linestyle="--", linewidth=0.8, label="limit")
    right.set(xlabel="share of the run", ylabel="MiB above the model", ylim=(0, 1.1 * LIMIT))
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
