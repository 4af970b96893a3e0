"""Rows that an audit learns from, and rows that it judges by that: are they judged alike?

    python -m tests.benchmarks.judge             # five seeds, up to 100,000 rows
    python -m tests.benchmarks.judge --quick     # one seed, up to 4,000 rows

*In and out*: an audit learns from a random half of the training pairs and judges the other half;
and the reverse. So every row is judged twice, once by an audit that was fitted to it and once by
one that was not. What must agree is the mean probability, to within its standard error over the
seeds: two audits of different halves also differ in their noise rates, which is in that error.
Rankings are compared, too. Settings are those of the library; nothing was chosen by these figures.

*Memory*: a saved auditor is mapped over a stream of pictures with noise of their own, made as they
are read, in a process for each number of rows. Counted is the kernel's peak of the process
(``VmHWM``) above where the model is loaded and has judged a batch. Seconds are of the processor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, disable_progress_bars
from sklearn.metrics import average_precision_score

import hf_ecif
from hf_ecif.config import InfluenceConfig
from hf_ecif.detection.auditor import Auditor
from hf_ecif.utils.progress import silent
from tests.benchmarks.shared import parser, print_table, save, write_table
from tests.support import DEMO

SEEDS, SIZES = range(5), (1_000, 10_000, 100_000)
QUICK_SIZES = (1_000, 4_000)
NOISE = 6.0  # standard deviation of the noise of a pixel, of 255
COLUMNS = {"image_column": "image", "text_column": "text"}


def learn(rows: Dataset, query: Dataset, seed: int, **options: Any) -> hf_ecif.Audit:
    """An audit of rows, by the settings of the library."""
    return hf_ecif.audit(
        str(DEMO / "model"),
        rows,
        query=query,
        config=InfluenceConfig(seed=seed, **options),
        suggest=False,
        progress=silent,
        **COLUMNS,  # type: ignore[arg-type]
    )


def compare(rows: Dataset, query: Dataset, seed: int) -> dict[str, Any]:
    """Probabilities of all rows, in and out, and what they have in common."""
    order = np.random.default_rng(seed).permutation(len(rows))
    halves = [np.sort(half) for half in np.array_split(order, 2)]
    wrong = np.array(rows["is_misaligned"][:])
    inside, outside = np.zeros(len(rows)), np.zeros(len(rows))
    flags, rates = np.zeros((2, len(rows)), dtype=bool), []
    for own, other in (halves, halves[::-1]):
        audit = learn(rows.select(own), query, seed)
        assert audit.auditor is not None
        judged = audit.auditor(rows.select(other)[:])
        inside[own] = audit.dataset["ecif_noise_probability"][:]
        outside[other] = judged["ecif_noise_probability"]
        flags[0, own], flags[1, other] = audit.dataset["ecif_flag"][:], judged["ecif_flag"]
        rates.append(audit.summary.noise.rate)
    change = outside - inside
    return {
        "rates": rates,
        "difference": float(change.mean()),
        "difference_of_right": float(change[~wrong].mean()),
        "difference_of_wrong": float(change[wrong].mean()),
        "median_of_rows": float(np.median(np.abs(change))),
        "flagged": flags.mean(axis=1).tolist(),
        "precision": [float(wrong[flag].mean()) for flag in flags],
        "recall": [float(flag[wrong].mean()) for flag in flags],
        "average_precision": [
            float(average_precision_score(wrong, values)) for values in (inside, outside)
        ],
        "brier": [float(((values - wrong) ** 2).mean()) for values in (inside, outside)],
    }


def stream(count: int) -> IterableDataset:
    """Pairs of the demo, again and again, each with noise and a caption of its own."""

    def pairs() -> Iterator[dict[str, Any]]:
        rows = Dataset.from_parquet(str(DEMO / "data" / "train.parquet"))
        pictures = [np.asarray(image.convert("RGB"), dtype=float) for image in rows["image"]]
        texts, random = rows["text"][:], np.random.default_rng(0)
        for number in range(count):
            picture = pictures[number % len(pictures)]
            noisy = picture + NOISE * random.standard_normal(picture.shape)
            pixels = noisy.clip(0, 255).astype(np.uint8)
            yield {"image": pixels, "text": f"{texts[number % len(texts)]} {number}"}

    return IterableDataset.from_generator(pairs)


def measure(folder: str, count: int) -> None:
    """Print what judging so many rows takes, in this process alone."""
    disable_progress_bars()
    torch.set_num_threads(1)
    auditor = Auditor.from_pretrained(folder)
    before = start = flagged = 0.0
    for batch in stream(auditor.rows + count).iter(batch_size=auditor.rows):
        images = [np.asarray(image, dtype=np.uint8) for image in batch["image"]]
        found = auditor({"image": images, "text": batch["text"]})
        flagged += sum(map(bool, found["ecif_flag"]))
        if not before:
            before, start = peak(), time.process_time()
    seconds = time.process_time() - start
    values = {"rows": count, "MiB": peak() - before, "seconds": seconds, "flagged": flagged}
    print(json.dumps(values))


def peak() -> float:
    """Peak memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def memory(rows: Dataset, query: Dataset, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """`measure` for every number of rows."""
    found = []
    with TemporaryDirectory() as folder:
        audit = learn(rows.select(range(700)), query, 0, fit_epochs=3, probes=4)
        assert audit.auditor is not None
        audit.auditor.save_pretrained(folder)
        for size in sizes:
            code = f"from tests.benchmarks.judge import measure; measure({folder!r}, {size})"
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    arguments = parser(__doc__, "judge").parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    rows, query = (
        Dataset.from_parquet(str(DEMO / "data" / f"{split}.parquet"))
        for split in ("train", "validation")
    )
    seeds = [0] if arguments.quick else [*SEEDS]
    compared = [compare(rows, query, seed) for seed in seeds]
    sizes = QUICK_SIZES if arguments.quick else SIZES
    results = {"in and out": compared, "memory": memory(rows, query, sizes)}
    save(arguments.output, {"seeds": seeds, "noise": NOISE}, results)
    heading = ["", "learned from", "judged"]
    table = [
        [name, *(f"{value:.3f}" for value in np.mean([one[name] for one in compared], axis=0))]
        for name in ("flagged", "precision", "recall", "average_precision", "brier")
    ]
    differences = [one["difference"] for one in compared]
    error = np.std(differences, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else float("nan")
    peaks = "; ".join(f"{one['MiB']:.0f} MiB for {one['rows']:,} rows" for one in results["memory"])
    note = (
        f"{len(rows):,} rows, each learned from once, and judged once; {len(seeds)} seed(s). "
        f"Judged, their mean probability is {np.mean(differences):+.4f} from what it is where they "
        f"are learned from (standard error {error:.4f}). Peak memory above the model: {peaks}."
    )
    title = "Rows learned from, and rows judged"
    print_table(title, heading, table)
    print(note)
    write_table(arguments.output, title, heading, table, note)


if __name__ == "__main__":
    main()
