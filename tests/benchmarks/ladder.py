"""Do verdicts hold where the model is weak? A ladder from what it knows to what it cannot read.

    python -m tests.benchmarks.ladder            # 7 rungs; fetches icon sets into runs/ladder
    python -m tests.benchmarks.ladder --quick    # 4 rungs that need no packages, one seed

Rungs: drawings like those the model knows (*home*), those of another vendor, in one colour,
interface icons captioned by their names, handwritten digits, captions in an alphabet that the model
has never read, and the same model with random weights. On each, 600 right pairs are drawn, and
none, 5, 20 or 40 % of their captions exchanged. 100 other pairs are the query, and 100 more right
pairs are in the fit beside the data. The same fit is judged twice: with these pairs known to be
right (*verified*), and without them.

Must hold: the Brier score is never above that of the true rate as a constant; the rate is within 5
points of the true one; 3 % of the pairs are flagged at most where nothing is wrong; the ranking is
not behind the best of CLIPScore and NegCLIPLoss, before and after the fit, picked with the truth in
hand. Where the model cannot tell, it has to say so: it flags nothing and gives no probability.

Settings of the detector were chosen on other draws of these rungs, seeds 0 and 1; here seeds are
100 and on, of the drawn rows, the exchange and the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from sklearn.metrics import average_precision_score

from hf_ecif.config import InfluenceConfig
from hf_ecif.detection.detect import RIGHT, Detection, detect
from hf_ecif.detection.injection import inject_mismatches
from hf_ecif.detection.signals import TRUST, signals_of_rows
from tests.benchmarks.ladder_rungs import AT_HAND, RUNGS, read_rung
from tests.benchmarks.shared import exchange, parser, print_table, save, write_table

ROWS, QUICK_ROWS, VERIFIED, QUERY = 600, 240, 100, 100
RATES, QUICK_RATES = (0.0, 0.05, 0.2, 0.4), (0.0, 0.2)
SEEDS, FIRST_SEED = 2, 100
BINS = np.linspace(0, 1, 11)
TITLE = "Verdicts on a ladder of domains"
HEADING = (
    "pairs",
    "wrong",
    "verified",
    "estimated rate",
    "in the interval",
    "right pairs flagged",
    "Brier (constant)",
    "AUPRC (best plain)",
    "abstains",
)
NOTE = (__doc__ or "").split("\n\n", 2)[2].strip()


@dataclass(frozen=True)
class Cell:
    """A share of wrong captions on a rung."""

    rung: str
    rate: float


def main() -> None:
    options = parser(__doc__, "ladder")
    options.add_argument("--assets", type=Path, default=Path("runs/ladder"), help="of icon sets")
    options.add_argument("--seeds", type=int, default=SEEDS)
    options.add_argument("--only", nargs="+", choices=RUNGS, help="some of the rungs")
    args = options.parse_args()
    rungs = args.only or (AT_HAND if args.quick else tuple(RUNGS))
    rates, rows = (QUICK_RATES, QUICK_ROWS) if args.quick else (RATES, ROWS)
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if args.quick else args.seeds))
    results: list[dict[str, Any]] = [
        {"rung": rung, "rate": rate, "runs": []} for rung in rungs for rate in rates
    ]
    settings = {"rows": rows, "verified": VERIFIED, "query": QUERY, "seeds": list(seeds)}
    settings |= {"config": InfluenceConfig().to_dict()}
    # Rung by rung within a share of wrong pairs, so that a run that is cut short has seen them all.
    order = sorted(results, key=lambda cell: [0.2, 0.0, 0.4, 0.05].index(cell["rate"]))
    steps = [(seed, cell) for seed in seeds for cell in order]
    for seed, cell in track(steps, "Climb", console=Console(stderr=True)):
        cell["runs"] += judge_cell(Cell(cell["rung"], cell["rate"]), seed, rows, args.assets)
        report(args.output, settings, [cell for cell in results if cell["runs"]])
    print_table(TITLE, HEADING, lines(results))


def report(path: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the record of what has been judged so far."""
    save(path, settings, results)
    draw(results, path.with_suffix(".png"))
    write_table(path, TITLE, HEADING, lines(results), note=NOTE)


def judge_cell(cell: Cell, seed: int, count: int, assets: Path) -> Iterator[dict[str, Any]]:
    """What the detector makes of one draw, with and without verified rows."""
    rung = read_rung(cell.rung, assets)
    model = rung.model
    model.config = replace(InfluenceConfig(), seed=seed)
    order = torch.randperm(len(rung.rows), generator=torch.Generator().manual_seed(seed))
    drawn, query = rung.rows.select(order[: count + VERIFIED]), order[count + VERIFIED :][:QUERY]
    exchanged = exchange(drawn.select(torch.arange(count)), [""] * count, cell.rate, "random", seed)
    donors = np.concatenate([exchanged.donors, np.arange(count, count + VERIFIED)])
    rows = drawn.with_texts_of(torch.from_numpy(donors))

    influence = model.fit(rows, rung.rows.select(query))
    scores, given = influence.scores(), model.score_as_given(rows)
    signals, injected = (
        signals_of_rows(model, rows, scores).stack(),
        inject_mismatches(model, influence, rung.rows.select(query)),
    )
    plain = {
        "CLIPScore": -scores.clip_score,
        "NegCLIPLoss": scores.loss,
        "CLIPScore before": -given.clip_score,
        "NegCLIPLoss before": given.loss,
    }
    data = slice(count)
    ranked = {
        name: precision(exchanged.wrong, value.numpy()[data]) for name, value in plain.items()
    }
    for known in (True, False):
        verdicts = np.zeros(len(rows), dtype=int)
        verdicts[count:] = RIGHT if known else 0
        # Without verdicts, the rows beyond the data are left out, as if they had never been there.
        kept = np.arange(len(rows)) if known else np.arange(count)
        of_reference = np.isin(injected.rows, kept)
        detection = detect(
            signals[kept],
            injected.reference[of_reference],
            injected.kinds,
            verdicts=verdicts[kept],
            reference_verdicts=verdicts[injected.rows[of_reference]],
            trust=TRUST,
            exchanged=injected.exchanged,
        )
        yield {"seed": seed, "verified": known, "plain": ranked} | figures(
            detection, exchanged.wrong, data
        )


def figures(detection: Detection, wrong: NDArray[np.bool_], data: slice) -> dict[str, Any]:
    """The verdicts beside the truth."""
    probability, flag = detection.probability[data], detection.flag[data]
    low, high = detection.rate_interval
    true = float(wrong.mean())
    return {
        "true rate": true,
        "rate": detection.noise_rate,
        "interval": [low, high],
        "abstains": detection.abstains is not None,
        "power": detection.injected_auroc,
        "flagged": float(flag.mean()),
        "right pairs flagged": float(flag[~wrong].mean()),
        "Brier": none_if_nan(float(np.mean((probability - wrong) ** 2))),
        "constant": true * (1 - true),
        "AUPRC": precision(wrong, detection.suspicion[data]),
        "reliability": reliability(probability, wrong),
    }


def precision(wrong: NDArray[np.bool_], suspicion: NDArray[np.floating]) -> float | None:
    return float(average_precision_score(wrong, suspicion)) if wrong.any() else None


def none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def reliability(
    probability: NDArray[np.float64], wrong: NDArray[np.bool_]
) -> list[tuple[int, float, int]]:
    """Rows, mean probability and wrong rows of every bin of the probability that has rows."""
    if np.isnan(probability).any():
        return []
    bins = np.clip(np.digitize(probability, BINS) - 1, 0, len(BINS) - 2)
    return [
        (int(here.sum()), float(probability[here].mean()), int(wrong[here].sum()))
        for here in (bins == number for number in range(len(BINS) - 1))
        if here.any()
    ]


# ---------------------------------------------------------------------------------- the report


def lines(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for cell in results:
        for known in (True, False):
            runs = [run for run in cell["runs"] if run["verified"] == known]
            abstaining = sum(run["abstains"] for run in runs)
            yield (
                cell["rung"],
                f"{cell['rate']:.0%}",
                "100" if known else "none",
                told_rate(runs, bound=abstaining == len(runs)),
                f"{sum(is_inside(run) for run in runs)} of {len(runs)}",
                f"{np.mean([run['right pairs flagged'] for run in runs]):.1%}",
                f"{mean(runs, 'Brier')} ({mean(runs, 'constant')})",
                f"{mean(runs, 'AUPRC')} ({best_plain(runs)})",
                f"{abstaining} of {len(runs)}" if abstaining else "",
            )


def told_rate(runs: Sequence[dict[str, Any]], bound: bool) -> str:
    rates = [run["rate"] for run in runs]
    return f"at most {min(rates):.2f}" if bound else f"{np.mean(rates):.3f}"


def is_inside(run: dict[str, Any]) -> bool:
    low, high = run["interval"]
    return bool(low <= run["true rate"] <= high)


def mean(runs: Sequence[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if run[name] is not None]
    return f"{np.mean(values):.3f}" if values else "–"


def best_plain(runs: Sequence[dict[str, Any]]) -> str:
    """The best of the plain scores in the mean over the seeds."""
    if runs[0]["plain"]["CLIPScore"] is None:
        return "–"
    return f"{max(np.mean([run['plain'][name] for run in runs]) for name in runs[0]['plain']):.3f}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """How often pairs of a probability are wrong, over all shares of wrong pairs."""
    rungs = list(dict.fromkeys(cell["rung"] for cell in results))
    canvas, axes = plt.subplots(
        1, len(rungs), figsize=(2.6 * len(rungs), 3), sharey=True, layout="constrained"
    )
    for axis, rung in zip(np.atleast_1d(axes), rungs, strict=True):
        axis.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        for known, label in ((True, "verified rows"), (False, "none")):
            points = curve(
                run
                for cell in results
                for run in cell["runs"]
                if cell["rung"] == rung and run["verified"] == known
            )
            if points.size:
                axis.plot(*points, "o-", markersize=3, label=label)
        axis.set(title=rung, xlabel="probability", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        if not axis.get_legend_handles_labels()[0]:
            axis.text(0.5, 0.5, "abstains", ha="center")
    axes = np.atleast_1d(axes)
    axes[0].set_ylabel("share wrong")
    axes[0].legend(fontsize=8)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def curve(runs: Iterator[dict[str, Any]]) -> NDArray[np.float64]:
    """Mean probability and share of wrong rows of every bin, ``(2, bins)``."""
    bins: dict[int, NDArray[np.float64]] = {}
    for run in runs:
        for rows, probability, wrong in run["reliability"]:
            place = min(int(probability * (len(BINS) - 1)), len(BINS) - 2)
            added = np.array([rows, rows * probability, wrong])
            bins[place] = bins.get(place, np.zeros(3)) + added
    sums = np.array([bins[place] for place in sorted(bins)]).reshape(-1, 3)
    return np.stack([sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]]) if len(sums) else sums


if __name__ == "__main__":
    main()
