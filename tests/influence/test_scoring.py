"""Scores of a pass against dense gradients and a dense inverse, pair by pair."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from hf_ecif.engine import encoder as encoders
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.objectives import RoleForm
from hf_ecif.influence import scoring
from hf_ecif.influence.scoring import PROBED, Directions, Scores, score_group, score_rows
from tests.support.dense import COUNT, FAMILIES, MASKS, SAME, TRAIN_COUNT, Dense, batching, make
from tests.support.families import build, build_inputs, gaussian

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
Partition = list[Tensor]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Partition]]:
    """The partitions that a pass has drawn, in rows of the data; for passes of a single chunk."""
    partitions: list[Partition] = []
    order: list[Tensor] = []
    plain_chunks, plain_batches = scoring.row_chunks, scoring.random_batches

    def chunks(*args: object) -> list[Tensor]:
        order[:] = plain_chunks(*args)
        assert len(order) == 1
        return list(order)

    def batches(*args: object) -> Partition:
        drawn = plain_batches(*args)
        partitions.append([order[0][batch] for batch in drawn])
        return drawn

    monkeypatch.setattr(scoring, "row_chunks", chunks)
    monkeypatch.setattr(scoring, "random_batches", batches)
    return partitions


def only_query(query: Tensor) -> Directions:
    return Directions.none(query.reshape(-1, query.shape[-1])[0])._replace(query=query)


def by_row(partitions: list[Partition], of_batch: Callable[[Tensor], Tensor]) -> Tensor:
    """``(partitions, N, ...)`` from ``(B, ...)`` of every batch; no row twice."""
    out = []
    for partition in partitions:
        values = torch.cat([of_batch(rows) for rows in partition])
        out.append(values[torch.cat(partition).argsort()])
    return torch.stack(out)


# ----------------------------------------------------------------------------------- scores


@MASKS
@pytest.mark.parametrize("form", ["exact", "first_order"])
@FAMILIES
def test_scores_are_the_dense_ones(
    drawn: list[Partition], family: str, form: RoleForm, same: Tensor | None
) -> None:
    """``s . grad(Pos_n + Neg_n) / (TERMS * N)``; mean and standard error over partitions."""
    dense, features = make(family)
    query = gaussian(dense.encoder.count)
    ticks: list[int] = []
    scores = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        only_query(query),
        batching(3, same, form=form),
        train_count=TRAIN_COUNT,
        advance=ticks.append,
    )
    assert (len(drawn), ticks) == (3, [COUNT])
    oracle = by_row(drawn, lambda rows: dense.gradients(rows, same, form) @ query)
    close(scores.positive, oracle[..., 0].mean(dim=0))
    close(scores.negative, oracle[..., 1].mean(dim=0))
    close(scores.task, oracle.sum(dim=2).mean(dim=0))
    close(scores.stderr, oracle.sum(dim=2).std(dim=0) / 3**0.5)


@FAMILIES
def test_prediction_is_the_first_order_effect_of_deletion(
    drawn: list[Partition], family: str
) -> None:
    """``d/dt F(theta + t H^-1 (grad L - grad L without the pair))`` at zero, ``F`` linear.

    With ``H`` the identity, and the mean of the loss keeping its denominator.
    """
    dense, features = make(family)
    query, theta = gaussian(dense.encoder.count), dense.encoder.theta
    scores = score_rows(
        dense.encoder,
        theta,
        features,
        only_query(query),
        batching(1),
        train_count=COUNT,
    )

    def objective(theta: Tensor, gone: int) -> Tensor:
        kept = [rows[rows != gone] for rows in drawn[0]]
        terms = sum(dense.terms(dense.logits(theta, rows), None) for rows in kept)
        return terms / (dense.factor * COUNT)

    gradients = [jacrev(objective)(theta, gone) for gone in range(-1, COUNT)]
    expected = torch.stack([(gradients[0] - without) @ query for without in gradients[1:]])
    close(scores.task, expected)


@FAMILIES
def test_loss_and_cosine(drawn: list[Partition], family: str) -> None:
    dense, features = make(family)
    encoder, theta = dense.encoder, dense.encoder.theta
    scores = score_rows(
        encoder,
        theta,
        features,
        Directions.none(theta),
        batching(3),
        train_count=TRAIN_COUNT,
    )
    oracle = by_row(drawn, lambda rows: dense.own_terms(dense.logits(theta, rows), None))
    close(scores.loss, oracle.mean(dim=0))
    out = dense.model(**dense.inputs.text, **dense.inputs.image)
    close(scores.clip_score, (out.text_embeds * out.image_embeds).sum(dim=1).detach())
    close(scores.loo_loss, scores.loss)
    scale = dense.model.logit_scale.exp().item()
    assert (scores.terms, scores.scale) == (dense.factor, pytest.approx(scale))
    close(scores.neg_clip_loss, -oracle.mean(dim=0) / (dense.factor * scale))
    assert scores.task.shape == (0, COUNT)  # of no query


@FAMILIES
def test_several_queries_are_one_by_one(family: str) -> None:
    dense, features = make(family)
    probes, solved = gaussian(4, dense.encoder.count).split(2)
    queries = gaussian(3, dense.encoder.count, seed=2)
    run = partial(score_rows, dense.encoder, dense.encoder.theta, features, train_count=TRAIN_COUNT)
    together = run(Directions(queries, probes, solved), batching(2, SAME))
    assert together.task.shape == together.stderr.shape == together.relative.shape == (3, COUNT)
    for number in range(3):
        alone = run(Directions(queries[number], probes, solved), batching(2, SAME))
        assert alone.task.shape == (COUNT,)
        chosen = together.of_query(number)
        close(as_tensor(chosen), as_tensor(alone))
        close(chosen.relative_span, alone.relative_span)
        close(together.relative_to("span")[number], alone.relative_span)
        close(together.relative_to("deletion")[number], alone.relative)


def test_rows_met_twice_weigh_once(drawn: list[Partition]) -> None:
    """A last batch filled up with earlier rows: their score is the mean of both visits."""
    dense, features = make("clip")
    query = gaussian(dense.encoder.count)
    scores = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        only_query(query),
        batching(1, size=4),
        train_count=TRAIN_COUNT,
    )
    [partition] = drawn
    assert len(torch.cat(partition)) == 12
    visits: dict[int, list[Tensor]] = {n: [] for n in range(COUNT)}
    for rows in partition:
        values = dense.gradients(rows, None).sum(dim=1) @ query
        for n, value in zip(rows.tolist(), values, strict=True):
            visits[n].append(value)
    close(scores.task, torch.stack([torch.stack(v).mean() for v in visits.values()]))
    twice = torch.tensor([len(v) == 2 for v in visits.values()])
    assert torch.equal(scores.stderr.isfinite(), twice)  # one visit says nothing of the spread


# ------------------------------------------------------------------------ sizes, by the probes


def exact_probes(count: int) -> Tensor:
    """``sqrt(P) e_i``: their mean outer product is the identity, as that of signs on average."""
    return count**0.5 * torch.eye(count, dtype=torch.float64)


def inverse_curvature(count: int) -> Tensor:
    """Some symmetric positive matrix."""
    factor = gaussian(count, count)
    return torch.linalg.inv(factor @ factor.T / count + 0.5 * torch.eye(count).double())


@pytest.mark.parametrize("form", ["exact", "first_order"])
@FAMILIES
def test_self_influence_and_sizes(drawn: list[Partition], family: str, form: RoleForm) -> None:
    """``grad Pos_n . H^-1 grad(Pos_n + Neg_n) / N``, and norms of ``H^-1 grad / N``."""
    dense, features = make(family, r"text_projection|text_model\.head\.weight|logit_")
    count = dense.encoder.count
    inverse, query = inverse_curvature(count), gaussian(count)
    probes = exact_probes(count)
    scores = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        Directions(query, probes, probes @ inverse),
        batching(2, form=form),
        train_count=TRAIN_COUNT,
    )
    gradients = by_row(drawn, lambda rows: dense.gradients(rows, None, form))
    changes = gradients @ inverse
    omega = changes.sum(dim=2)
    close(scores.size, omega.square().sum(dim=-1).mean(dim=0).sqrt())
    squares = changes.square().sum(dim=-1).mean(dim=0)
    close(scores.positive_size, squares[:, 0].sqrt())
    close(scores.negative_size, squares[:, 1].sqrt())
    own = dense.factor * TRAIN_COUNT * (gradients[:, :, 0] * omega).sum(dim=-1)
    close(scores.self_influence, own.mean(dim=0))
    close(scores.loo_loss, scores.loss + own.mean(dim=0))
    close(scores.relative, scores.task / scores.size)


@FAMILIES
def test_relative_span_is_the_norm_of_a_projection(drawn: list[Partition], family: str) -> None:
    """Of ``grad F`` onto the plane of both roles' changes, by least squares; of one partition."""
    dense, features = make(family, r"text_projection|text_model\.head\.weight|logit_")
    count = dense.encoder.count
    inverse, gradient = inverse_curvature(count), gaussian(count)
    probes = exact_probes(count)
    scores = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        Directions(inverse @ gradient, probes, probes @ inverse),
        batching(1),
        train_count=TRAIN_COUNT,
    )
    [changes] = by_row(drawn, lambda rows: dense.gradients(rows, None)) @ inverse
    coefficients = torch.linalg.lstsq(changes.mT, gradient.expand(COUNT, -1)[..., None]).solution
    projection = (changes.mT @ coefficients)[..., 0]
    close(scores.relative_span, projection.norm(dim=1), rtol=1e-5)
    assert (scores.relative_span >= scores.relative.abs() * (1 - 1e-9)).all()


def scores_of(**values: float) -> Scores:
    given = {name: torch.tensor([values.get(name, 0.0)]).double() for name in scored_names()}
    return Scores(**given, scale=1.0, terms=2)


@pytest.mark.parametrize("ratio", [1.0, -0.5, 3.0])
def test_relative_span_of_roles_along_one_line(ratio: float) -> None:
    """``grad F . a = 3`` and ``|a| = 2``, whatever multiple of ``a`` the other change is.

    So it is always with a single attributed parameter, such as the temperature.
    """
    scores = scores_of(
        positive=3.0,
        negative=3.0 * ratio,
        positive_size=2.0,
        negative_size=2.0 * abs(ratio),
        size=2.0 * abs(1 + ratio),
    )
    close(scores.relative_span, torch.tensor([1.5]).double(), rtol=1e-3)


def test_relative_span_without_a_negative_role() -> None:
    scores = scores_of(positive=3.0, positive_size=2.0, size=2.0)
    close(scores.relative_span, torch.tensor([1.5]).double(), rtol=1e-3)


def test_standard_errors_over_probes(drawn: list[Partition]) -> None:
    """Of the mean over probes; that of the size through its square, to first order."""
    dense, features = make("clip")
    probes, solved = gaussian(10, dense.encoder.count).split(5)
    scores = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        Directions(probes[0], probes, solved),
        batching(2),
        train_count=TRAIN_COUNT,
    )
    gradients = by_row(drawn, lambda rows: dense.gradients(rows, None))
    both = gradients.sum(dim=2) @ solved.T
    own = 2 * TRAIN_COUNT * (gradients[:, :, 0] @ probes.T * both).mean(dim=0)
    close(scores.self_influence, own.mean(dim=1))
    close(scores.self_stderr, own.std(dim=1) / 5**0.5)
    squares = both.square().mean(dim=0)
    close(scores.size, squares.mean(dim=1).sqrt())
    error = squares.std(dim=1) / 5**0.5
    close(scores.size_stderr, error / (2 * squares.mean(dim=1).sqrt()))


@FAMILIES
def test_probes_take_part_in_the_first_partitions_alone(
    drawn: list[Partition], family: str
) -> None:
    dense, features = make(family)
    query, probes, solved = gaussian(3, 2, dense.encoder.count)
    scores = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        Directions(query[0], probes, solved),
        batching(PROBED + 2),
        train_count=TRAIN_COUNT,
    )
    assert len(drawn) == PROBED + 2
    gradients = by_row(drawn, lambda rows: dense.gradients(rows, None)).sum(dim=2)
    close(scores.task, (gradients @ query[0]).mean(dim=0))
    squares = (gradients[:PROBED] @ solved.T).square()
    close(scores.size, squares.mean(dim=(0, 2)).sqrt())


def test_one_probe_says_nothing_of_the_error() -> None:
    dense, features = make("clip")
    query, probe, solved = gaussian(3, 1, dense.encoder.count)
    scores = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        Directions(query[0], probe, solved),
        batching(),
        train_count=TRAIN_COUNT,
    )
    assert scores.size_stderr.isinf().all()
    assert scores.self_stderr.isinf().all()


# ------------------------------------------------------------------------------ invariances


def scored_names() -> list[str]:
    return [field.name for field in fields(Scores) if field.name not in ("scale", "terms")]


def as_tensor(scores: Scores) -> Tensor:
    return torch.stack([getattr(scores, name) for name in scored_names()])


@pytest.mark.parametrize(
    ("family", "parameters"), [("clip", "projections"), ("clip", "last_block"), ("siglip", "head")]
)
def test_micro_batches_do_not_matter(family: str, parameters: str) -> None:
    results = []
    for size in (64, 1, 3, 7):
        encoder = DualEncoder(build(family), parameters, size)
        query, *rest = gaussian(5, encoder.count)
        directions = Directions(query, *torch.stack(rest).split(2))
        features = encoder.freeze(build_inputs(family, COUNT))
        run = partial(score_rows, encoder, encoder.theta, features, directions)
        results.append(as_tensor(run(batching(2, SAME), train_count=TRAIN_COUNT)))
    for small in results[1:]:
        close(small, results[0])


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_finite_differences_score_alike(family: str) -> None:
    dense, features = make(family)
    directions = only_query(gaussian(dense.encoder.count))
    exact, near = (
        score_rows(
            dense.encoder,
            dense.encoder.theta,
            features,
            directions,
            batching(tangents=form),
            train_count=TRAIN_COUNT,
        )
        for form in ("exact", "difference")
    )
    close(near.task, exact.task, rtol=0.02, atol=1e-2 * exact.task.abs().mean().item())
    assert torch.equal(near.clip_score, exact.clip_score)


def test_seed_decides() -> None:
    dense, features = make("clip")
    directions = only_query(gaussian(dense.encoder.count))
    run = partial(score_rows, dense.encoder, dense.encoder.theta, features, directions)
    first, again, other = (
        run(batching(seed=seed), train_count=TRAIN_COUNT).task for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# ----------------------------------------------------------------------------------- chunks


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "CHUNK_BYTES", 1)


MANY = 23


@FAMILIES
@pytest.mark.usefixtures("small_chunks")
def test_losses_do_not_depend_on_the_query(family: str) -> None:
    """Without any, rows meet in the same chunks and batches."""
    dense, features = make(family)
    theta, none = dense.encoder.theta, Directions.none(dense.encoder.theta)
    run = partial(score_rows, dense.encoder, theta, features, train_count=TRAIN_COUNT)
    asked = run(none._replace(query=torch.ones_like(theta)), batching(2, SAME))
    alone = run(none, batching(2, SAME))
    close(alone.loss, asked.loss)
    close(alone.clip_score, asked.clip_score)


@pytest.mark.usefixtures("small_chunks")
def test_every_row_is_in_one_chunk() -> None:
    encoder = DualEncoder(build("clip"))
    features = encoder.freeze(build_inputs("clip", MANY))
    chunks = scoring.row_chunks(features, 3, batching(size=2), encoder)
    assert [len(chunk) for chunk in chunks] == [8, 8, 7]
    assert torch.cat(chunks).sort().values.tolist() == list(range(MANY))


def pushed_bytes(rows: int, vectors: int, width: int) -> int:
    """Of both sides in float64, and of as many cotangents."""
    return 8 * rows * 2 * 2 * width * (1 + vectors)


def test_chunks_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = DualEncoder(build("clip"))
    features = encoder.freeze(build_inputs("clip", MANY))
    monkeypatch.setattr(encoders, "CHUNK_BYTES", pushed_bytes(10, 6, 8))
    chunks = scoring.row_chunks(features, 6, batching(size=2), encoder)
    assert [len(chunk) for chunk in chunks] == [8, 8, 7]
    monkeypatch.setattr(encoders, "CHUNK_BYTES", pushed_bytes(MANY, 6, 8))
    assert len(scoring.row_chunks(features, 6, batching(size=2), encoder)) == 1


def scores_of_many(partitions: int, seed: int = 3) -> Scores:
    encoder = DualEncoder(build("clip"))
    features = encoder.freeze(build_inputs("clip", MANY))
    return score_rows(
        encoder,
        encoder.theta,
        features,
        only_query(gaussian(encoder.count)),
        batching(partitions, size=4, seed=seed),
        train_count=TRAIN_COUNT,
    )


def test_chunks_change_nothing_but_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is met in a batch is still anyone: averages over many draws agree."""
    whole = scores_of_many(100)
    monkeypatch.setattr(encoders, "CHUNK_BYTES", 1)
    # The chunks are drawn once in a pass, so several passes are averaged.
    chunked = [scores_of_many(5, seed) for seed in range(20)]
    close(chunked[0].clip_score, whole.clip_score, rtol=1e-12)
    task = torch.stack([s.task for s in chunked])
    error = (task.var(dim=0) / len(chunked) + whole.stderr**2).sqrt()
    z = (task.mean(dim=0) - whole.task) / error
    assert z.abs().max() < 4.5  # none is off, and the errors are of the right size
    assert 0.3 < z.square().mean() < 2.5


# ----------------------------------------------------------------------------------- groups


@MASKS
@FAMILIES
def test_group_is_the_dense_one(drawn: list[Partition], family: str, same: Tensor | None) -> None:
    """What goes with all members of a batch, differentiated; summed over the batches."""
    dense, features = make(family)
    queries = gaussian(2, dense.encoder.count)
    members = torch.arange(COUNT) < 4
    group = partial(
        score_group,
        dense.encoder,
        dense.encoder.theta,
        features,
        members=members,
        train_count=TRAIN_COUNT,
    )
    scores = group(queries, how=batching(3, same))
    oracle = torch.stack(
        [
            sum(group_part(dense, rows, members[rows], same, queries) for rows in part)
            for part in drawn
        ]
    )
    close(scores.positive, oracle[:, 0].mean(dim=0))
    close(scores.negative, oracle[:, 1].mean(dim=0))
    close(scores.task, oracle.sum(dim=1).mean(dim=0))
    close(scores.stderr, oracle.sum(dim=1).std(dim=0) / 3**0.5)
    single = group(queries[1], how=batching(3, same))
    assert single.task.shape == ()
    close(torch.stack(single), torch.stack([part[1] for part in scores]))


def test_a_group_by_finite_differences() -> None:
    dense, features = make("clip")
    members = torch.arange(COUNT) < 4
    run = partial(score_group, dense.encoder, dense.encoder.theta, features)
    exact, near = (
        run(
            gaussian(dense.encoder.count),
            members,
            batching(tangents=form),
            train_count=TRAIN_COUNT,
        ).task
        for form in ("exact", "difference")
    )
    close(near, exact, rtol=0.02, atol=0)
    assert near != exact


def group_part(
    dense: Dense, rows: Tensor, leave: Tensor, same: Tensor | None, queries: Tensor
) -> Tensor:
    """``(2, Q)``."""
    jacobian = jacrev(lambda theta: torch.stack(dense.leaving(theta, rows, leave, same)))
    return jacobian(dense.encoder.theta) @ queries.T / (dense.factor * TRAIN_COUNT)


@MASKS
@FAMILIES
def test_group_of_one_is_its_score(family: str, same: Tensor | None) -> None:
    dense, features = make(family)
    encoder, query = dense.encoder, gaussian(dense.encoder.count)
    run = {"train_count": TRAIN_COUNT}
    scores = score_rows(
        encoder, encoder.theta, features, only_query(query), batching(2, same), **run
    )
    for n in (0, 7):
        alone = torch.arange(COUNT) == n
        group = score_group(
            encoder, encoder.theta, features, query, alone, batching(2, same), **run
        )
        close(group.positive, scores.positive[n])
        close(group.negative, scores.negative[n])
        close(group.stderr, scores.stderr[n])


def test_group_is_summed_in_the_precision_of_the_parameters() -> None:
    dense, features = make("clip")
    encoder, query = dense.encoder, gaussian(dense.encoder.count)
    run = {"train_count": TRAIN_COUNT}
    scores = score_rows(encoder, encoder.theta, features, only_query(query), batching(), **run)
    first = torch.arange(COUNT) == 0
    group = score_group(encoder, encoder.theta, features, query, first, batching(), **run)
    close(group.task, scores.task[0], rtol=1e-12, atol=0)


@FAMILIES
def test_nobody_and_everybody(drawn: list[Partition], family: str) -> None:
    dense, features = make(family)
    theta, query = dense.encoder.theta, gaussian(dense.encoder.count)
    run = partial(score_group, dense.encoder, theta, features, query, train_count=COUNT)
    none = run(torch.zeros(COUNT, dtype=torch.bool), batching())
    close(none.task, torch.zeros(()).double())
    everybody = run(torch.ones(COUNT, dtype=torch.bool), batching(2))

    def loss(theta: Tensor) -> Tensor:
        batches = [rows for partition in drawn[-2:] for rows in partition]
        terms = sum(dense.terms(dense.logits(theta, rows), None) for rows in batches)
        return terms / (2 * dense.factor * COUNT)

    close(everybody.task, jacrev(loss)(theta) @ query)


def test_group_with_rows_met_twice_weighs_each_once() -> None:
    """Twelve places for ten rows: the sum is scaled back."""
    dense, features = make("siglip", "logit_bias")
    run = partial(score_group, dense.encoder, dense.encoder.theta, features)
    query = torch.ones(1).double()
    group = run(
        query, torch.ones(COUNT, dtype=torch.bool), batching(40, size=4), train_count=TRAIN_COUNT
    )
    rows = score_rows(
        dense.encoder,
        dense.encoder.theta,
        features,
        only_query(query),
        batching(40, size=4),
        train_count=TRAIN_COUNT,
    )
    close(group.positive, rows.positive.sum(), rtol=0.02)


def test_parts_add_up() -> None:
    values = torch.arange(3.0)
    scores = Scores(*[values] * 11, scale=1.0, terms=2)
    assert torch.equal(scores.task, 2 * values)
    assert torch.equal(replace(scores, loss=-values).loo_loss, torch.zeros(3))
