"""Mismatches that nobody made: captions as their authors wrote them, judged by hand.

    python -m tests.benchmarks.natural                  # minutes
    python -m tests.benchmarks.natural --sheets FOLDER  # pictures yet to be judged, in blind order
    python -m tests.benchmarks.natural --quick          # the test split, without the hand count

An audit ranks the training rows with their own captions, none exchanged: *emoji*, named by their
standard, and *digits*, which people wrote and labelled (see `tests.benchmarks.detection`). The 50
pairs that it finds most suspicious and, as a control, 50 random others were mixed. Each was judged
once, from its picture and the name in its caption alone (up to the first comma, of a keycap the
digit), without knowing which it was:

* *misfit*: the picture shows something else;
* *unclear*: the picture may be what the name says, and may as well be something else;
* *fits*: the picture is what the name says, well drawn or not. Vague or odd tags after the name are
  no misfit.

The verdicts are in `results/natural_verdicts.csv`, a line for each pair. They are of three rounds:
where another version of the detector puts other pairs among the 50, these are judged in the same
way, with their new control and without those judged before. How strict *unclear* was may differ
from round to round: most of the suspicious digits are of the first one, most of the control of the
third.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from hf_ecif.detection.detect import Detection
from hf_ecif.utils.formatting import shorten
from tests.benchmarks.detection_cells import pictures, read_data
from tests.benchmarks.shared import RESULTS, find_wrong, parser, save, write_table

VERDICTS = RESULTS / "natural_verdicts.csv"
DATA, QUICK = ("emoji", "digits"), ("emoji, test",)
COUNT, QUICK_COUNT = 50, 10
NOTE = (__doc__ or "").split("\n\n", 2)[2].strip()
KINDS = ("misfit", "unclear", "fits", "not judged")
COLOURS = dict(zip(KINDS, ("tab:red", "tab:orange", "tab:green", "black"), strict=True))
COLUMNS = 10  # of pictures
HEADING = ("data", "pairs", *KINDS, "flagged", "mean probability")


@dataclass(frozen=True)
class Pair:
    """A pair to be judged.

    Attributes:
        row: its number.
        probability: of being misaligned, by the detector.
        flagged: by the detector, at its own threshold.
        group: suspicious or control.
        verdict: by hand.
    """

    row: int
    probability: float
    flagged: bool
    group: str
    verdict: str


def main() -> None:
    options = parser(__doc__, "natural")
    options.add_argument("--sheets", type=Path, help="folder for pictures to judge")
    args = options.parse_args()
    count = QUICK_COUNT if args.quick else COUNT
    results, lines = {}, []
    for name in QUICK if args.quick else DATA:
        data, rows = read_data(name, "projections"), pictures(name)
        _, detection = find_wrong(data.model, data.original, data.query)
        pairs = choose(detection, count, read_verdicts(name))
        results[name] = summary(detection, pairs)
        lines += table(name, pairs)
        if args.sheets:
            unjudged = [pair for pair in pairs if pair.verdict == "not judged"]
            if unjudged:
                draw(blind(unjudged), rows, args.sheets / f"{name}.png", blind=True)
        else:
            top = [pair for pair in pairs if pair.group == "suspicious"]
            draw(top, rows, args.output.with_name(f"{args.output.stem}_{name}.jpg"))
    if args.sheets:
        return
    save(args.output, {"pairs": count, "verdicts": VERDICTS.name}, results)
    shown = "\n\n".join(
        f"![The most suspicious {name}]({args.output.stem}_{name}.jpg)" for name in results
    )
    write_table(args.output, "Mismatches that nobody made", HEADING, lines, f"{NOTE}\n\n{shown}")
    printed = Table(*HEADING)
    for line in lines:
        printed.add_row(*line)
    Console(width=100).print(printed)


def read_verdicts(name: str) -> dict[int, str]:
    with VERDICTS.open(newline="") as file:
        return {
            int(line["row"]): line["verdict"]
            for line in csv.DictReader(file)
            if line["data"] == name
        }


def choose(detection: Detection, count: int, verdicts: dict[int, str]) -> list[Pair]:
    """The most suspicious rows, in order, then others at random."""
    order = np.argsort(-detection.probability, kind="stable")
    # One order of all rows, so that another version of the detector has nearly the same control.
    shuffled = np.random.default_rng(0).permutation(len(order))
    others = shuffled[~np.isin(shuffled, order[:count])][:count]
    return [
        Pair(
            row=int(row),
            probability=float(detection.probability[row]),
            flagged=bool(detection.flag[row]),
            group="suspicious" if number < count else "control",
            verdict=verdicts.get(int(row), "not judged"),
        )
        for number, row in enumerate([*order[:count], *others])
    ]


def blind(pairs: list[Pair]) -> list[Pair]:
    return [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))]


# ---------------------------------------------------------------------------------- the report


def summary(detection: Detection, pairs: list[Pair]) -> dict[str, Any]:
    return {
        "estimated noise rate": detection.noise_rate,
        "flagged": float(detection.flag.mean()),
        "counts": {group: counts(pairs, group) for group in ("suspicious", "control")},
        "pairs": [asdict(pair) for pair in pairs],
    }


def counts(pairs: list[Pair], group: str) -> dict[str, int]:
    found = [pair.verdict for pair in pairs if pair.group == group]
    return {kind: found.count(kind) for kind in KINDS}


def table(name: str, pairs: list[Pair]) -> list[list[str]]:
    """A line for each group."""
    lines = []
    for group in ("suspicious", "control"):
        members = [pair for pair in pairs if pair.group == group]
        numbers = [str(number) for number in counts(pairs, group).values()]
        flagged = str(sum(pair.flagged for pair in members))
        mean = f"{np.mean([pair.probability for pair in members]):.3f}"
        lines.append([name, f"{len(members)} {group}", *numbers, flagged, mean])
    return lines


def draw(pairs: list[Pair], rows: Dataset, path: Path, blind: bool = False) -> None:
    """Pictures with their captions and verdicts; or with row numbers, to judge them by."""
    lines = -(-len(pairs) // COLUMNS)
    size = (1.5 * COLUMNS, 1.95 * lines)
    canvas, axes = plt.subplots(lines, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(pairs) :]:
        axis.set_visible(False)
    for axis, pair in zip(axes.flat, pairs, strict=False):
        axis.imshow(rows[pair.row]["image"].convert("RGB"))
        axis.set(xticks=[], yticks=[])
        below = f"row {pair.row}" if blind else f"{pair.verdict}, {pair.probability:.2f}"
        caption = shorten(rows[pair.row]["text"], 50)
        colour = "black" if blind else COLOURS[pair.verdict]
        axis.set_xlabel(f"{fill(caption, 25)}\n{below}", fontsize=6.5, color=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


if __name__ == "__main__":
    main()
