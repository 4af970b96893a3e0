"""What the defaults of an audit are worth: each setting changed alone.

    python -m tests.benchmarks.ablations                    # an hour: all that is below
    python -m tests.benchmarks.ablations --only ^damping    # questions or settings that match this
    python -m tests.benchmarks.ablations --only-scores      # without the detector
    python -m tests.benchmarks.ablations --report           # from what was computed so far
    python -m tests.benchmarks.ablations --quick            # one seed of 200 rows, two questions

For every seed, 400 random rows of the embedded training split, of which 20 % get a caption of the
same category; seeds and noise served nowhere else. Measured are

* the AUPRC of finding the wrong rows by `ecif_noise_probability`, by `ecif_score` alone and by
  `ecif_loo_loss` alone, and the F1 at the detector's own threshold;
* the LDS of `ecif_score`: how well it foretells the query's true loss after training on random
  halves of the rows by the default recipe (see `tests.benchmarks.lds`), where the setting is one of
  the scores and not of the training.

Differences are against the default, on the same rows and seeds, with the standard error over the
seeds; one without an error is of a single seed, whose means do not compare with those of several.
Where the detector ran on fewer seeds than the scores, the second number of seeds is its own.
Whole layers run on 200 rows with 4 probes and one planting, and are compared with projections that
do the same. Finished runs are kept in `runs/ablations`, those of the scores and those of the
detector apart; empty the one or the other when its code changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from joblib import Memory
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.engine.low_rank import DivergenceError
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores
from tests.benchmarks.detection_cells import FRUGAL, Data, read_data
from tests.benchmarks.lds import Floats, Truth, lds
from tests.benchmarks.shared import Exchanged, exchange, find_wrong, parser, save, write_table

SEEDS = range(200, 203)
ROWS, FEW_ROWS, RATE, KIND = 400, 200, 0.2, "cat"
HALVES, REFITS = 30, 2
CACHE = Path("runs/ablations")
Measures = dict[str, float]
DEFAULT = "(default)"
NOTE = (__doc__ or "").split("\n\n", 2)[2].strip()
MEASURES = ("AUPRC", "AUPRC of the score", "AUPRC of the LOO loss", "F1", "LDS")
HEADING = ("question", "setting", "seeds", *MEASURES)


@dataclass(frozen=True)
class Audit:
    """What is run.

    Attributes:
        config: what differs from the default config.
        query_rows: of the query, all if zero.
        query_noise: share of the query's captions that are exchanged.
        rows: of the data.
    """

    config: tuple[tuple[str, Any], ...] = ()
    query_rows: int = 0
    query_noise: float = 0.0
    rows: int = ROWS


Found = dict[Audit, dict[int, Measures]]  # by seed


@dataclass(frozen=True)
class Variant:
    """A setting, and how it is looked at.

    Attributes:
        question: what is varied.
        setting: its name; ends in `DEFAULT` for the one to compare with.
        audit: that has it.
        part: of the score that is looked at.
        foretells: whether the LDS says something of it.
    """

    question: str
    setting: str
    audit: Audit
    part: str = "task"
    foretells: bool = True


def variants(rows: int) -> Iterator[Variant]:
    """All of them, question by question."""

    def of_config(name: str, question: str, values: list[Any], **more: Any) -> Iterator[Variant]:
        defaults = DetectionConfig() if hasattr(DetectionConfig, name) else InfluenceConfig()
        for value in values:
            is_default = value == getattr(defaults, name)
            mark, config = (f" {DEFAULT}", ()) if is_default else ("", ((name, value),))
            yield Variant(question, f"{value}{mark}", Audit(config, rows=rows), **more)

    plain = Audit(rows=rows)
    parts = {f"both {DEFAULT}": "task", "positive": "positive", "negative": "negative"}
    yield from (Variant("roles in the score", name, plain, part) for name, part in parts.items())
    yield from of_config("role", "form of the negative role", ["exact", "first_order"])
    yield from of_config("damping", "damping", [0.3, 3.0, 30.0, 300.0, 3000.0])
    yield from of_config("curvature", "curvature", ["ggn", "hessian"])
    indefinite = (("curvature", "hessian"), ("damping", 100.0))
    yield Variant("curvature", "hessian, damping 100", replace(plain, config=indefinite))
    yield Variant("curvature", "none (identity)", replace(plain, config=(("solver", "identity"),)))
    yield from of_config("partitions", "partitions", [2, 6, 18])
    yield from of_config("batch_size", "batch size", [32, 64, 128, 256], foretells=False)
    yield Variant("rows of the query", f"200 {DEFAULT}", plain)
    for count in (25, 50, 100):
        yield Variant("rows of the query", str(count), replace(plain, query_rows=count))
    yield Variant("wrong rows of the query", f"0% {DEFAULT}", plain)
    for share in (0.2, 0.4):
        noisy = replace(plain, query_noise=share)
        yield Variant("wrong rows of the query", f"{share:.0%}", noisy)
    yield from of_config("fit_epochs", "epochs of the fit", [0, 3, 10, 30, 100], foretells=False)
    yield from of_config("probes", "probes", [4, 8, 16, 64], foretells=False)
    yield from of_config("injections", "injections", [0, 1, 3, 9], foretells=False)
    for name in ("projections", "layer_norm", "lora", "last_block", "all"):
        mark = f" {DEFAULT}" if name == "projections" else ""
        config = (("parameters", name), *FRUGAL.items())
        yield Variant("parameters", name + mark, Audit(config, rows=FEW_ROWS), foretells=False)


QUICK = ("roles in the score", "wrong rows of the query")


def main() -> None:
    options = parser(__doc__, "ablations")
    options.add_argument("--only", default="", help="QUESTION: SETTING that matches this regex")
    options.add_argument("--only-scores", action="store_true", help="leave out the detector")
    options.add_argument("--seeds", type=int, default=len(SEEDS), help="at most so many")
    options.add_argument("--report", action="store_true", help="compute nothing")
    args = options.parse_args()
    chosen = [
        one
        for one in variants(FEW_ROWS if args.quick else ROWS)
        if re.search(args.only, f"{one.question}: {one.setting}")
        and (one.question in QUICK or not args.quick)
    ]
    memory = Memory(None if args.quick else CACHE, verbose=0)
    of_scores, of_detector = (memory.cache(part) for part in (judge_scores, judge_detector))
    # The detector's part measures all of the scores but what they foretell.
    foretelling = {one.audit for one in chosen if one.foretells or args.only_scores}
    audits = list(dict.fromkeys(one.audit for one in chosen))
    seeds = SEEDS[: 1 if args.quick else args.seeds]
    # Seeds outside, so that a run that is broken off has all audits with some seeds.
    todo = [(seed, one) for seed in seeds for one in audits]
    found: Found = {}
    diverged: dict[Audit, str] = {}
    for seed, audit in track(todo, "Run", console=Console(stderr=True)):
        parts = [of_scores] * (audit in foretelling) + [of_detector] * (not args.only_scores)
        known = [part for part in parts if part.check_call_in_cache(audit, seed)]
        if audit in diverged or (args.report and not known):
            continue
        try:
            measures = [part(audit, seed) for part in (known if args.report else parts)]
        except DivergenceError as error:
            diverged[audit] = str(error)
            found.pop(audit, None)
        else:
            found.setdefault(audit, {})[seed] = {k: v for one in measures for k, v in one.items()}
    results = compared([one for one in chosen if one.audit in found], found) + [
        {"question": one.question, "setting": one.setting, "diverged": diverged[one.audit]}
        for one in chosen
        if one.audit in diverged
    ]
    settings = {"seeds": list(seeds), "rate": RATE, "kind": KIND, "halves": HALVES}
    save(args.output, settings, results)
    draw([one for one in results if "measures" in one], args.output.with_suffix(".png"))
    write_table(args.output, "What each setting is worth", HEADING, table(results), NOTE)
    printed = Table(*HEADING)
    for line in table(results):
        printed.add_row(*line)
    Console(width=130).print(printed)


def judge_scores(audit: Audit, seed: int) -> Measures:
    """What the scores are worth on one data set; some measures for each part of the score."""
    data, one, query = prepare(audit, seed)
    scores = data.model.fit(one.rows, query).scores()
    foretold = truth(seed, audit.rows)
    found = {f"LDS, {name}": lds(part, foretold)[0] for name, part in parts_of(scores).items()}
    return found_by(scores, one) | found


def judge_detector(audit: Audit, seed: int) -> Measures:
    """What the detector finds on one data set."""
    data, one, query = prepare(audit, seed)
    chosen = DetectionConfig.from_dict(dict(audit.config))
    scores, detection = find_wrong(data.model, one.rows, query, chosen)
    return found_by(scores, one) | {
        "AUPRC": float(average_precision_score(one.wrong, detection.probability)),
        "F1": float(f1_score(one.wrong, detection.flag, zero_division=0.0)),
    }


def found_by(scores: Scores, one: Exchanged) -> Measures:
    """How well the scores alone find the wrong rows."""
    signals = {f"score, {name}": -part for name, part in parts_of(scores).items()}
    signals["LOO loss"] = scores.loo_loss.double().numpy()
    return {
        f"AUPRC of the {name}": float(average_precision_score(one.wrong, signal))
        for name, signal in signals.items()
    }


def parts_of(scores: Scores) -> dict[str, Floats]:
    return {
        name: getattr(scores, name).double().numpy() for name in ("task", "positive", "negative")
    }


def prepare(audit: Audit, seed: int) -> tuple[Data, Exchanged, Rows]:
    """Data with a model of this setting, noisy rows, and the query."""
    config = dict(audit.config)
    data = read_data("emoji", config.get("parameters", "projections"))
    data.model.config = replace(InfluenceConfig.from_dict(config), seed=seed)
    return data, noisy_rows(data, audit.rows, seed), query_of(data.query, audit, seed)


def noisy_rows(data: Data, count: int, seed: int) -> Exchanged:
    chosen = draw_rows(len(data.original), count, seed)
    categories = [data.categories[row] for row in chosen.tolist()]
    return exchange(data.original.select(chosen), categories, RATE, KIND, seed)


@cache
def truth(seed: int, rows: int) -> Truth:
    """Losses of the whole query after the default fit to halves of the rows."""
    data = read_data("emoji", "projections")
    model = data.model
    given, model.config = model.config, InfluenceConfig()
    noisy = noisy_rows(data, rows, seed).rows
    kept, losses = np.zeros((HALVES, rows), dtype=bool), np.zeros((HALVES, REFITS))
    for half in range(HALVES):
        members = draw_rows(rows, rows // 2, half)
        kept[half, members.numpy()] = True
        for refit in range(REFITS):
            theta = model.refit(noisy.select(members), seed=1000 * (refit + 1) + half)
            losses[half, refit] = model.query_value(data.query, theta).item()
    model.config = given
    return Truth(kept, losses)


def draw_rows(total: int, count: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def query_of(query: Rows, audit: Audit, seed: int) -> Rows:
    """Some of its rows, or all with some captions exchanged."""
    if audit.query_rows:
        return query.select(draw_rows(len(query), audit.query_rows, seed))
    if audit.query_noise:
        return exchange(query, [""] * len(query), audit.query_noise, "random", seed).rows
    return query


# ----------------------------------------------------------------------------------- the figures


def compared(chosen: list[Variant], found: Found) -> list[dict[str, Any]]:
    """Measures of every setting, by seed, and their differences from the question's default."""
    defaults = {one.question: look(one, found) for one in chosen if one.setting.endswith(DEFAULT)}
    results = []
    varied = {one.question for one in chosen if not one.setting.endswith(DEFAULT)}
    for one in [one for one in chosen if one.question in varied]:
        default = defaults.get(one.question, {})
        measures = {
            name: {
                "values": list(seen.values()),
                "differences": [
                    value - default[name][seed]
                    for seed, value in seen.items()
                    if seed in default.get(name, {})
                ],
            }
            for name, seen in look(one, found).items()
        }
        results.append({"question": one.question, "setting": one.setting, "measures": measures})
    return results


def look(one: Variant, found: Found) -> dict[str, dict[int, float]]:
    """The measures of a variant, by name and seed; only what depends on the part for a part."""
    names = {name: name for name in ("AUPRC", "AUPRC of the LOO loss", "F1")}
    if one.part != "task":
        names = {}
    names["AUPRC of the score"] = f"AUPRC of the score, {one.part}"
    if one.foretells:
        names["LDS"] = f"LDS, {one.part}"
    seen = {
        shown: {seed: values[name] for seed, values in found[one.audit].items() if name in values}
        for shown, name in names.items()
    }
    return {shown: values for shown, values in seen.items() if values}


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [one["question"], one["setting"], seeds_of(one), *(cell(one, name) for name in MEASURES)]
        for one in results
    ]


def seeds_of(one: dict[str, Any]) -> str:
    """How many; of the detector after the scores, where there are fewer."""
    if "diverged" in one:
        return ""
    counts = {
        name: len(one["measures"].get(name, {}).get("values", ()))
        for name in ("AUPRC of the score", "AUPRC")
    }
    return " / ".join(dict.fromkeys(str(count) for count in counts.values() if count))


def cell(one: dict[str, Any], name: str) -> str:
    """Mean; in brackets the mean difference from the default and its standard error."""
    if "diverged" in one:
        return "diverges"
    if name not in one["measures"]:
        return ""
    found = one["measures"][name]
    mean = f"{np.mean(found['values']):.3f}"
    differences = found["differences"]
    if one["setting"].endswith(DEFAULT) or not differences:
        return mean
    if len(differences) == 1:
        return f"{mean} ({differences[0]:+.3f})"
    error = np.std(differences, ddof=1) / np.sqrt(len(differences))
    return f"{mean} ({np.mean(differences):+.3f} ± {error:.3f})"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Differences from the default, a panel for each measure."""
    shown = [one for one in results if not one["setting"].endswith(DEFAULT)]
    names = [f"{one['question']}: {one['setting']}" for one in shown]
    known = {measure for one in shown for measure in one["measures"]}
    measures = [name for name in ("AUPRC", "AUPRC of the score", "LDS") if name in known]
    size = (11, 1 + 0.22 * len(names))
    canvas, axes = plt.subplots(
        1, len(measures), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        for place, one in enumerate(shown):
            differences = one["measures"].get(measure, {}).get("differences", [])
            axis.plot(differences, [place] * len(differences), "o", alpha=0.6, color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=f"{measure}, against the default")
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].invert_yaxis()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main()
