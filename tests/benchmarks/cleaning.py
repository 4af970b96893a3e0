"""Does cleaning help? Fine-tuned on noisy, cleaned and truly clean rows, with equal budgets.

    python -m tests.benchmarks.cleaning                         # hours: all that is below
    python -m tests.benchmarks.cleaning --settings projections  # without the last block
    python -m tests.benchmarks.cleaning --quick                 # 2 seeds of 400 rows, 40 %

Captions of the embedded data are exchanged, 20 or 40 % of them, with any other row (random) or one
of the same category (cat), for 20 seeds; where the last block is trained, 40 % for 3 seeds. The
detector flags rows as an audit with default settings would; it sees the noisy rows and the
validation split. The embedded model is then fine-tuned on

* noisy: all rows;
* cleaned: without the flagged rows;
* oracle: without the truly wrong rows;
* random: without as many rows as were flagged, chosen at random;
* CLIPScore: without as many, those with the lowest cosine under the model as given,

each with as many steps in batches of the same size, and the same seed of the batches. What is
measured, on the test split, is R@1 (mean of both directions of retrieval), R@1 from images to
captions alone, and the contrastive loss. *Recovered* is the share of the way from noisy to oracle,
of the means over the seeds, with a 95 % interval over bootstrap samples of the seeds. Where the gap
between noisy and oracle is below two standard errors, noise does no harm that could be recovered,
and no share is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.cleaning import UNTRAINED
from hf_ecif.influence.retraining import Outcome, Version, compare, random_subset
from hf_ecif.influence.rows import Rows
from tests.benchmarks.shared import (
    Embedded,
    Exchanged,
    embedded,
    exchange,
    find_wrong,
    parser,
    print_table,
    save,
    write_table,
)

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
KINDS = ("random", "cat")


@dataclass(frozen=True)
class Setting:
    """What is trained, in the default recipe, and on how much noise how often."""

    config: InfluenceConfig
    rates: tuple[float, ...]
    seeds: int


# Chosen by the gap between noisy and oracle alone.
SETTINGS = {
    "projections": Setting(InfluenceConfig(), (0.2, 0.4), 20),
    "last_block": Setting(InfluenceConfig(parameters="last_block"), (0.4,), 3),
}
QUICK = {"projections": Setting(InfluenceConfig(), (0.4,), 2)}
VERSIONS = ("noisy", "cleaned", "oracle", "random", "CLIPScore")
IMAGE_TO_TEXT = "image_to_text_recall@1"
LABELS = {"R@1": "R@1", IMAGE_TO_TEXT: "image-to-text R@1", "loss": "loss"}
MEASURES = tuple(LABELS)
RESAMPLES = 2000


def main() -> None:
    options = parser(__doc__, "cleaning")
    options.add_argument("--settings", nargs="*", choices=list(SETTINGS))
    options.add_argument("--seeds", type=int, help="other than those above")
    args = options.parse_args()
    settings = QUICK if args.quick else {n: SETTINGS[n] for n in args.settings or SETTINGS}
    if args.seeds:
        settings = {name: replace(one, seeds=args.seeds) for name, one in settings.items()}
    rates = sorted({rate for setting in settings.values() for rate in setting.rates})
    noises = [Noise(rate, kind) for rate in rates for kind in KINDS]
    detector = embedded(quick=args.quick)
    original = read_original(detector)
    seeds = max(setting.seeds for setting in settings.values())
    for noise in track(noises, "Detect", console=Console(stderr=True)):
        noise.detect(detector, original, seeds)
    results = []
    for name, setting in settings.items():
        trained = embedded(setting.config, quick=args.quick)
        rows = read_original(trained)
        chosen = [noise for noise in noises if noise.rate in setting.rates]
        cells = [noise.train(trained, rows, setting.seeds) for noise in chosen]
        results.append({"trained": name, "cells": cells, "all cells": pooled(cells)})
    record = {
        "settings": {name: asdict(setting) for name, setting in settings.items()},
        "wrong rows and their donors, by seed": {
            noise.name: [one.index for one in noise.exchanged] for noise in noises
        },
    }
    save(args.output, record, results)
    draw(results, args.output.with_suffix(".png"))
    table = ("Fine-tuned before and after cleaning", HEADING, [*table_rows(results)])
    print_table(*table)
    write_table(args.output, *table, note=note_on(results))


def read_original(data: Embedded) -> Rows:
    """The training rows with the captions that they had before any were exchanged."""
    return data.model.read(data.train, text_column="original_text")


class Noise:
    """Rows made wrong in one way, for several seeds, and what is to be kept of them.

    Attributes:
        exchanged: by seed.
        kept: by name of the version and seed, ``(N,)``.
    """

    def __init__(self, rate: float, kind: str) -> None:
        self.rate, self.kind = rate, kind
        self.name = f"{rate:.0%} {kind}"
        self.exchanged: list[Exchanged] = []
        self.kept: dict[str, list[Bools]] = {name: [] for name in VERSIONS}

    def make(self, data: Embedded, original: Rows, seed: int) -> Exchanged:
        return exchange(original, data.train["category"][:], self.rate, self.kind, seed)

    def detect(self, data: Embedded, original: Rows, seeds: int) -> None:
        """Decide what each version keeps."""
        for seed in range(seeds):
            one = self.make(data, original, seed)
            _, detection = find_wrong(data.model, one.rows, data.query)
            cosine = data.model.score_as_given(one.rows).clip_score
            count = int(detection.flag.sum())
            low = torch.zeros(len(one.rows), dtype=torch.bool)
            low[cosine.argsort()[:count]] = True
            drawn = random_subset(one.rows, len(one.rows) - count, seed).positions
            self.exchanged.append(one)
            self.kept["noisy"].append(np.ones(len(one.rows), dtype=bool))
            self.kept["cleaned"].append(~detection.flag)
            self.kept["oracle"].append(~one.wrong)
            self.kept["random"].append(np.isin(one.rows.positions.numpy(), drawn.numpy()))
            self.kept["CLIPScore"].append(~low.numpy())

    def train(self, data: Embedded, original: Rows, seeds: int) -> dict[str, Any]:
        """Fine-tune on every version for the first seeds, and measure."""
        rows = [self.make(data, original, seed).rows for seed in range(seeds)]
        versions = {
            name: [
                Version(all_rows.select(torch.from_numpy(kept).nonzero()[:, 0]))
                for all_rows, kept in zip(rows, self.kept[name], strict=False)
            ]
            for name in VERSIONS
        }
        outcomes = compare(data.model, versions, data.test)
        values = {one.version: values_of(one) for one in outcomes}
        truth = [one.wrong for one in self.exchanged]
        return {
            "noise": self.name,
            "outcomes": [asdict(one) for one in outcomes],
            "wrong among kept": {
                name: float(np.mean([t[k].mean() for t, k in zip(truth, kept, strict=True)]))
                for name, kept in self.kept.items()
            },
            "values": values,
            "summary": {name: summarise(values, name) for name in MEASURES},
        }


def values_of(outcome: Outcome) -> dict[str, list[float]]:
    """Of each measure, one for each seed."""
    both = [outcome.values[f"{way}_recall@1"] for way in ("text_to_image", "image_to_text")]
    return {"R@1": np.mean(both, axis=0).tolist()} | {
        name: outcome.values[name] for name in MEASURES[1:]
    }


def pooled(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The same summary over all cells; a seed stands for itself in all of them."""
    values = {
        version: {
            name: np.mean([cell["values"][version][name] for cell in cells], axis=0).tolist()
            for name in MEASURES
        }
        for version in VERSIONS
    }
    return {name: summarise(values, name) for name in MEASURES}


def summarise(values: dict[str, dict[str, list[float]]], measure: str) -> dict[str, Any]:
    """Gap, and the share of it that each version recovers."""
    noisy, oracle = (np.array(values[name][measure]) for name in ("noisy", "oracle"))
    gap = oracle - noisy
    error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
    clear = abs(float(gap.mean())) > 2 * error
    return {
        "gap": float(gap.mean()),
        "gap_stderr": error,
        "recovered": {
            name: recovered(np.array(values[name][measure]) - noisy, gap) if clear else None
            for name in ("cleaned", "random", "CLIPScore")
        },
    }


def recovered(gain: Floats, gap: Floats) -> dict[str, float]:
    """Share of the gap, of sums over seeds, with its bootstrap interval."""
    picks = np.random.default_rng(0).integers(len(gap), size=(RESAMPLES, len(gap)))
    low, high = np.percentile(gain[picks].sum(axis=1) / gap[picks].sum(axis=1), [2.5, 97.5])
    return {"share": float(gain.sum() / gap.sum()), "low": float(low), "high": float(high)}


# ---------------------------------------------------------------------------------- the report


HEADING = ("trained", "noise", "measure", *VERSIONS, "recovered", "random", "CLIPScore")


def table_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for result in results:
        for cell in result["cells"]:
            for name in MEASURES:
                shown = [figure(cell["values"][version][name], name) for version in VERSIONS]
                summary = cell["summary"][name]["recovered"].values()
                yield result["trained"], cell["noise"], LABELS[name], *shown, *map(share, summary)
        for name in MEASURES:
            summary = result["all cells"][name]["recovered"].values()
            empty = [""] * len(VERSIONS)
            yield result["trained"], "all", LABELS[name], *empty, *map(share, summary)


def note_on(results: list[dict[str, Any]]) -> str:
    values = results[0]["cells"][0]["values"]
    untrained = {name: values[UNTRAINED][name][0] for name in MEASURES}
    return (
        "On the test: recall and accuracy in percent, mean ± standard error over "
        f"{len(values['noisy']['loss'])} seeds. Last columns: share of the gap between noisy and "
        "oracle that cleaning, a random removal and CLIPScore recover, with its 95 % interval. Not "
        f"fine-tuned at all: R@1 {untrained['R@1']:.1%}, image-to-text R@1 "
        f"{untrained[IMAGE_TO_TEXT]:.1%}, loss {untrained['loss']:.3f}."
    )


def figure(values: list[float], measure: str) -> str:
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    if measure == "loss":
        return f"{mean:.3f} ± {error:.3f}"
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def share(recovered: dict[str, float] | None) -> str:
    if recovered is None:
        return "no clear gap"
    return f"{recovered['share']:.0%} ({recovered['low']:.0%} to {recovered['high']:.0%})"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """R@1 of every version, a panel for each choice of trained parameters."""
    canvas, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 3.8), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        places = np.arange(len(result["cells"]))
        for number, version in enumerate(VERSIONS):
            values = 100 * np.array([cell["values"][version]["R@1"] for cell in result["cells"]])
            error = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
            shifted = places + 0.14 * (number - 2)
            axis.errorbar(shifted, values.mean(axis=1), error, fmt="o", capsize=3, label=version)
        axis.set_xticks(places, [cell["noise"] for cell in result["cells"]])
        axis.set(title=f"{result['trained']} fine-tuned", ylabel="R@1 of the test, percent")
    axes[0, 0].legend(fontsize=8)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main()
