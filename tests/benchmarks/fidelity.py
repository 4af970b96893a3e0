"""Do scores foretell true retrainings? Single pairs, a tenth of the rows, halves of them.

    python -m tests.benchmarks.fidelity            # about two hours: all that is below
    python -m tests.benchmarks.fidelity --quick    # minutes: projections, a few retrainings of each
    python -m tests.benchmarks.fidelity --parts last_block lora --output LAYERS.json  # half an hour

Three kinds of truth, all for the contrastive loss of the validation split as the query:

* *leave one out*: 100 single pairs of 512. The order of Adam's batches moves the query by more than
  one pair does, so the fits are those of `tests.benchmarks.leverage`: a regularised objective in
  float64, minimised to convergence, again without each pair. Two weights of the penalty.
* *leave a tenth out* and *halves*: 50 random sets of rows each, by the model's own recipe from the
  pretrained weights, averaged over seeds that are common to all sets. The last block and LoRA, of
  which every training and every product goes through layers, have 40 and 30 halves of 400 rows in
  smaller batches, and no tenths. The rank correlation over halves is the linear datamodeling score
  (LDS). Its ceiling is what a perfect prediction would be expected to reach, from how far the seeds
  agree.

A set's predicted change is the sum of its rows' scores: by several dampings in units of the mean
eigenvalue, for the default damping also in the group form, in which the pairs leave together, and
unrolled through the steps of the fit. A retraining has as many epochs, hence fewer steps, half as
many on half of the rows: so a fit of fewer epochs and as many steps is unrolled, too.

Scores are those of one fit; its own seed decides a part of them, so there are several fits, each
scored on its own: given are mean and standard error over the fits, and for the first fit the 95 %
interval over bootstrap samples of the sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.solvers import ConjugateGradients, solve
from hf_ecif.engine.system import Spectrum, System, estimate_spectrum
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.leverage import change_without
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from tests.benchmarks import leverage
from tests.benchmarks.lds import Truth
from tests.benchmarks.lds import compare as compare_sets
from tests.benchmarks.leverage import Problem, minimise, moved_query, plain_scores
from tests.benchmarks.shared import (
    Embedded,
    embedded,
    origin,
    parser,
    print_table,
    save,
    write_table,
)

Floats = NDArray[np.float64]
DEFAULT = InfluenceConfig().damping
DAMPINGS = (0.01, 1.0, DEFAULT, 1000.0)
UNROLLED, EQUAL_STEPS = "unrolled", "unrolled, as many steps"
PENALTIES = (0.3, 0.03)
ALONE = "leave one out"
MODELS = {
    "projections": InfluenceConfig(probes=1),
    "last_block": InfluenceConfig(probes=1, parameters="last_block", batch_size=64),
    "lora": InfluenceConfig(probes=1, parameters="lora", batch_size=64),
}
SHARES = {"a tenth": 0.1, "halves": 0.5}
SEEDS_OF_TRUTH = {"a tenth": 8, "halves": 4}
QUICK = "projections"
CUT, CUT_FITS = 400, 2


@dataclass(frozen=True)
class Effort:
    """How many retrainings and fits."""

    pairs: int
    sets: int
    fits: int
    seeds: int | None  # as above where None
    quick: bool = False


@dataclass(frozen=True)
class Cut:
    """What is left where every retraining and every product goes through layers: halves alone.

    Attributes:
        sets: retrained on.
        seeds: of each.
        dampings: that a solve reaches in some tens of products.
    """

    sets: int
    seeds: int
    dampings: tuple[float, ...]


CUTS = {"last_block": Cut(40, 2, (DEFAULT, 1000.0)), "lora": Cut(30, 1, (1000.0,))}


def main() -> None:
    options = parser(__doc__, "fidelity")
    options.add_argument(
        "--parts",
        nargs="*",
        choices=[ALONE, *MODELS],
        help="only these; what the record says of others stays, with its commit",
    )
    args = options.parse_args()
    torch.set_num_threads(1)
    parts = args.parts or ([ALONE, QUICK] if args.quick else [ALONE, *MODELS])
    effort = Effort(8, 12, 2, 2, quick=True) if args.quick else Effort(100, 50, 3, None)
    results = known_beside(args.output, parts) if args.parts else []
    for part in parts:
        if part == ALONE:
            found = leave_one_out(PENALTIES[:1] if args.quick else PENALTIES, effort.pairs)
        else:
            found = leave_sets_out(part, effort)
        results += [one | {"commit": origin()["commit"]} for one in found]
        settings = {"effort": asdict(effort), "dampings": DAMPINGS, "rows of the cut": CUT}
        configs = {name: config.to_dict() for name, config in MODELS.items()}
        save(args.output, settings | {"configs": configs}, results)  # what is done is not lost
        draw(results, args.output.with_suffix(".png"))
        table = ("Predicted against true retraining", HEADING, [*table_rows(results)])
        print_table(*table)
        write_table(args.output, *table, note=note_on(effort))


def known_beside(path: Path, parts: Sequence[str]) -> list[dict[str, Any]]:
    """What a record says of other parts, each with the commit that it comes from."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    others = [one for one in record["results"] if one["part"] not in parts]
    return [{"commit": record["origin"]["commit"]} | one for one in others]


# -------------------------------------------------------------------------------- single pairs


def leave_one_out(penalties: tuple[float, ...], count: int) -> list[dict[str, Any]]:
    """Every method on the converged fits."""
    problem = leverage.read_problem()
    generator = torch.Generator().manual_seed(leverage.SEED + 1)
    chosen = torch.randperm(leverage.PAIRS, generator=generator)[:count]
    return [_leave_one_out(problem, l2, chosen) for l2 in penalties]


def _leave_one_out(problem: Problem, l2: float, chosen: Tensor) -> dict[str, Any]:
    theta, pairs = leverage.fit(problem, l2)
    at = problem.query_loss(theta)

    def true_change(row: int) -> float:
        loss = partial(problem.loss, l2=l2, gone=row)
        refitted = minimise(loss, theta, tolerance=1e-8, scaling=pairs)
        return problem.query_loss(refitted) - at

    true = np.array([true_change(row) for row in bar(chosen.tolist(), f"Leave one out, l2 {l2:g}")])
    objective = problem.objective(l2)
    product = partial(objective.ggn, theta)
    spectrum = estimate_spectrum(product, theta)
    query = problem.query_objective().gradient(theta)[None]

    def scores(damping: float, spectrum: Spectrum = spectrum) -> Floats:
        solver = ConjugateGradients(1e-6, 2000, preconditioner_rank=len(pairs.vectors))
        direction, _ = solve(System(product, spectrum, damping), query, solver)
        return plain_scores(problem, objective, theta, direction)[chosen].numpy()

    changes, _ = change_without(
        objective,
        theta,
        torch.eye(leverage.PAIRS, dtype=torch.bool)[chosen],
        leverage.UNIT,
        relative_damping=leverage.DAMPING,
        tolerance=1e-2,
        max_iterations=4000,
    )
    predictions = {
        "next to no damping": scores(leverage.DAMPING, leverage.UNIT),
        **{f"damping {damping:g}": scores(damping) for damping in DAMPINGS},
        "curvature without the pair": moved_query(problem, theta, changes).numpy(),
    }
    return {
        "part": ALONE,
        "truth": f"single pairs, l2 {l2:g}",
        "rows": chosen.tolist(),
        "true": true.tolist(),
        "predicted": {name: values.tolist() for name, values in predictions.items()},
        "query": {"start": problem.query_loss(problem.start), "fit": at},
        "methods": {name: _single(values, true) for name, values in predictions.items()},
    }


def _single(predicted: Floats, true: Floats) -> dict[str, Any]:
    result = leverage.compare("", predicted, true)
    figures = {name: getattr(result, name) for name in ("spearman", "low", "high", "slope")}
    return figures | {"stderr": None}


# ------------------------------------------------------------------------------- sets of rows


def leave_sets_out(name: str, effort: Effort) -> list[dict[str, Any]]:
    """Every method on sets of rows, for one choice of attributed parameters."""
    data = embedded(MODELS[name], quick=effort.quick)
    rows = data.model.read(data.train)
    if name == QUICK:
        shares, dampings, seeds = SHARES, DAMPINGS, SEEDS_OF_TRUTH
    else:
        cut = CUTS[name]
        shares, dampings, seeds = {"halves": SHARES["halves"]}, cut.dampings, {"halves": cut.seeds}
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows.select(order[:CUT])
        effort = replace(effort, sets=min(effort.sets, cut.sets), fits=min(effort.fits, CUT_FITS))
    results = []
    for kind, part in shares.items():
        repeats, label = effort.seeds or seeds[kind], f"{name}, {kind}"
        truth = retrain(data.model, rows, data.query, part, effort.sets, repeats, label)
        results.append(judge(name, kind, data, rows, truth, effort.fits, dampings))
    return results


def retrain(
    model: InfluenceModel, rows: Rows, query: Rows, gone: float, sets: int, seeds: int, label: str
) -> Truth:
    """The query's loss after training without random sets of rows."""
    generator = torch.Generator().manual_seed(17)
    away = round(gone * len(rows))
    kept = torch.stack(
        [torch.randperm(len(rows), generator=generator) >= away for _ in range(sets)]
    )

    def losses(members: Tensor) -> list[float]:
        part = rows.select(members.nonzero()[:, 0])
        thetas = (model.refit(part, seed=100 + seed) for seed in range(seeds))
        return [model.query_value(query, theta).item() for theta in thetas]

    found = [losses(members) for members in bar(list(kept), label)]
    return Truth(kept.numpy(), np.array(found))


def judge(
    name: str,
    kind: str,
    data: Embedded,
    rows: Rows,
    truth: Truth,
    fits: int,
    dampings: tuple[float, ...],
) -> dict[str, Any]:
    """What every method foretells of the losses."""
    by_fit = [predict(data, rows, truth, seed, dampings) for seed in bar(range(fits), "Score")]
    return {
        "part": name,
        "truth": kind,
        "rows": len(rows),
        "fits": fits,
        "seeds": truth.losses.shape[1],
        "ceiling": truth.reliability,
        "kept": ["".join("01"[k] for k in members.tolist()) for members in truth.kept],
        "losses": truth.losses.tolist(),
        "predicted": {method: by_fit[0][method].tolist() for method in by_fit[0]},
        "methods": {
            method: _over_fits([found[method] for found in by_fit], truth) for method in by_fit[0]
        },
    }


def predict(
    data: Embedded, rows: Rows, truth: Truth, seed: int, dampings: tuple[float, ...]
) -> dict[str, Floats]:
    """Predicted change of the query for every set, by every method, at one fit."""
    gone, model, given = ~truth.kept, data.model, data.model.config

    def sums(**changes: Any) -> tuple[Influence, Floats]:
        model.config = replace(given, seed=seed, **changes)
        influence = model.fit(rows, data.query)
        return influence, gone @ influence.scores().task.double().numpy()

    found = {}
    for damping in dampings:
        influence, found[f"damping {damping:g}"] = sums(damping=damping)
        if damping == DEFAULT:
            groups = [influence.score_group(members) for members in gone]
            found["group form"] = np.array([group.task.item() for group in groups])
    equal = round(given.fit_epochs * truth.kept.mean())
    for name, epochs in ((UNROLLED, given.fit_epochs), (EQUAL_STEPS, equal)):
        _, found[name] = sums(response="unrolled", fit_epochs=epochs, solver="identity")
    model.config = given
    return found


def _over_fits(predictions: list[Floats], truth: Truth) -> dict[str, Any]:
    first, *_ = results = [compare_sets(predicted, truth) for predicted in predictions]
    scores = [result["lds"] for result in results]
    centred = predictions[0] - predictions[0].mean()
    return {
        "spearman": float(np.mean(scores)),
        "stderr": float(np.std(scores, ddof=1) / np.sqrt(len(scores))),
        "low": first["ci_low"],
        "high": first["ci_high"],
        "slope": float(centred @ (truth.mean - truth.mean.mean()) / (centred @ centred)),
    }


# ---------------------------------------------------------------------------------- the report


def bar(items: Any, label: str) -> Any:
    return track(items, label, console=Console(stderr=True))


def note_on(effort: Effort) -> str:
    return (
        f"Spearman of predicted and true changes of the query: {effort.pairs} single pairs, "
        f"{effort.sets} sets of rows, mean ± standard error over {effort.fits} fits (layers: fewer "
        f"halves of {CUT} rows, {CUT_FITS} fits); over halves, the linear "
        "datamodeling score. Slope of true on predicted. Ceiling: what a perfect prediction would "
        "reach, given how far the retrainings' seeds agree. *As many steps*: as a retraining on "
        "fewer rows, by a fit of fewer epochs."
    )


HEADING = ("attributed", "truth", "method", "Spearman", "95 %, first fit", "slope", "ceiling")


def table_rows(found: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for one in found:
        for method, figures in one["methods"].items():
            error = "" if figures["stderr"] is None else f" ± {figures['stderr']:.3f}"
            ceiling = one.get("ceiling")
            yield (
                one["part"],
                one["truth"],
                method,
                f"{figures['spearman']:.3f}{error}",
                f"{figures['low']:.2f} to {figures['high']:.2f}",
                f"{figures['slope']:.2f}",
                "" if ceiling is None else f"{ceiling:.2f}",
            )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """True on predicted changes of the query by the method that suits, a panel for each truth."""
    canvas, axes = plt.subplots(
        1, len(results), figsize=(3.6 * len(results), 3.5), squeeze=False, layout="constrained"
    )
    shown: dict[bool, Callable[[dict[str, Any]], tuple[str, Any]]] = {
        True: lambda one: ("next to no damping", one["true"]),
        False: lambda one: (UNROLLED, _centred(one["losses"])),
    }
    for axis, one in zip(axes[0], results, strict=True):
        method, true = shown[one["part"] == ALONE](one)
        predicted = np.array(one["predicted"][method])
        if one["part"] != ALONE:
            predicted = predicted - predicted.mean()
        axis.plot(1000 * predicted, 1000 * np.array(true), ".", alpha=0.7)
        axis.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        spearman = one["methods"][method]["spearman"]
        title = f"{one['part']}\n{one['truth']}\n{method}: {spearman:.2f}"
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("predicted, millinats")
    axes[0, 0].set_ylabel("true change, millinats")
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def _centred(losses: list[list[float]]) -> Floats:
    means = np.array(losses).mean(axis=1)
    return means - means.mean()


if __name__ == "__main__":
    main()
