"""Wrong captions found by the influence functions of other tools, beside ours.

    pip install --no-deps kronfluence traker && pip install einops einconv opt-einsum tqdm
    python -m tests.benchmarks.detection_peers           # three kinds of noise, 2 seeds: 15 minutes
    python -m tests.benchmarks.detection_peers --quick   # 200 rows, one seed

Rows, noise, seeds and the fit of the projections are those of `tests.benchmarks.detection` (its
first seeds; *as shipped*, they are those of the fit alone). Every method sees the same query, the
validation split, and is asked which rows are harmful to it: whose removal, it says, lowers the
query's loss most. *To itself* asks how much a row holds up its own loss, a common way to look for
wrong labels.

* *EK-FAC* by kronfluence. It knows one loss per sample and one sample per row; here the whole
  batch's loss flows through every row's embeddings, so that a row's gradient mixes what it does as
  a positive with what it does as a negative of the others.
* *TRAK* by traker, with its output function for CLIP and one checkpoint, the fitted one.
* *TracIn*, as in `tests.benchmarks.detection`: three checkpoints, the gradient of the pair's own
  terms.

Of EK-FAC and TRAK the best of many settings is given (damping and number of partitions; ridge,
dimension, temperature), chosen by the mean AUPRC of the line with the truth in hand: it flatters
them. Ours runs at its defaults. The last column compares our score for the query with the best of
theirs, by a paired bootstrap over the rows (95 %). `ecif_noise_probability` asks another question,
whether the caption is wrong, of which scores are one of four witnesses. A tool that is not
installed is left out.

Finished runs are kept in `runs/detection_peers`; empty it when the code changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from joblib import Memory
from rich.console import Console
from rich.progress import track

from tests.benchmarks import detection_cells
from tests.benchmarks.detection import against_best, best_setting, signals_of, summarise
from tests.benchmarks.detection_cells import SEEDS, Cell, Run, read_data
from tests.benchmarks.detection_report import Summary, difference, error, figure
from tests.benchmarks.lds import Problem, pose
from tests.benchmarks.shared import parser, print_table, save, write_table
from tests.benchmarks.signals import OURS, Signal, array
from tests.benchmarks.tools import ek_fac, ek_fac_scores, ek_fac_self_scores, is_installed, trak

CACHE = Path("runs/detection_peers")
FULL = (
    Cell("emoji", "after", 0.2, "random"),
    Cell("emoji", "after", 0.2, "cat"),
    Cell("emoji", "after"),
)
QUICK = (Cell("emoji, test", "after", 0.2, "cat"),)
EK_FAC, EK_FAC_SELF, TRAK = "EK-FAC to the query", "EK-FAC to itself", "TRAK to the query"
TRACIN = ("TracIn to the query", "TracIn to itself")
TO_QUERY = ("ecif_score", TRACIN[0], EK_FAC, TRAK)
SHOWN = (*TO_QUERY, "ecif_self", TRACIN[1], EK_FAC_SELF, OURS)
MEASURES = ("AUPRC", "AUROC", "P@20")
NOTE = (__doc__ or "").split("\n\n", 2)[2].strip()


def main() -> None:
    options = parser(__doc__, "detection_peers")
    options.add_argument("--seeds", type=int, default=2, help="of each kind of noise")
    args = options.parse_args()
    cells, count = (QUICK, 1) if args.quick else (FULL, args.seeds)
    tools = [tool for tool in TOOLS if is_installed(tool.module)]
    absent = [tool.package for tool in TOOLS if tool not in tools]
    memory = Memory(None if args.quick else CACHE, verbose=0)
    # Seeds outside, so that a run that is broken off has all kinds of noise with some seeds.
    todo = [(seed, cell) for seed in SEEDS[:count] for cell in cells]
    runs: dict[Cell, list[Run]] = {}
    for seed, cell in track(todo, "Detect", console=Console(stderr=True)):
        runs.setdefault(cell, []).append(run(cell, seed, tools, memory))
    summaries = [summarise(cell, found) | beside(found) for cell, found in runs.items()]
    settings = {
        "seeds": list(SEEDS[:count]),
        "config": {cell.name: cell.config.to_dict() for cell in cells},
        "tools": {tool.package: version(tool.package) for tool in tools},
        "not installed": absent,
        "wrong rows and their donors, by seed": {
            cell.name: [one.truth.index for one in found] for cell, found in runs.items()
        },
    }
    save(args.output, settings, summaries)
    draw(summaries, args.output.with_suffix(".png"))
    shown = [name for name in SHOWN if name in summaries[0]["methods"]]
    rows = [*table_rows(summaries, shown)]
    heading = ["noise", "measure", *shown, "ecif_score minus the best other to the query"]
    table = ("Beside influence functions of other tools", heading, rows)
    print_table(*table)
    for package in absent:
        print(f"{package} is not installed: pip install --no-deps {package}")
    write_table(args.output, *table, note=f"{NOTE}\n\n{chosen(summaries)}".strip())


# ------------------------------------------------------------------------------------ the tools


Signals = dict[str, dict[str, Signal]]  # by method and setting, higher where more suspicious


def by_ek_fac(cell: Cell, seed: int) -> Signals:
    with TemporaryDirectory() as scratch:
        tool = ek_fac(problem_of(cell, seed), Path(scratch))
        return {
            EK_FAC: {name: array(-score) for name, score in ek_fac_scores(tool)},
            EK_FAC_SELF: {name: array(score) for name, score in ek_fac_self_scores(tool)},
        }


def by_trak(cell: Cell, seed: int) -> Signals:
    with TemporaryDirectory() as scratch:
        scores = trak(problem_of(cell, seed), Path(scratch))()
        return {TRAK: {name: array(-score.detach()) for name, score in scores}}


def problem_of(cell: Cell, seed: int) -> Problem:
    """The rows of one seed of a cell, and the fit to them."""
    data = read_data(cell.data, cell.parameters)
    data.model.config = replace(cell.config, seed=seed)
    one = data.exchanged(cell, seed)
    torch.manual_seed(seed)  # the tools draw from the common generator
    return pose(data.model, one.rows, data.query, torch.from_numpy(one.wrong))


@dataclass(frozen=True)
class Tool:
    """What may be installed."""

    module: str
    package: str
    judge: Callable[[Cell, int], Signals]


TOOLS = (Tool("kronfluence", "kronfluence", by_ek_fac), Tool("trak", "traker", by_trak))


def run(cell: Cell, seed: int, tools: list[Tool], memory: Memory) -> Run:
    """One seed of a cell, judged by all methods of `detection` and by the tools."""
    one = memory.cache(detection_cells.run)(cell, seed)
    tuned = one.judged.tuned
    for tool in tools:
        tuned = tuned | memory.cache(tool.judge)(cell, seed)
    return replace(one, judged=replace(one.judged, tuned=tuned))


# ---------------------------------------------------------------------------------- the report


def beside(runs: list[Run]) -> dict[str, Any]:
    """Our score for the query minus the best of the others', by a paired bootstrap."""
    settings = {name: best_setting(name, runs) for name in runs[0].judged.tuned}
    signals = signals_of(runs, settings)
    others = [name for name in TO_QUERY[1:] if name in signals]
    wrong = [one.truth.wrong for one in runs]
    return {"score against": against_best(wrong, signals, others, ours="ecif_score")}


def table_rows(summaries: list[Summary], shown: list[str]) -> Iterator[list[str]]:
    for one in summaries:
        for measure in MEASURES:
            cells = [figure(one["methods"][name][measure]) for name in shown]
            last = difference(one["score against"]) if measure == "AUPRC" else ""
            yield [one["cell"].removesuffix(", after"), measure, *cells, last]


def chosen(summaries: list[Summary]) -> str:
    """Which settings the tools have, as Markdown."""
    lines = []
    for one in summaries:
        settings = one["settings chosen with the truth"]
        named = [f"{name} {settings[name]}" for name in SHOWN if name in settings]
        if named:
            lines.append(f"* {one['cell'].removesuffix(', after')}: {'; '.join(named)}")
    return "\n".join(["Settings chosen with the truth:\n", *lines]) if lines else ""


def draw(summaries: list[Summary], path: Path) -> None:
    """AUPRC of the methods, a panel for each kind of noise."""
    canvas, axes = plt.subplots(
        1,
        len(summaries),
        figsize=(2 + 3 * len(summaries), 3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, one in zip(axes[0], summaries, strict=True):
        names = [name for name in SHOWN if name in one["methods"]]
        values = [one["methods"][name]["AUPRC"] for name in names]
        colours = ["black" if name.startswith("ecif") else "tab:blue" for name in names]
        axis.barh(names, [np.mean(v) for v in values], xerr=[*map(error, values)], color=colours)
        wrong = float(np.mean(one["own threshold"]["noise rate"]))
        axis.axvline(wrong, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=one["cell"].removesuffix(", after"), xlabel="AUPRC", xlim=(0, 1))
    axes[0, 0].invert_yaxis()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main()
