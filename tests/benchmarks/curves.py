"""Removal curves: better without what is harmful, and worse without what is valuable?

    python -m tests.benchmarks.curves            # 5 seeds, a few minutes
    python -m tests.benchmarks.curves --quick    # 2 seeds of 400 pairs, two shares

The embedded data with their wrong captions, projections attributed, scored for the validation split
as the query. From 5 to 30 % of the pairs are removed and the projections fitted again from the
pretrained ones, with as many steps however many pairs are left; what counts is the test split,
which nothing else has seen. A seed is that of the fit that scores, of the random order and of the
batches. Beside the scores, in both directions, and a random order go the most harmful by gradients
alone (TracIn's limit: no curvature, the same fit), the most harmful in rounds (fit, score and let
go of a twentieth of the rows, again and again), and the pairs with the lowest CLIPScore under the
model as given.

Asked for: at every share the loss without the most harmful is below that of a random removal, and
that below the loss without the most valuable (paired over the seeds); and the more is removed, the
further they go.

The last does not hold for the most harmful: the test loss is lowest without the first twentieth. It
is not that scores do not add up, or grow old: in rounds the curve turns as well, only later, and by
unrolled scores it is the same. The query's own loss falls all the way, as the scores foretell, and
the record has that curve, too. But it is the loss of 200 rows, and beyond the first tenth, which is
mostly wrong, what harms these rows need not harm others. With 50 or 100 of its rows as the query
this is plainer: without the first tenth the test loss was 1.17 and 1.19 (with all 200: 1.14; with
nothing removed: 1.19; two seeds).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor

from hf_ecif.applications.valuation import SHARES, Curve, removal_curves, removal_orders
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.progress import progress_bars
from tests.benchmarks.shared import Embedded, embedded, parser, print_table, save, write_table

Floats = NDArray[np.float64]
HARMFUL, RANDOM, VALUABLE = "most harmful", "random", "most valuable"
GRADIENT, COSINE = "most harmful, no curvature", "lowest CLIPScore"
ROUNDS, ROUND = "most harmful, in rounds", 0.05
MEASURES = {"losses": "test loss, nats", "recalls": "test R@1"}
QUERY = {"losses": "the query's loss, nats"}


def main() -> None:
    args = parser(__doc__, "curves").parse_args()
    torch.set_num_threads(1)
    seeds, shares = (2, (0.1, 0.3)) if args.quick else (5, SHARES)
    data = embedded(quick=args.quick)
    rows = data.model.read(data.train)
    orders = orders_of_seeds(data, rows, seeds, max(shares))
    with progress_bars(Console(stderr=True)) as progress:
        curves = removal_curves(
            data.model, rows, data.test, orders, shares=shares, progress=progress
        )
        harmful = {name: orders[name] for name in (HARMFUL, ROUNDS)}
        of_query = removal_curves(
            data.model, rows, data.query, harmful, shares=shares, progress=progress
        )
    verdict = judge({curve.name: np.array(curve.losses) for curve in curves}, shares)
    settings = {"seeds": seeds, "shares": shares, "config": data.model.config.to_dict()}
    results = {
        "curves": [asdict(one) for one in curves],
        "curves of the query": [asdict(one) for one in of_query],
        "verdict": verdict,
    }
    save(args.output, settings, results)
    draw(curves, args.output.with_suffix(".png"))
    heading = ("removed first", "measure", *(f"{share:.0%}" for share in (0.0, *shares)))
    table = (
        "Removal curves",
        heading,
        [*table_rows(curves, MEASURES), *table_rows(of_query, QUERY)],
    )
    print_table(*table)
    note = f"Mean ± standard error over {seeds} seeds. {in_words(verdict)}"
    print(note)
    write_table(args.output, *table, note=note)


def orders_of_seeds(data: Embedded, rows: Rows, seeds: int, upto: float) -> dict[str, list[Tensor]]:
    """An order of removal of each kind for every seed, up to a share of the rows."""
    cosine = data.model.score_as_given(rows).clip_score
    found: dict[str, list[Tensor]] = {}
    for seed in range(seeds):
        score = score_by(data, rows, seed)
        for name, [order] in removal_orders(score, 1, seed).items():
            found.setdefault(name, []).append(order)
        without = score_by(data, rows, seed, solver="identity")
        found.setdefault(GRADIENT, []).append(without.argsort())
        found.setdefault(ROUNDS, []).append(order_in_rounds(data, rows, seed, upto))
        found.setdefault(COSINE, []).append(cosine.argsort())
    return found


def order_in_rounds(data: Embedded, rows: Rows, seed: int, upto: float) -> Tensor:
    """The most harmful of what is left, `ROUND` of the rows at a time, until a share is gone."""
    left, gone = torch.arange(len(rows)), list[Tensor]()
    while sum(map(len, gone)) < round(upto * len(rows)):
        order = score_by(data, rows.select(left), seed).argsort()
        first, rest = order.tensor_split([round(ROUND * len(rows))])
        gone.append(left[first])
        left = left[rest.sort().values]
    return torch.cat([*gone, left])


def score_by(data: Embedded, rows: Rows, seed: int, **changes: Any) -> Tensor:
    """Task scores ``(N,)`` by a fit of this seed."""
    model: InfluenceModel = data.model
    given, model.config = model.config, replace(model.config, seed=seed, probes=1, **changes)
    scores = model.fit(rows, data.query).scores().task
    model.config = given
    return scores


def judge(losses: dict[str, Floats], shares: Sequence[float]) -> dict[str, Any]:
    """Differences paired over the seeds at every share, and how the curves go with the share.

    Args:
        losses: by order, ``(1 + M, seeds)``, the first with nothing removed.
        shares: ``M``.
    """
    pairs = {
        "random - harmful": losses[RANDOM] - losses[HARMFUL],
        "valuable - random": losses[VALUABLE] - losses[RANDOM],
    }
    return {
        "differences": {
            name: {
                f"{share:.0%}": {"mean": gap.mean(), "stderr": gap.std(ddof=1) / len(gap) ** 0.5}
                for share, gap in zip(shares, gaps[1:], strict=True)
            }
            for name, gaps in pairs.items()
        },
        "rank correlation of share and loss": {
            name: float(spearmanr([0.0, *shares], values.mean(axis=1)).statistic)
            for name, values in losses.items()
        },
    }


# ---------------------------------------------------------------------------------- the report


def table_rows(curves: list[Curve], measures: dict[str, str]) -> Iterator[tuple[str, ...]]:
    for measure, label in measures.items():
        for curve in curves:
            values = np.array(getattr(curve, measure))
            errors = values.std(axis=1, ddof=1) / values.shape[1] ** 0.5
            cells = zip(values.mean(axis=1), errors, strict=True)
            yield curve.name, label, *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells)


def in_words(verdict: dict[str, Any]) -> str:
    parts = []
    for name, by_share in verdict["differences"].items():
        clear = sum(gap["mean"] > 2 * gap["stderr"] for gap in by_share.values())
        parts.append(
            f"{name} loss is above two standard errors at {clear} of {len(by_share)} shares"
        )
    trend = verdict["rank correlation of share and loss"]
    parts.append(
        "rank correlation of share and loss: "
        + ", ".join(f"{name} {trend[name]:.2f}" for name in (HARMFUL, RANDOM, VALUABLE))
    )
    return "; ".join(parts) + "."


def draw(curves: list[Curve], path: Path) -> None:
    """A panel for each measure."""
    canvas, axes = plt.subplots(1, len(MEASURES), figsize=(11, 4), layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for curve, style in zip(curves, ("o-", "s--", "^-", "v:", "*:", "d:"), strict=True):
            values = np.array(getattr(curve, measure))
            error = values.std(axis=1, ddof=1) / values.shape[1] ** 0.5
            percent = 100 * np.array(curve.shares)
            axis.errorbar(
                percent, values.mean(axis=1), error, fmt=style, capsize=3, label=curve.name
            )
        axis.set(xlabel="pairs removed, percent", ylabel=label)
    axes[0].legend(fontsize=8)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main()
