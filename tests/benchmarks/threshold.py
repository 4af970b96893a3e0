"""Is the detector's own cut a good one? No labels are at hand where it is made.

    python -m tests.benchmarks.threshold            # 5 seeds of every cell
    python -m tests.benchmarks.threshold --quick    # one seed of 400 rows, without 10 %

Captions of the embedded data are exchanged, none, 10, 20 or 40 % of them, with any other row
(random) or one of the same category (cat). A seed is that of the exchange and that of the run.
Goals: the F1 at the detector's cut is within 3 points of the best that any cut reaches; where
nothing is wrong, 2 % are flagged at most; the estimated noise rate is within 5 points of the true
one. They are to hold for the mean over the seeds; the worst seed is given beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import track
from sklearn.metrics import f1_score

from hf_ecif.detection.detect import Detection
from hf_ecif.influence.rows import Rows
from tests.benchmarks.shared import (
    Embedded,
    Exchanged,
    embedded,
    exchange,
    find_wrong,
    judge,
    parser,
    print_table,
    save,
    write_table,
)

RATES, KINDS, SEEDS = (0.1, 0.2, 0.4), ("random", "cat"), 5
GOALS = {"F1 below the best": 3.0, "flagged": 2.0, "noise rate off by": 5.0}  # points

NOTE = (
    "Mean ± standard error over the seeds. In the last three columns, in points: the mean over the "
    "seeds, in brackets the worst seed, and whether the mean meets the goal (at most "
    + ", ".join(f"{goal:g}" for goal in GOALS.values())
    + ")."
)


class Cell(NamedTuple):
    """A kind of noise."""

    rate: float
    kind: str

    @property
    def name(self) -> str:
        return f"{self.rate:.0%} {self.kind}".strip()


def main() -> None:
    options = parser(__doc__, "threshold")
    options.add_argument("--seeds", type=int, default=SEEDS)
    args = options.parse_args()
    rates, seeds = (RATES[1:], 1) if args.quick else (RATES, args.seeds)
    cells = [Cell(0.0, ""), *(Cell(rate, kind) for rate in rates for kind in KINDS)]
    data = embedded(quick=args.quick)
    original = data.model.read(data.train, text_column="original_text")
    results, indices = [], {}
    for cell in track(cells, "Detect", console=Console(stderr=True)):
        exchanged = list(made(cell, data, original, seeds))
        runs = [run(data, one, seed) for seed, one in enumerate(exchanged)]
        results.append({"noise": cell.name, "rate": cell.rate, "runs": runs})
        indices[cell.name] = [one.index for one in exchanged]
    settings = {"seeds": seeds, "goals": GOALS, "config": data.model.config.to_dict()}
    save(args.output, settings | {"wrong rows and their donors, by seed": indices}, results)
    draw(results, args.output.with_suffix(".png"))
    table = ("The detector's own cut, without labels", HEADING, [*table_rows(results)])
    print_table(*table)
    write_table(args.output, *table, note=NOTE)


def made(cell: Cell, data: Embedded, original: Rows, seeds: int) -> Iterator[Exchanged]:
    categories = data.train["category"][:]
    for seed in range(seeds):
        yield exchange(original, categories, cell.rate, cell.kind, seed)


def run(data: Embedded, one: Exchanged, seed: int) -> dict[str, float]:
    """What the detector says of one data set, beside the truth."""
    model = data.model
    given, model.config = model.config, replace(model.config, seed=seed)
    _, detection = find_wrong(model, one.rows, data.query)
    model.config = given
    return figures(one, detection)


def figures(one: Exchanged, detection: Detection) -> dict[str, float]:
    true_rate = float(one.wrong.mean())
    found = {
        "true rate": true_rate,
        "estimated rate": detection.noise_rate,
        "threshold": detection.threshold,
        "flagged": 100 * float(detection.flag.mean()),
        "noise rate off by": 100 * abs(detection.noise_rate - true_rate),
    }
    if one.wrong.any():
        best = judge(one.wrong, detection.probability)["best_f1"]
        found |= {"F1": float(f1_score(one.wrong, detection.flag, zero_division=0.0)), "best": best}
        found["F1 below the best"] = 100 * (best - found["F1"])
    return found


# ---------------------------------------------------------------------------------- the report


HEADING = ("noise", "F1 at the cut", "best F1", "estimated rate", *GOALS)


def table_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for cell in results:
        runs = cell["runs"]
        yield (
            cell["noise"],
            mean(runs, "F1"),
            mean(runs, "best"),
            mean(runs, "estimated rate"),
            *(against(cell, name) for name in GOALS),
        )


def mean(runs: list[dict[str, float]], name: str) -> str:
    if name not in runs[0]:
        return "–"
    values = [run[name] for run in runs]
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


def against(cell: dict[str, Any], goal: str) -> str:
    """Mean and worst seed, and whether the goal is met by the mean."""
    runs = cell["runs"]
    if goal not in runs[0] or (goal == "flagged" and cell["rate"] > 0):
        return "–"
    values = [run[goal] for run in runs]
    verdict = "met" if np.mean(values) <= GOALS[goal] else "MISSED"
    return f"{np.mean(values):.1f} ({max(values):.1f}), {verdict}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Estimated on true noise rates, and F1 at the cut on the best."""
    canvas, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for cell in results:
        for axis, names in ((left, ("true rate", "estimated rate")), (right, ("best", "F1"))):
            runs = [run for run in cell["runs"] if names[0] in run]
            points = np.array([[run[name] for name in names] for run in runs]).reshape(-1, 2)
            axis.plot(*points.T, "o", alpha=0.6, label=cell["noise"])
    for axis, title, unit in ((left, "noise rate", "estimated"), (right, "F1", "at own cut")):
        axis.axline((0.5, 0.5), slope=1, color="grey", linewidth=0.8)
        axis.set(title=title, ylabel=unit)
    left.set(xlabel="true", xlim=(-0.03, 0.5), ylim=(-0.03, 0.5))
    right.set(xlabel="at the best cut", xlim=(0.6, 1), ylim=(0.6, 1))
    left.legend(fontsize=8)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main()
