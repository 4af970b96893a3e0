"""What a fit owns, what it refuses, and that it is not changed by what is done next."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Value

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.columns import SCORES
from hf_ecif.errors import UserError
from hf_ecif.influence.columns import REASON
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.queries import choose_query
from hf_ecif.influence.rows import Rows
from tests.support import DEMO

CONFIG = InfluenceConfig(batch_size=8, fit_epochs=2, partitions=2, probes=2, max_iterations=5)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Rows of the demo, of which one has no caption."""
    rows = Dataset.from_parquet(str(DEMO / "data" / "test.parquet")).select(range(40))
    texts = [None if row == 5 else text for row, text in enumerate(rows["text"][:])]
    return rows.remove_columns("text").add_column("text", texts)


@pytest.fixture(scope="module")
def model() -> InfluenceModel:
    return InfluenceModel.from_pretrained(DEMO / "model", CONFIG)


@pytest.fixture(scope="module")
def influence(model: InfluenceModel, data: Dataset) -> Influence:
    return model.fit(data.select(range(24)), query=data.select(range(24, 40)))


def test_a_later_fit_leaves_an_earlier_one_alone(
    model: InfluenceModel, influence: Influence, data: Dataset
) -> None:
    before = influence.scores().task
    rows, members = influence.rows, torch.arange(len(influence.rows)) < 3
    group = influence.score_group(members).task
    other = model.fit(data.select(range(30, 40)), query=rows)
    assert len(other.rows) == 10
    assert torch.equal(influence.scores().task, before)
    assert torch.equal(influence.score_group(members).task, group)
    assert not torch.equal(other.theta, influence.theta)


def test_a_data_set_is_as_good_as_its_rows(
    model: InfluenceModel, influence: Influence, data: Dataset
) -> None:
    train, query = model.read(data.select(range(24))), model.read(data.select(range(24, 40)))
    by_rows = model.fit(train, query)
    assert torch.equal(by_rows.scores(train).task, influence.scores(data.select(range(24))).task)
    later = influence.scores_for(data.select(range(24, 40)))
    assert torch.equal(later.task, influence.scores_for(query).task)


def test_a_scored_data_set_keeps_its_rows_and_columns(influence: Influence, data: Dataset) -> None:
    earlier = data.add_column("ecif_score", [7.0] * len(data))
    scored = influence.score(earlier)
    assert scored.column_names == [*data.column_names, *SCORES, REASON]
    assert scored.features["image"] == data.features["image"]
    assert scored["text"][:] == data["text"][:]
    rows = influence.model.read(data)
    expected = rows.spread(influence.scores(rows).task.tolist())
    assert scored["ecif_score"][:] == expected
    assert scored["ecif_score"][5] is None
    assert scored[REASON][5] == rows.reasons[5]
    alone = influence.score(rows)
    assert alone.column_names == [*SCORES, REASON]
    assert alone["ecif_self"][:] == scored["ecif_self"][:]
    assert alone.features[REASON] == Value("string")


@pytest.mark.parametrize("as_flags", [torch.as_tensor, np.asarray, list])
def test_members_are_of_all_rows_or_of_the_readable(
    influence: Influence, as_flags: Callable[[list[bool]], object]
) -> None:
    rows = influence.rows
    assert (rows.total, len(rows)) == (24, 23)
    of_all = [row in (5, 7, 9) for row in range(24)]
    of_readable = [row in (7, 9) for row in rows.positions.tolist()]
    found = [influence.score_group(as_flags(flags)).task for flags in (of_all, of_readable)]
    assert torch.equal(*found)
    with pytest.raises(UserError, match=r"shape \(22,\) for 24 rows, of which 23"):
        influence.score_group(as_flags([True] * 22))


def test_a_removal_is_a_model_of_its_own(influence: Influence) -> None:
    members = torch.arange(23) < 4
    given = influence.model.encoder.theta.clone()
    edited = influence.remove(members, steps=2)
    theta, report = influence.training.remove(members, steps=2)
    assert report.removed == 4
    weights = influence.model.edited(theta).state_dict()
    for name, value in edited.state_dict().items():
        assert torch.equal(value, weights[name])
    assert torch.equal(influence.model.encoder.theta, given)
    projection = edited.get_parameter("text_projection.weight")
    assert not torch.equal(projection, influence.model.encoder.model.text_projection.weight)
    for none_or_all in (torch.zeros(23).bool(), torch.ones(23).bool()):
        with pytest.raises(UserError, match="choose at least one row, and leave at least two"):
            influence.remove(none_or_all)


def test_a_refit_without_anybody_is_the_fit(influence: Influence) -> None:
    assert torch.equal(influence.refit(torch.zeros(23).bool()), influence.theta)


def test_what_was_loaded_scores_but_has_no_training_rows(
    influence: Influence, data: Dataset, tmp_path: Path
) -> None:
    influence.save_pretrained(tmp_path)
    loaded = Influence.from_pretrained(tmp_path)
    assert torch.equal(loaded.scores(data).task, influence.scores(data).task)
    assert loaded.config.to_dict() == influence.config.to_dict()
    members, query = torch.arange(23) < 3, influence.rows
    for ask in (
        lambda: loaded.rows,
        lambda: loaded.scores(),
        lambda: loaded.scores_for(query, query),
        lambda: loaded.contributions(query, query),
        lambda: loaded.score_group(members),
        lambda: loaded.score_without(members[None], query),
        lambda: loaded.leverage(),
        lambda: loaded.sample_leverage(),
        lambda: loaded.refit(members),
        lambda: loaded.remove(members),
    ):
        with pytest.raises(UserError, match=r"without its training rows.*call fit"):
            ask()


def test_a_folder_without_a_fit_says_so() -> None:
    with pytest.raises(UserError, match=r"holds no fit.*InfluenceModel.from_pretrained"):
        Influence.from_pretrained(DEMO / "model")


def test_a_query_does_not_depend_on_what_else_is_asked(
    model: InfluenceModel, influence: Influence, data: Dataset
) -> None:
    queries = [model.read(data.select(rows)) for rows in (range(20, 40), range(24, 40))]
    together = model.query_value(queries, influence.theta)
    alone = [model.query_value(query, influence.theta) for query in queries]
    assert together.tolist() == [value.item() for value in alone]
    assert alone[1].item() == pytest.approx(influence.fitted.query_loss, rel=1e-6)


def test_any_seed_will_do(data: Dataset) -> None:
    """Also one that is too large for others' generators."""
    config = InfluenceConfig(seed=2**62 - 1, fit_epochs=1, probes=1, max_iterations=1)
    model = InfluenceModel.from_pretrained(DEMO / "model", config)
    rows = model.read(data)
    assert len(choose_query(rows, model.encoder, seed=config.seed)) > 1
    assert model.fit(rows, rows).scores().task.isfinite().all()


class TestRowsOfAnotherModel:
    @pytest.fixture(scope="class")
    def foreign(self, data: Dataset) -> Rows:
        config = InfluenceConfig(parameters="last_block", batch_size=8)
        return InfluenceModel.from_pretrained(DEMO / "model", config).read(data)

    def test_are_refused(
        self, model: InfluenceModel, influence: Influence, foreign: Rows, data: Dataset
    ) -> None:
        members = torch.ones(len(foreign)).bool()
        for ask in (
            lambda: model.fit(foreign, data),
            lambda: model.fit(data, foreign),
            lambda: model.fit(data, [foreign, foreign]),
            lambda: model.refit(foreign),
            lambda: model.score_as_given(foreign),
            lambda: influence.scores(foreign),
            lambda: influence.score(foreign.select(members.nonzero()[:, 0])),
            lambda: influence.scores_for(foreign.with_texts_of(torch.arange(len(foreign)))),
        ):
            with pytest.raises(UserError, match=r"read by another model.*model.read"):
                ask()

    def test_the_same_model_loaded_again_is_no_other(
        self, influence: Influence, data: Dataset
    ) -> None:
        rows = InfluenceModel.from_pretrained(DEMO / "model", CONFIG).read(data)
        assert influence.scores(rows).task.isfinite().all()

    def test_attributed_parameters_do_not_matter(self, model: InfluenceModel) -> None:
        """Rows end below them."""
        moved = InfluenceModel(model.edited(model.encoder.theta + 1), model.processor, CONFIG)
        assert moved.encoder.boundary == model.encoder.boundary
        assert moved.encoder.fingerprint() != model.encoder.fingerprint()


class TestLoading:
    def test_dtype_and_device_are_taken(self) -> None:
        wide = InfluenceModel.from_pretrained(DEMO / "model", CONFIG, dtype="float64", device="cpu")
        assert wide.encoder.theta.dtype == torch.float64
        half = InfluenceModel.from_pretrained(DEMO / "model", CONFIG, dtype=torch.bfloat16)
        assert half.encoder.input_dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"dtype": "float33"}, "dtype = 'float33': must be"),
            ({"dtype": "int64"}, "dtype = 'int64': must be"),
            ({"device": "quantum"}, "device = 'quantum' cannot be used here"),
            ({"device": "cuda:99"}, "device = 'cuda:99' cannot be used here"),
        ],
    )
    def test_what_is_none_is_refused(self, wrong: dict[str, str], words: str) -> None:
        with pytest.raises(UserError, match=words):
            InfluenceModel.from_pretrained(DEMO / "model", CONFIG, **wrong)


def test_embeddings_as_given_are_made_once(
    model: InfluenceModel, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = model.read(data)
    first = model.embed_as_given(rows)
    monkeypatch.setattr(model.encoder, "embed", None)
    assert model.embed_as_given(rows) is first
    monkeypatch.undo()
    given = model.encoder.theta
    model.encoder.load(given * 1.1)
    try:
        assert not torch.equal(model.embed_as_given(rows).text, first.text)
    finally:
        model.encoder.load(given)
    assert torch.equal(model.embed_as_given(rows).text, first.text)
