"""How well misaligned captions are found on the embedded data, beside the usual scores.

    python -m tests.benchmarks.detection              # the shipped captions, and none wrong
    python -m tests.benchmarks.detection --seeds 5    # and freshly exchanged ones, 10-40 %
    python -m tests.benchmarks.detection --quick      # the shipped captions alone

Every signal has its own row, higher meaning more suspicious. CLIPScore and NegCLIPLoss are given
before and after the attributed parameters are fitted to the noisy data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import f1_score

from hf_ecif.features import Rows
from hf_ecif.influence import InfluenceModel

# Other benchmarks take the folders from here.
from tests.benchmarks.shared import (
    DEMO,  # noqa: F401
    RESULTS,  # noqa: F401
    Embedded,
    embedded,
    exchange,
    find_wrong,
    judge,
    parser,
    save,
)

RATES = (0.1, 0.2, 0.4)
KINDS = ("random", "cat")


@dataclass(frozen=True)
class Case:
    """A data set with known truth."""

    name: str
    rows: Rows
    wrong: NDArray[np.bool_]


def main() -> None:
    options = parser(__doc__, "detection")
    options.add_argument("--seeds", type=int, default=0, help="freshly exchanged captions, too")
    args = options.parse_args()
    data = embedded()
    results = []
    for case in cases(data, args.seeds, args.quick):
        result = evaluate(data.model, case, data.query)
        print_table(result)
        results.append(result)
    settings = {"seeds": args.seeds, "rates": RATES, "kinds": KINDS}
    save(args.output, settings | {"config": data.model.config.to_dict()}, results)


def cases(data: Embedded, seeds: int, quick: bool) -> Iterator[Case]:
    """The shipped captions, the original ones, and for every seed, rate and kind exchanged ones."""
    shipped = data.model.read(data.train)
    yield Case("as shipped", shipped, np.array(data.train["is_misaligned"][:]))
    if quick:
        return
    original = data.model.read(data.train, text_column="original_text")
    yield Case("nothing wrong", original, np.zeros(len(original), dtype=bool))
    categories = data.train["category"][:]
    for seed in range(seeds):
        for rate in RATES:
            for kind in KINDS:
                made = exchange(original, categories, rate, kind, seed)
                yield Case(f"{rate:.0%} {kind}, seed {seed}", made.rows, made.wrong)


def evaluate(model: InfluenceModel, case: Case, query: Rows) -> dict:
    """All signals of a case, and what the detector makes of them."""
    scores, detection = find_wrong(model, case.rows, query)
    given = model.score_as_given(case.rows)
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
