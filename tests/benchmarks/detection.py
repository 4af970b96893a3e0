"""How well misaligned captions are found, beside other methods, on rows whose truth is known.

    python -m tests.benchmarks.detection                # hours: all that is below
    python -m tests.benchmarks.detection --only cat     # the cells whose name matches this
    python -m tests.benchmarks.detection --report       # from the cells computed so far
    python -m tests.benchmarks.detection --quick        # 200 rows, one seed

A share of the captions is exchanged, with any other row (random) or one of the same category (cat),
for several seeds that served nowhere else. Every method then says how suspicious each row is, at
the model as given (before) or with its attributed parameters fitted to the noisy rows (after, the
default of an audit). Ours is the detector as it ships: nothing was chosen on these cells.

* *emoji*: the training rows. Their pictures were at hand when the detector was made, with other
  noise: its settings may know them.
* *emoji, test*: the 200 rows of the test split, which nothing was chosen on.
* *digits*: scikit-learn's handwritten digits with the caption of their class, ten captions in all.
  The embedded model has never seen any and does not know them after the fit of an audit either, so
  it learns them first, from other digits with right captions.
* *as shipped*: the noise of the embedded data. The detector's settings were chosen looking at it.

Baselines run as published, and two of them with the best of many settings, picked for each cell
with the truth in hand. LEMoN is tuned without the neighbours that have the very same caption: here
a wrong caption is a copy, and right ones have none, so that a few nearest captions tell how the
noise was made. With them it finds what no method finds in real data (*sees copies*, in the JSON).
*Verdict*: ours minus the best baseline of the cell in AUPRC, by a paired
bootstrap over the rows; *above* or *below* where the 95 % interval leaves out zero. The best of
several baselines is known only afterwards, which favours them.

Finished cells are kept in `runs/detection` and not computed again; empty it when the code changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Memory
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from sklearn.metrics import average_precision_score, f1_score

from hf_ecif import metrics
from tests.benchmarks import detection_report
from tests.benchmarks.bootstrap import paired_difference, verdict
from tests.benchmarks.detection_cells import KINDS, RATES, SEEDS, STATES, Cell, Run, pictures, run
from tests.benchmarks.shared import parser, save
from tests.benchmarks.signals import FIXED, OURS, TUNED

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

CACHE = Path("runs/detection")
METRIC = metrics.load("misalignment_detection")
NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "best_f1": "best F1"}
TOP = 10  # pairs that are shown


def _cells(data: str, state: str, kinds: Sequence[str] = KINDS) -> list[Cell]:
    return [Cell(data, state, rate, kind) for rate in RATES for kind in kinds]


FULL = (
    dict.fromkeys(_cells("emoji", "after"), SEEDS)
    | {Cell("emoji", "after"): SEEDS[:1]}
    | dict.fromkeys(_cells("emoji, test", "after"), SEEDS)
    | dict.fromkeys(_cells("digits", "after", ["random"]), SEEDS)
    | dict.fromkeys(_cells("emoji", "before"), SEEDS)
    | {Cell("emoji", "before"): SEEDS[:1]}
    | {
        Cell("emoji, test", "after", 0.2, kind, parameters): SEEDS[:2]
        for parameters in ("last_block", "lora")
        for kind in KINDS
    }
)
QUICK = {Cell("emoji, test", state, 0.2, "cat"): SEEDS[:1] for state in STATES}


def main() -> None:
    options = parser(__doc__, "detection")
    options.add_argument("--only", default="", help="cells whose name matches this regex")
    options.add_argument("--report", action="store_true", help="compute nothing")
    args = options.parse_args()
    seeds = QUICK if args.quick else FULL
    cells = [cell for cell in seeds if re.search(args.only, cell.name)]
    known = Memory(None if args.quick else CACHE, verbose=0).cache(run)
    # Seeds outside, so that a run that is broken off has all cells with some seeds.
    todo = sorted({(seed, i) for i, cell in enumerate(cells) for seed in seeds[cell]})
    runs: dict[Cell, list[Run]] = {}
    for seed, number in track(todo, "Detect", console=Console(stderr=True)):
        cell = cells[number]
        if not args.report or known.check_call_in_cache(cell, seed):
            runs.setdefault(cell, []).append(known(cell, seed))
    summaries = [summarise(cell, runs[cell]) for cell in cells if cell in runs]
    settings = {
        "config": {cell.name: cell.config.to_dict() for cell in runs},
        "seeds": {cell.name: list(seeds[cell])[: len(found)] for cell, found in runs.items()},
        "wrong rows and their donors, by seed": {
            cell.name: [one.truth.index for one in found] for cell, found in runs.items()
        },
    }
    save(args.output, settings, summaries)
    detection_report.write(args.output, summaries)
    show_top(cells, runs, args.output.with_name(f"{args.output.stem}_top.jpg"))


# ----------------------------------------------------------------------------------- the figures


def summarise(cell: Cell, runs: list[Run]) -> dict[str, Any]:
    """Figures of a cell; lists are over the seeds."""
    wrong = [one.truth.wrong for one in runs]
    detections = [one.judged.detection for one in runs]
    settings = {name: best_setting(name, runs) for name in runs[0].judged.tuned}
    signals = signals_of(runs, settings)
    methods = {name: measures(wrong, found) for name, found in signals.items()}
    return {
        "cell": cell.name,
        "of": asdict(cell),
        "rows": len(wrong[0]),
        "methods": methods,
        "settings chosen with the truth": settings,
        "own threshold": {
            "noise rate": [float(w.mean()) for w in wrong],
            "estimated": [detection.noise_rate for detection in detections],
            "flagged": [float(detection.flag.mean()) for detection in detections],
            "F1": [
                float(f1_score(w, detection.flag, zero_division=0.0))
                for w, detection in zip(wrong, detections, strict=True)
            ],
        },
        "against": {
            label: against_best(wrong, signals, [name for name in names if name in signals])
            for label, names in (("as published", FIXED), ("tuned, too", (*FIXED, *TUNED)))
        },
        "most suspicious": np.argsort(-signals[OURS][0])[:TOP].tolist(),
    }


def signals_of(runs: list[Run], settings: dict[str, str]) -> dict[str, list[Floats]]:
    """Of every method by seed; ``settings`` are those of the tuned ones."""
    return {name: [one.judged.signals[name] for one in runs] for name in runs[0].judged.signals} | {
        name: [one.judged.tuned[name][setting] for one in runs]
        for name, setting in settings.items()
    }


def show_top(cells: list[Cell], runs: dict[Cell, list[Run]], path: Path) -> None:
    """The most suspicious pairs of the first seed, with their pictures, where 20 % are wrong."""
    shown = [one for one in cells if one in runs and one.state == "after" and one.rate in (0, 0.2)]
    if shown:
        lines = [
            detection_report.Line(
                cell.name,
                pictures(cell.data),
                runs[cell][0].truth,
                np.argsort(-runs[cell][0].judged.signals[OURS])[:TOP].tolist(),
            )
            for cell in shown
        ]
        detection_report.draw_top(lines, path)


def best_setting(name: str, runs: list[Run]) -> str:
    """Of a method, by its mean AUPRC over the seeds."""

    def quality(setting: str) -> float:
        return float(
            np.mean(
                [
                    average_precision_score(one.truth.wrong, one.judged.tuned[name][setting])
                    for one in runs
                ]
            )
        )

    return max(runs[0].judged.tuned[name], key=quality)


def measures(wrong: list[Bools], signals: list[Floats]) -> dict[str, list[float]]:
    """By name, one for each seed."""
    found: dict[str, list[float]] = {}
    for truth, suspicion in zip(wrong, signals, strict=True):
        for top in (10, 20):
            result = METRIC.compute(predictions=suspicion, references=truth, k=top)
            found.setdefault(f"P@{top}", []).append(result["precision_at_k"])
        for name in ("auroc", "auprc", "best_f1"):
            found.setdefault(NAMES[name], []).append(result[name])
    return found


def against_best(
    wrong: list[Bools],
    signals: dict[str, list[Floats]],
    baselines: Sequence[str],
    ours: str = OURS,
) -> dict[str, Any]:
    """Ours minus the baseline with the highest mean AUPRC."""

    def quality(name: str) -> float:
        pairs = zip(wrong, signals[name], strict=True)
        return float(np.mean([average_precision_score(*pair) for pair in pairs]))

    best = max(baselines, key=quality)
    differences = paired_difference(wrong, signals[ours], signals[best])
    return {
        "baseline": best,
        "differences": differences,
        "verdict": verdict(differences["AUPRC"]),
    }


if __name__ == "__main__":
    main()
