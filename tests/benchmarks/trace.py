"""Who caused this error? Wrong pairs are planted that make one concept fail, and traced back.

    python -m tests.benchmarks.trace                       # thirty concepts of the test split
    python -m tests.benchmarks.trace --quick               # two of them, among 400 training pairs
    python -m tests.benchmarks.trace --split validation    # those it was developed on

A concept is a row of the split whose image finds its own caption after a fit to right pairs. Of the
30 training images most like it, 5, 10, 15 or 20, the fewest that do, get one and the same caption,
that of another row of the split drawn at random; the concept has failed when its image finds that
caption, in a fit of record and in a second one with other batches. It and all other images that
find that caption in both fits, and found their own before, are errors, and traced. Measured are the
share of the planted pairs among the 20 that a method names first, and the share of the errors that
are gone after two fits without these 20, with the same batches. The fit has ten epochs at three
times the default rate: at the default one, few concepts fail at all.

Ours ranks by contribution, what a pair's gradients have moved through Adam in the course of the
fit, over the root of the size of the change that the pair's removal causes. Beside it: the
contribution alone; the predicted effect of a removal, unrolled through the fit, or by the inverse
curvature at its end (plain, or relative as in the paper); TracIn (gradients alone, of the pair's
own terms, at the last parameters or summed over all epochs with their learning rates); nearest
neighbours of the image, of the pair, and of the error itself (the image with the caption it found,
which says where to look); and random pairs. What ours ranks by was chosen on the validation split.

The second part asks all errors of both splits, in three ways, of one fitted model, and measures
what the index of `hf_ecif.influence.gradient_index` proposes against the exact trace.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hf_ecif.applications.tracing import CHUNK, Task, find_errors, margin_of, responsibility
from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.features import Features
from hf_ecif.influence.batching import scoring_pass
from hf_ecif.influence.fitting import cosine_fall
from hf_ecif.influence.gradient_index import build_index
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.queries import Query
from hf_ecif.influence.response import Unrolled, choose_contribution, respond
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Directions, score_rows
from tests.benchmarks.shared import as_markdown, embedded, parser, save, write_page

CONCEPTS, QUICK_CONCEPTS = 30, 2
COUNTS, POOL = (5, 10, 15, 20), 30
NAMED = 20  # pairs of a ranking that count
SEEDS = (0, 1)  # of batches; the first is that of the fit of record
CONFIG = InfluenceConfig(fit_learning_rate=3e-3)
TASK: Task = "image_to_text"
OURS, RELATIVE = "hf_ecif", "hf_ecif, inverse curvature, relative"
TRACIN, TRACINS = "TracIn, last parameters", "TracIn, all epochs"
NEIGHBOURS, RANDOM = "neighbours of the image", "random"
DELETED = (OURS, RELATIVE, TRACIN, TRACINS, NEIGHBOURS, RANDOM)
GOALS = {"recall": 0.9, "mended": 0.5, "mended at random": 0.1}
RANKS, PROPOSED, CAUSES = (16, 32, 64, 128), (50, 100, 200), 10
NOTE = (__doc__ or "").split("\n\n", 2)[2].strip()


def main() -> None:
    arguments = parser(__doc__, "trace")
    arguments.add_argument("--split", choices=("test", "validation"), default="test")
    args = arguments.parse_args()
    data = embedded(CONFIG, quick=args.quick)
    model, rows = data.model, data.test if args.split == "test" else data.query
    study = Study(model, model.read(data.train, text_column="original_text"), rows, data.query)
    wanted = QUICK_CONCEPTS if args.quick else CONCEPTS
    found = find_cases(study)
    cases, results = [], []
    for _ in track(range(wanted), "Plant and trace", console=Console(stderr=True)):
        case = next(found, None)
        if case is None:
            break
        cases.append(case)
        results.append(examine(study, case))
    index = measure_index(study, [data.query, data.test], quick=args.quick)
    settings = {
        "split": args.split,
        "goals": GOALS,
        "named": NAMED,
        "config": CONFIG.to_dict(),
        "cases": [case.record() for case in cases],
        "tried": study.tried,
    }
    save(args.output, settings, {"cases": results, "index": index})
    draw(results, args.output.with_suffix(".png"))
    parts = describe(results, index, study.tried)
    write_page(args.output, "Who caused this error?", [NOTE, *parts])
    print("\n\n".join(parts))


# ------------------------------------------------------------------------------------- planting


@dataclass
class Study:
    """What all cases share.

    Attributes:
        model: its fit changes from case to case.
        train: right pairs.
        rows: the split whose concepts are made to fail.
        query: of the fits; any, as errors have queries of their own.
        tried: concepts for which a planting was tried.
    """

    model: InfluenceModel
    train: Rows
    rows: Rows
    query: Rows
    tried: int = 0


@dataclass(frozen=True)
class Case:
    """A concept that failed.

    Attributes:
        concept: its row.
        rival: the row whose caption was planted.
        planted: training rows that carry it.
        train: the training rows, planted ones and others.
        errors: rows of the split that find the rival's caption now, and found their own before,
            with batches of all seeds.
    """

    concept: int
    rival: int
    planted: Tensor
    train: Rows
    errors: Tensor

    def record(self) -> dict[str, Any]:
        return {
            "concept": self.concept,
            "rival": self.rival,
            "planted": self.planted.tolist(),
            "errors": self.errors.tolist(),
        }


def find_cases(study: Study) -> Iterator[Case]:
    """Concepts in random order, as long as there are any; those that do not fail are passed by."""
    model, rows = study.model, study.rows
    own = torch.arange(len(rows))
    sound = (found_by_all(study, study.train) == own).all(dim=0)
    rng = random.Random(0)
    concepts = sound.nonzero()[:, 0].tolist()
    rng.shuffle(concepts)
    given = model.encoder.theta
    near = model.encoder.embed(given, study.train.features).image
    images = model.encoder.embed(given, rows.features).image
    for concept in concepts:
        study.tried += 1
        rival = rng.choice([row for row in range(len(rows)) if row != concept])
        pool = (near @ images[concept]).topk(POOL).indices.tolist()
        order = torch.tensor(rng.sample(pool, max(COUNTS)))
        for count in COUNTS:
            train = plant(study.train, rows, order[:count], rival)
            failed = sound & (found_by_all(study, train) == rival).all(dim=0)
            if failed[concept]:
                failed[rival] = False  # that caption is its own
                yield Case(concept, rival, order[:count], train, failed.nonzero()[:, 0])
                break


def plant(train: Rows, rows: Rows, chosen: Tensor, rival: int) -> Rows:
    """The training rows, some of which have the caption of a row of another set."""
    total = len(train) + len(rows)
    sides = [
        {key: torch.cat([value, other[key]]) for key, value in one.items()}
        for one, other in (
            (train.features.text, rows.features.text),
            (train.features.image, rows.features.image),
        )
    ]
    texts = train.texts + rows.texts
    both = Rows(Features(*sides), torch.arange(total), texts, {}, total)
    donors = torch.arange(total).index_fill(0, chosen, len(train) + rival)
    return both.with_texts_of(donors).select(torch.arange(len(train)))


def found_by_all(study: Study, train: Rows) -> Tensor:
    """The row whose caption each image of the split finds, ``(S, n)``, after a fit of each seed."""
    encoder = study.model.encoder

    def found(theta: Tensor) -> Tensor:
        text, image = encoder.embed(theta, study.rows.features)[:2]
        return (image @ text.T).argmax(dim=1)

    return torch.stack([found(study.model.refit(train, seed=seed)) for seed in SEEDS])


# -------------------------------------------------------------------------------------- methods


def examine(study: Study, case: Case) -> dict[str, Any]:
    """Recall of every method, and the share of the errors that a deletion mends."""
    influence = study.model.fit(case.train, study.query)
    ranked = rank(study, case, influence)
    tops = {name: values.topk(NAMED, dim=1).indices for name, values in ranked.items()}
    recall = {
        name: float(np.mean([torch.isin(case.planted, top).float().mean() for top in found]))
        for name, found in tops.items()
    }
    first = case.errors.tolist().index(case.concept)
    mended = {name: mend(study, case, tops[name][first]) for name in DELETED}
    mended["the planted pairs"] = mend(study, case, case.planted)
    margin = margin_of(study.rows, case.errors, TASK)
    margins = margin.values(study.model.encoder, influence.theta)
    return {
        "planted": len(case.planted),
        "errors": len(case.errors),
        "margin": margins.mean().item(),
        "recall": recall,
        "mended": mended,
    }


def rank(study: Study, case: Case, influence: Influence) -> dict[str, Tensor]:
    """Suspicion ``(E, N)`` of all training pairs by every method, for each error."""
    model, train, errors = study.model, case.train, case.errors
    query, theta, training = (
        margin_of(study.rows, errors, TASK),
        influence.theta,
        influence.training,
    )
    gradients = query.gradients(model.encoder, theta)
    contributed = respond(choose_contribution(model.config), training, gradients)
    unrolled = respond(Unrolled(model.config.curvature), training, gradients)
    removal = influence.scores_for(query).task
    text, image = model.encoder.embed(theta, train.features)[:2]
    texts, images = model.encoder.embed(theta, study.rows.features)[:2]
    alike = images[errors] @ image.T
    generator = torch.Generator().manual_seed(case.concept)
    contribution, sizes = influence.scores_through(contributed).task, influence.sizes()
    return {
        OURS: -responsibility(contribution, sizes),
        "hf_ecif, contribution alone": -contribution,
        "hf_ecif, removal unrolled": -influence.scores_through(unrolled).task,
        "hf_ecif, inverse curvature": -removal,
        RELATIVE: -removal / sizes,
        TRACIN: -own_terms(model, train, query, theta),
        TRACINS: -over_epochs(
            model, train, query, [checkpoint.theta for checkpoint in contributed]
        ),
        NEIGHBOURS: alike,
        "neighbours of the pair": alike + texts[errors] @ text.T,
        "neighbours of the error": alike + texts[case.rival] @ text.T,
        RANDOM: torch.rand(alike.shape, generator=generator),
    }


def over_epochs(model: InfluenceModel, train: Rows, query: Query, thetas: list[Tensor]) -> Tensor:
    """TracIn over checkpoints, each with the learning rate of its epoch."""
    epochs = len(thetas)
    rates = [cosine_fall(epoch, epochs) for epoch in range(epochs)]
    terms = (own_terms(model, train, query, theta) for theta in thetas)
    return torch.stack([rate * one for rate, one in zip(rates, terms, strict=True)]).sum(dim=0)


def own_terms(model: InfluenceModel, train: Rows, query: Query, theta: Tensor) -> Tensor:
    """TracIn at a checkpoint: products of the query's gradient with those of the own terms."""
    gradient = query.gradients(model.encoder, theta)
    directions = Directions.none(theta)._replace(query=gradient)
    how = scoring_pass(train, model.config)
    return score_rows(
        model.encoder, theta, train.features, directions, how, train_count=len(train)
    ).positive


def mend(study: Study, case: Case, deleted: Tensor) -> float:
    """Share of the errors that are gone after fits without some rows, the mean over the seeds."""
    kept = torch.ones(len(case.train), dtype=torch.bool).index_fill(0, deleted, False)
    now = found_by_all(study, case.train.select(kept.nonzero()[:, 0]))[:, case.errors]
    return (now == case.errors).float().mean().item()


# ---------------------------------------------------------------------------------------- index


def measure_index(study: Study, splits: list[Rows], *, quick: bool) -> dict[str, Any]:
    """What the index proposes against the exact trace."""
    influence = study.model.fit(study.train, study.query)
    encoder, theta = study.model.encoder, influence.theta
    queries, count = [], 0
    for rows in splits[-1:] if quick else splits:
        for task in ("text_to_image", "image_to_text", "zero_shot"):
            errors = find_errors(influence, rows, task).rows
            queries += [margin_of(rows, chunk, task) for chunk in errors.split(CHUNK)]
            count += len(errors)
    start = time.perf_counter()
    sizes = influence.sizes()
    exact = torch.cat([influence.contributions(query).task for query in queries])
    exact = responsibility(exact, sizes)
    seconds = {"exact": time.perf_counter() - start}
    causes = exact.topk(CAUSES, dim=1, largest=False).indices
    recall: dict[str, dict[str, float]] = {}
    for r in (r for r in RANKS[: 2 if quick else None] if r <= count):
        start = time.perf_counter()
        index = build_index(influence, queries, r)
        built = time.perf_counter()
        gradients = (query.gradients(encoder, theta) for query in queries)
        estimate = torch.cat([index.estimate(g).sum(dim=0) for g in gradients])
        estimate = responsibility(estimate, sizes)
        seconds |= {f"build {r}": built - start, f"ask {r}": time.perf_counter() - built}
        recall[str(r)] = {str(n): proposed(estimate, causes, n) for n in PROPOSED}
    return {"errors": count, "rows": len(study.train), "recall": recall, "seconds": seconds}


def proposed(estimate: Tensor, causes: Tensor, count: int) -> float:
    """Share of the exact trace's causes that are among so many rows of an estimate."""
    candidates = estimate.topk(count, dim=1, largest=False).indices
    return (causes[..., None] == candidates[:, None]).any(dim=-1).float().mean().item()


# ---------------------------------------------------------------------------------- the report


def describe(results: list[dict[str, Any]], index: dict[str, Any], tried: int) -> list[str]:
    """Paragraphs and two tables, Markdown."""
    counts = [case["planted"] for case in results]
    methods = [
        (name, *(mean(results, key, name) for key in ("recall", "mended")))
        for name in [*results[0]["recall"], "the planted pairs"]
    ]
    ranks = [
        (
            r,
            *(f"{share:.3f}" for share in recall.values()),
            *(f"{index['seconds'][f'{step} {r}']:.1f}" for step in ("build", "ask")),
        )
        for r, recall in index["recall"].items()
    ]
    among = [f"causes among {n} candidates" for n in PROPOSED]
    return [
        f"{len(results)} concepts that failed, of {tried} tried, by {min(counts)} to {max(counts)} "
        f"planted pairs (mean {np.mean(counts):.1f}); "
        f"{sum(case['errors'] for case in results)} errors.",
        as_markdown(
            ["method", f"recall@{NAMED}", f"errors mended without its first {NAMED}"], methods
        ),
        "Goals: " + "; ".join(goals(results)) + ".",
        f"Index, {index['errors']} errors and {index['rows']:,} rows; the exact trace took "
        f"{index['seconds']['exact']:.1f} s.",
        as_markdown(["rank", *among, "s to build", "s to ask"], ranks),
    ]


def values_of(results: list[dict[str, Any]], key: str, name: str) -> list[float]:
    return [case[key][name] for case in results if name in case[key]]


def mean(results: list[dict[str, Any]], key: str, name: str) -> str:
    """With its standard error over the cases."""
    values = values_of(results, key, name)
    if not values:
        return "–"
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):.2f} ± {error:.2f}"


def goals(results: list[dict[str, Any]]) -> Iterator[str]:
    """Whether each is met by the mean."""

    def at(key: str, name: str) -> float:
        return float(np.mean(values_of(results, key, name)))

    ours = at("recall", OURS)
    yield f"recall >= 0.9: {verdict(ours >= GOALS['recall'])}"
    yield f"above neighbours of the image: {verdict(ours > at('recall', NEIGHBOURS))}"
    theirs = max(at("recall", TRACIN), at("recall", TRACINS))
    yield f"above TracIn: {verdict(ours > theirs)}"
    yield f"half of the errors mended: {verdict(at('mended', OURS) >= GOALS['mended'])}"
    by_chance = at("mended", RANDOM) <= GOALS["mended at random"]
    yield f"a tenth at most at random: {verdict(by_chance)}"


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Recall and mended errors of every method, a dot for each case."""
    canvas, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    titles = {"recall": f"recall@{NAMED}", "mended": f"errors mended without the first {NAMED}"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        names = list(results[0][key])[::-1]
        for place, name in enumerate(names):
            values = np.array(values_of(results, key, name))
            jitter = np.linspace(-0.15, 0.15, len(values))
            axis.plot(values, place + jitter, "o", color="#4a7a96", alpha=0.35, markersize=5)
            axis.plot(values.mean(), place, "D", color="#c1501b", markersize=7)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=title, xlim=(-0.03, 1.03))
        axis.grid(axis="x", alpha=0.3)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main()
