"""Mismatches that nobody made: the embedded captions as their authors wrote them, judged by hand.

    python -m tests.benchmarks.natural                  # about a minute
    python -m tests.benchmarks.natural --sheet FILE     # the pictures to judge, in blind order
    python -m tests.benchmarks.natural --quick          # 200 rows, without the hand count

The captions of the training rows are those of the emoji, none exchanged. An audit ranks them. The
50 pairs that it finds most suspicious and 50 random others, as a control, were mixed, and each was
judged from its picture and caption alone, without knowing which it was:

* *misfit*: the name (up to the first comma) says something that is not what is drawn;
* *unclear*: the picture does not show whether the name is right, such as a place or a custom that
  stands for a drawing that could be many things;
* *fits*: the name is one that the picture may well have. Dull, vague or incomplete is no misfit.

The verdicts are in `results/natural_verdicts.csv`, one line for each pair.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console

from hf_ecif.data import load_rows
from hf_ecif.words import shorten
from tests.benchmarks.shared import (
    DEMO,
    RESULTS,
    embedded,
    find_wrong,
    parser,
    print_table,
    save,
    write_table,
)

VERDICTS = RESULTS / "natural_verdicts.csv"
COUNT = 50
KINDS = ("misfit", "unclear", "fits")
COLOURS = {"misfit": "tab:red", "unclear": "tab:orange", "fits": "tab:green", "": "black"}


@dataclass(frozen=True)
class Pair:
    """A pair to be judged.

    Attributes:
        row: its number in the split.
        probability: of being misaligned, by the detector.
        clip_score: under the model as given.
        flagged: by the detector at its own threshold.
        suspicious: among the most suspicious, or of the control.
        verdict: by hand; empty if it was not judged.
    """

    row: int
    probability: float
    clip_score: float
    flagged: bool
    suspicious: bool
    verdict: str


def main() -> None:
    options = parser(__doc__, "natural")
    options.add_argument("--sheet", type=Path, help="of pictures to judge, an image file")
    args = options.parse_args()
    split, count = ("test", 10) if args.quick else ("train", COUNT)
    rows = load_rows(str(DEMO / "data"), split)
    pairs, facts = rank(rows, count, {} if args.quick else read_verdicts())
    if args.sheet:
        draw_sheet(rows, blind_order(pairs), args.sheet)
        return
    results = {"counts": {name: counts(pairs, name == "suspicious") for name in GROUPS}} | facts
    save(args.output, {"split": split, "pairs": count}, results | {"pairs": list(map(vars, pairs))})
    draw(rows, [pair for pair in pairs if pair.suspicious], args.output.with_suffix(".png"))
    heading, lines = table(results)
    note = __doc__.split("\n\n", 2)[2].strip()
    write_table(args.output, "Mismatches that nobody made", heading, lines, note)
    print_table("Captions that nobody exchanged", heading, lines)


def rank(
    rows: Dataset, count: int, verdicts: dict[int, str]
) -> tuple[list[Pair], dict[str, float]]:
    """The most suspicious rows in order, then random others; and what the detector says of all."""
    data = embedded()
    read = data.model.read(rows, text_column="original_text")
    scores, detection = find_wrong(data.model, read, data.query)
    cosine = data.model.score_as_given(read).clip_score.numpy()
    order = np.argsort(-detection.probability)
    others = np.random.default_rng(0).permutation(order[count:])[:count]
    pairs = [
        Pair(
            row=int(row),
            probability=float(detection.probability[row]),
            clip_score=float(cosine[row]),
            flagged=bool(detection.flag[row]),
            suspicious=number < count,
            verdict=verdicts.get(int(row), ""),
        )
        for number, row in enumerate([*order[:count], *others])
    ]
    rates = {"noise rate": detection.noise_rate, "flagged": float(detection.flag.mean())}
    return pairs, rates
