"""How well misaligned captions are found on the embedded data, beside the usual scores.

    python -m tests.benchmarks.detection              # the shipped captions, and none wrong
    python -m tests.benchmarks.detection --seeds 5    # and freshly exchanged ones, 10-40 %

Every signal has its own row, higher meaning more suspicious. CLIPScore and NegCLIPLoss are given
before and after the attributed parameters are fitted to the noisy data.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import f1_score

from hf_ecif import metrics
from hf_ecif.config import InfluenceConfig
from hf_ecif.data import check_columns, load_rows
from hf_ecif.detection import detect
from hf_ecif.features import Rows
from hf_ecif.influence import InfluenceModel

DEMO = Path(__file__).parents[2] / "spaces_demo"
RESULTS = Path(__file__).parent / "results"
RATES = (0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Case:
    """A data set with known truth."""

    name: str
    rows: Rows
    wrong: NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=0, help="freshly exchanged captions, too")
    parser.add_argument("--output", type=Path, default=RESULTS / "detection.json")
    args = parser.parse_args()
    disable_progress_bars()

    model = InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig())
    train = check_columns(load_rows(str(DEMO / "data"), "train"), "image", "text")
    query = model.read(load_rows(str(DEMO / "data"), "validation"))
    results = []
    for case in cases(model, train, args.seeds):
        result = evaluate(model, case, query)
        print_table(result)
        results.append(result)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def cases(model: InfluenceModel, train: Dataset, seeds: int) -> list[Case]:
    """The shipped captions, the original ones, and for every seed, rate and kind exchanged ones."""
    original = model.read(train, text_column="original_text")
    shipped = Case("as shipped", model.read(train), np.array(train["is_misaligned"][:]))
    made = [
        exchange(original, train["category"][:], rate, kind, seed)
        for seed in range(seeds)
        for rate in RATES
        for kind in ("random", "cat")
    ]
    clean = Case("nothing wrong", original, np.zeros(len(original), dtype=bool))
    return [shipped, clean, *made]


def exchange(rows: Rows, categories: list[str], rate: float, kind: str, seed: int) -> Case:
    """Give a share of the rows the caption of another row, for ``cat`` one of the same category."""
    rng = random.Random(f"{rate} {kind} {seed}")
    donors = list(range(len(rows)))
    for i in rng.sample(donors, round(rate * len(rows))):
        donors[i] = rng.choice(
            [
                j
                for j, text in enumerate(rows.texts)
                if text != rows.texts[i] and (kind == "random" or categories[j] == categories[i])
            ]
        )
    chosen = torch.tensor(donors)
    wrong = (chosen != torch.arange(len(rows))).numpy()
    return Case(f"{rate:.0%} {kind}, seed {seed}", rows.with_texts_of(chosen), wrong)


def evaluate(model: InfluenceModel, case: Case, query: Rows) -> dict:
    """All signals of a case, and what the detector makes of them."""
    model.fit(case.rows, query)
    scores, given = model.score(case.rows), model.score_as_given(case.rows)
    detection = detect(model.signals(scores), *model.plant(case.rows, query))
    signals = {
        "CLIPScore, before the fit": -given.clip_score,
        "CLIPScore, after": -scores.clip_score,
        "NegCLIPLoss, before the fit": given.loss,
        "NegCLIPLoss, after": scores.loss,
        "ecif_self": scores.self_influence,
        "ecif_loo_loss": scores.loo_loss,
        "ecif_score": -scores.task,
        "ecif_positive": -scores.positive,
        "ecif_negative": -scores.negative,
        "ecif_relative": -scores.relative,
        "ecif_noise_probability": detection.probability.astype(np.float32),
    }
    return {
        "case": case.name,
        "rows": len(case.rows),
        "noise rate": float(case.wrong.mean()),
        "estimated noise rate": detection.noise_rate,
        "flagged": float(detection.flag.mean()),
        "signals": {name: rank(case.wrong, np.asarray(s)) for name, s in signals.items()}
        if case.wrong.any()
        else {},
        "F1": float(f1_score(case.wrong, detection.flag, zero_division=0.0)),
        "best F1": judge(case.wrong, detection.probability)["best_f1"] or 0.0,
    }


def rank(wrong: NDArray[np.bool_], signal: NDArray[np.float32]) -> dict[str, float]:
    result = judge(wrong, signal)
    names = {"AUROC": "auroc", "AUPRC": "auprc", "P@20": "precision_at_k", "best F1": "best_f1"}
    return {label: result[name] for label, name in names.items()}


def judge(wrong: NDArray[np.bool_], signal: NDArray[np.floating]) -> dict[str, Any]:
    return metrics.load("misalignment_detection").compute(predictions=signal, references=wrong)


def print_table(result: dict) -> None:
    console = Console(width=100)
    title = (
        f"{result['case']}: {result['rows']:,} rows, {result['noise rate']:.1%} wrong; estimated "
        f"{result['estimated noise rate']:.1%}, flagged {result['flagged']:.1%}"
    )
    if not result["signals"]:
        console.print(title)
        return
    table = Table("signal", "AUROC", "AUPRC", "P@20", "best F1", title=title)
    for name, figures in result["signals"].items():
        table.add_row(name, *(f"{value:.3f}" for value in figures.values()))
    console.print(table)
    console.print(f"F1 at the tool's own threshold {result['F1']:.3f}")


if __name__ == "__main__":
    main()
