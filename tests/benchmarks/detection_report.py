"""Table and figures of `tests.benchmarks.detection`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from hf_ecif.utils.formatting import shorten
from tests.benchmarks.shared import Exchanged, write_table
from tests.benchmarks.signals import FIXED, OURS, TUNED

Summary = dict[str, Any]
SHOWN = (OURS, *FIXED, *TUNED)
PARTS = (
    "ecif_loo_loss",
    "ecif_self",
    "ecif_score",
    "ecif_positive",
    "ecif_negative",
    "ecif_image_neighbours",
    "ecif_text_neighbours",
)
NOTE = """Mean ± standard error over the seeds. *Verdict*: ours minus the best baseline as published
and, in brackets, minus the best of those and of the tuned ones, in AUPRC, with 95 % of a paired
bootstrap. The detector's settings were chosen on *as shipped*, and on the same pictures with other
noise; nothing was chosen on *emoji, test* and *digits*. Wrong captions are copies of right ones
here: LEMoN is tuned without neighbours that have the very caption, which would tell how the noise
was made."""


def write(path: Path, summaries: list[Summary]) -> None:
    """Markdown and figures beside a record, and the verdicts on the terminal."""
    draw(summaries, path.with_suffix(".png"))
    heading, rows = table(summaries)
    top = f"![The most suspicious pairs]({path.stem}_top.jpg)"
    write_table(path, "Finding misaligned captions", heading, rows, f"{NOTE}\n\n{top}")
    console, printed = Console(width=130), Table("cell", OURS, "best baseline", "verdict")
    for one in summaries:
        published = one["against"]["as published"]
        best = published["baseline"]
        printed.add_row(
            one["cell"],
            figure(one["methods"][OURS]["AUPRC"]),
            f"{best} {figure(one['methods'][best]['AUPRC'])}",
            verdict(one),
        )
    console.print(printed)


def table(summaries: list[Summary]) -> tuple[list[str], list[list[str]]]:
    """A row for each cell and measure."""
    heading = ["cell", "seeds", "measure", *SHOWN, *PARTS, "verdict"]
    rows = []
    for one in summaries:
        seeds = str(len(one["own threshold"]["F1"]))
        for measure in ("AUPRC", "AUROC", "P@10", "P@20", "best F1"):
            cells = [
                figure(one["methods"][name][measure]) if name in one["methods"] else ""
                for name in (*SHOWN, *PARTS)
            ]
            last = verdict(one) if measure == "AUPRC" else ""
            rows.append([one["cell"], seeds, measure, *cells, last])
        own = one["own threshold"]["F1"]
        blank = [""] * (len(heading) - 4)
        rows.append([one["cell"], seeds, "F1 at own threshold", figure(own), *blank])
    return heading, rows


def verdict(one: Summary) -> str:
    """In words, for both sets of baselines."""
    parts = [difference(found) for found in one["against"].values()]
    return f"{parts[0]} ({parts[1]})" if len(set(parts)) > 1 else parts[0]


def difference(against: dict[str, Any]) -> str:
    """In AUPRC, with its interval."""
    by = against["differences"]["AUPRC"]
    interval = f"{by['difference']:+.3f} [{by['low']:+.3f}, {by['high']:+.3f}]"
    return f"{against['verdict']} {against['baseline']}: {interval}"


def figure(values: list[float]) -> str:
    """Mean, and its standard error where there are several seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {error(values):.3f}"


def error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def draw(summaries: list[Summary], path: Path) -> None:
    """AUPRC of the methods, a panel for each group of cells."""
    groups: dict[str, list[Summary]] = {}
    for one in summaries:
        cell = one["of"]
        name = f"{cell['data']}, {cell['kind'] or 'as shipped'}, {cell['state']}"
        if cell["parameters"] == "projections" and cell["rate"]:
            groups.setdefault(name, []).append(one)
    if not groups:
        return
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    canvas, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (name, cells) in zip(axes.flat, groups.items(), strict=False):
        axis.set_visible(True)
        axis.set_title(name, fontsize=9)
        rates = [100 * one["of"]["rate"] for one in cells]
        for method in SHOWN:
            values = [one["methods"][method]["AUPRC"] for one in cells]
            means, errors = [np.mean(v) for v in values], [error(v) for v in values]
            thick = {"linewidth": 2.2, "color": "black"} if method == OURS else {"linewidth": 1}
            axis.errorbar(rates, means, errors, marker=".", capsize=2, label=method, **thick)
        axis.set(xlabel="wrong captions, percent", ylabel="AUPRC", xticks=rates)
    canvas.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


@dataclass(frozen=True)
class Line:
    """Pairs of a cell to be shown.

    Attributes:
        name: of the cell.
        pictures: of the data set.
        truth: and its captions.
        rows: the most suspicious first.
    """

    name: str
    pictures: Dataset
    truth: Exchanged
    rows: list[int]


def draw_top(lines: list[Line], path: Path) -> None:
    """The pairs that ours finds most suspicious, and whether they are wrong in truth."""
    columns = max(len(line.rows) for line in lines)
    canvas, axes = plt.subplots(
        len(lines),
        columns,
        figsize=(1.5 * columns, 2.2 * len(lines)),
        squeeze=False,
        layout="constrained",
    )
    for line, of_line in zip(lines, axes, strict=True):
        hits = int(line.truth.wrong[line.rows].sum())
        of_line[0].set_title(
            f"{line.name}: {hits} of {len(line.rows)} wrong", fontsize=8, loc="left"
        )
        for axis, row in zip(of_line, line.rows, strict=True):
            wrong = line.truth.wrong[row]
            caption = shorten(line.truth.rows.texts[row], 50)
            colour, word = ("tab:red", "wrong") if wrong else ("tab:green", "right, false alarm")
            axis.imshow(line.pictures[row]["image"].convert("RGB"))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"{fill(caption, 25)}\n{word}", fontsize=6.5, color=colour)
    canvas.savefig(path, dpi=90)
    plt.close(canvas)
