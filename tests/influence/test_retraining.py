"""Fine-tuning on several versions of the rows, with equal budgets."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Value, load_dataset
from torch import Tensor

from hf_ecif.applications.clean import CleanRequest, _describe_outcome, run_clean
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.cleaning import BEFORE, UNTRAINED, clean
from hf_ecif.data.parquet import write_shards
from hf_ecif.engine.objective import Objective
from hf_ecif.errors import UserError
from hf_ecif.influence import retraining as comparison
from hf_ecif.influence.fitting import fit_parameters
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.retraining import (
    MEASURES,
    Outcome,
    Version,
    compare,
    measure,
    random_subset,
    train,
)
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.seeds import stream
from tests.support import DEMO
from tests.support.commands import MODEL, Run
from tests.support.hub.audits import fake_summary

CONFIG = InfluenceConfig(batch_size=16, micro_batch_size=32, fit_epochs=3)


@pytest.fixture(scope="module")
def data() -> Dataset:
    rows = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    return rows.cast_column("image", Image(decode=False))


@pytest.fixture(scope="module")
def model() -> InfluenceModel:
    return InfluenceModel.from_pretrained(MODEL, CONFIG)


@pytest.fixture(scope="module")
def rows(model: InfluenceModel, data: Dataset) -> Rows:
    return model.read(data.select(range(60)))


@pytest.fixture(scope="module")
def test_rows(model: InfluenceModel, data: Dataset) -> Rows:
    return model.read(data.select(range(60, 120)))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Batches of every gradient, in a list for each training."""
    trainings: list[list[Tensor]] = []
    given, over = comparison.train, Objective.over

    def counted(*args: object, **options: object) -> Tensor:
        trainings.append([])
        return given(*args, **options)

    def noted(self: Objective, batches: list[Tensor]) -> Objective:
        trainings[-1] += batches
        return over(self, batches)

    monkeypatch.setattr(comparison, "train", counted)
    monkeypatch.setattr(Objective, "over", noted)
    return trainings


class TestBudget:
    def test_every_version_takes_as_many_steps_of_equal_batches(
        self, model: InfluenceModel, rows: Rows, test_rows: Rows, seen: list[list[Tensor]]
    ) -> None:
        few = Version(random_subset(rows, 23, 0))
        compare(model, {"all": [Version(rows)], "few": [few]}, test_rows)
        assert [len(batches) for batches in seen] == [3 * math.ceil(60 / 16)] * 2
        assert {len(batch) for batches in seen for batch in batches} == {16}
        assert max(batch.max().item() for batch in seen[1]) == 22

    def test_batches_shrink_for_all_where_a_version_is_small(
        self, model: InfluenceModel, rows: Rows, test_rows: Rows, seen: list[list[Tensor]]
    ) -> None:
        versions = {"all": [Version(rows)], "few": [Version(random_subset(rows, 7, 0))]}
        compare(model, versions, test_rows)
        assert {len(batch) for batches in seen for batch in batches} == {7}
        assert len(seen[0]) == len(seen[1]) == 3 * math.ceil(60 / 7)

    def test_as_adam_by_autograd_does_it(self, model: InfluenceModel, rows: Rows) -> None:
        """The same batches through plain autograd and a scheduler of torch."""
        found = train(model, Version(rows), steps=2, batch_size=16, seed=4)
        text, image = rows.features.text["hidden"], rows.features.image["hidden"]
        theta = model.encoder.theta.clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=CONFIG.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CONFIG.fit_epochs)
        generator = stream(4, "fit")
        batches = [b for _ in range(2) for b in Version(rows).epoch(16, generator)][:6]
        for number, batch in enumerate(batches, 1):
            image_weight, text_weight = theta.view(2, -1, text.shape[1])
            texts, images = (
                torch.nn.functional.normalize(hidden[batch] @ weight.T, dim=1)
                for hidden, weight in ((text, text_weight), (image, image_weight))
            )
            logits = model.encoder.scale * texts @ images.T
            labels = torch.arange(16)
            loss = sum(torch.nn.functional.cross_entropy(s, labels) for s in (logits, logits.T)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number % 2 == 0:
                schedule.step()
        change = theta.detach() - model.encoder.theta
        torch.testing.assert_close(found - model.encoder.theta, change, rtol=0.02, atol=1e-5)

    def test_the_recipe_is_that_of_the_fit(self, model: InfluenceModel, rows: Rows) -> None:
        """Else what is compared with a retraining is compared with another rate, too."""
        start = model.encoder.theta
        fitted, _ = fit_parameters(
            Objective(model.encoder, rows.features, [torch.arange(16)], rows.same_text),
            start,
            batch_size=16,
            epochs=CONFIG.fit_epochs,
            learning_rate=CONFIG.learning_rate,
            generator=stream(4, "fit"),
        )
        found = train(model, Version(rows), steps=math.ceil(60 / 16), batch_size=16, seed=4)
        torch.testing.assert_close(found, fitted)

    def test_equal_versions_come_out_equal(
        self, model: InfluenceModel, rows: Rows, test_rows: Rows
    ) -> None:
        before = model.encoder.theta.clone()
        same = {name: [Version(rows)] * 2 for name in ("one", "other")}
        untrained, one, other = compare(model, same, test_rows)
        assert one.values == other.values
        assert one.values["loss"][0] != one.values["loss"][1]  # another order of batches
        assert one.gain(other, "loss") == (0.0, 0.0)
        assert untrained.version == UNTRAINED
        assert untrained.stderr("loss") is None
        torch.testing.assert_close(model.encoder.theta, before, rtol=0, atol=0)


class TestWeights:
    def test_rows_are_drawn_as_often_as_they_weigh(self, rows: Rows) -> None:
        weights = torch.linspace(0, 1, 60)
        version = Version(rows, weights)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.zeros(60)
        for _ in range(400):
            epoch = torch.cat(version.epoch(30, generator))
            assert len(epoch.unique()) == len(epoch) == len(version) == 30
            drawn[epoch] += 1
        assert drawn[0] == 0
        assert np.corrcoef(drawn.numpy(), weights.numpy())[0, 1] > 0.97

    def test_zero_weights_train_as_if_the_rows_were_gone(
        self, model: InfluenceModel, rows: Rows, test_rows: Rows
    ) -> None:
        kept = torch.arange(60) < 16
        versions = {
            "weighted": [Version(rows, kept.float())],
            "gone": [Version(rows.select(kept.nonzero()[:, 0]))],
        }
        # One batch holds all that is left, whose order does not matter.
        _, weighted, gone = compare(model, versions, test_rows)
        assert weighted.rows == gone.rows == 16
        assert weighted.values["loss"] == pytest.approx(gone.values["loss"], rel=1e-3)


class TestMeasure:
    def test_against_loops(self, model: InfluenceModel, test_rows: Rows) -> None:
        rows = test_rows.with_texts_of(torch.arange(60) // 2 * 2)  # every caption twice
        theta = model.encoder.theta
        found = measure(model, theta, rows)
        embeddings = model.encoder.embed(theta, rows.features)
        captions = list(dict.fromkeys(rows.texts))
        texts = embeddings.text[::2]
        right, near, hit = 0, 0, 0
        for i, image in enumerate(embeddings.image):
            order = (texts @ image).argsort(descending=True).tolist()
            right += captions[order[0]] == rows.texts[i]
            near += rows.texts[i] in [captions[k] for k in order[:10]]
        for k, text in enumerate(texts):
            best = (embeddings.image @ text).argmax().item()
            hit += rows.texts[best] == captions[k]
        assert found["image_to_text_recall@1"] == pytest.approx(right / 60)
        assert found["image_to_text_recall@10"] == pytest.approx(near / 60)
        assert found["text_to_image_recall@1"] == pytest.approx(hit / 30)
        assert found["loss"] == pytest.approx(model.query_value(rows, theta).item())
        assert set(found) == set(MEASURES)

    def test_training_on_right_captions_beats_training_on_wrong_ones(self, data: Dataset) -> None:
        longer = InfluenceModel.from_pretrained(MODEL, replace(CONFIG, fit_epochs=15))
        right, unseen = (longer.read(data.select(range(i, i + 60))) for i in (0, 60))
        wrong = right.with_texts_of(torch.arange(60).roll(1))
        versions = {"wrong": [Version(wrong)] * 2, "right": [Version(right)] * 2}
        _, bad, good = compare(longer, versions, unseen)
        gain, error = good.gain(bad, "loss")
        assert gain + 3 * (error or 0) < 0


class TestOutcome:
    def test_statistics(self) -> None:
        one = Outcome("one", 3, {"loss": [1.0, 2.0, 4.0]})
        other = Outcome("other", 3, {"loss": [0.5, 1.5, 3.5]})
        assert one.mean("loss") == pytest.approx(7 / 3)
        assert one.stderr("loss") == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
        assert one.gain(other, "loss") == (pytest.approx(0.5), pytest.approx(0))

    def test_one_repeat_has_no_error(self) -> None:
        one = Outcome("one", 3, {"loss": [1.0]})
        assert one.stderr("loss") is None
        assert _describe_outcome(one).measures["loss"].stderr is None


class TestMistakes:
    def test_too_few_rows(self, model: InfluenceModel, rows: Rows, test_rows: Rows) -> None:
        versions = {"all": [Version(rows)], "drop": [Version(random_subset(rows, 1, 0))]}
        with pytest.raises(UserError, match="'drop' has 1 readable rows"):
            compare(model, versions, test_rows)

    def test_nothing_is_trained(self, rows: Rows, test_rows: Rows) -> None:
        still = InfluenceModel.from_pretrained(MODEL, replace(CONFIG, fit_epochs=0))
        with pytest.raises(UserError, match="trains nothing"):
            compare(still, {"all": [Version(rows)]}, test_rows)


@pytest.fixture(scope="module")
def audit(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of 60 rows: every third caption is wrong, flagged, and has a suggestion or none."""
    folder = tmp_path_factory.mktemp("audit")
    part = data.select(range(60))
    wrong = [row % 3 == 0 for row in range(60)]
    right = part["text"][:]
    texts = [right[(row + 1) % 60] if w else right[row] for row, w in enumerate(wrong)]
    scored = part.remove_columns("text")
    for name, values, kind in (
        ("text", texts, "string"),
        ("is_wrong", wrong, "bool"),
        ("ecif_flag", wrong, "bool"),
        ("ecif_reason", ["because" if w else None for w in wrong], "string"),
        ("ecif_noise_probability", [0.9 if w else 0.1 for w in wrong], "float32"),
        ("ecif_score", [0.0] * 60, "float32"),
        ("ecif_suggested_text", [t if r % 6 == 0 else None for r, t in enumerate(right)], "string"),
        ("ecif_suggested_probability", [None if r % 6 else 0.9 for r in range(60)], "float32"),
    ):
        scored = scored.add_column(name, values, feature=Value(kind))
    write_shards(scored, folder / "scored")
    data.select(range(60, 120)).save_to_disk(folder.parent / "test-rows")
    summary = fake_summary("somewhere", 60, int(sum(wrong)), 0) | {
        "model": MODEL,
        "config": CONFIG.to_dict(),
        "truth": {"column": "is_wrong", "misaligned": int(sum(wrong)), "found": int(sum(wrong))},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def test_source(audit: Path) -> str:
    return str(audit.parent / "test-rows")


class TestCleanings:
    def test_all_strategies_beside_each_other(
        self, audit: Path, test_source: str, tmp_path: Path
    ) -> None:
        request = CleanRequest(
            audit=audit,
            output=tmp_path / "new",
            beside=("worst", "weight", "relabel"),
            share=0.5,
            test=test_source,
            test_split="train",
            repeats=2,
        )
        cleaning = run_clean(request)
        assert cleaning.comparison is not None
        assert [(one.version, one.rows) for one in cleaning.comparison.outcomes] == [
            (UNTRAINED, 0),
            (BEFORE, 60),
            ("drop", 40),
            ("random, as many as drop", 40),
            ("worst", 30),
            ("random, as many as worst", 30),
            ("weight", 38),
            ("relabel", 50),
            ("random, as many as relabel", 50),
            ("all that are right", 40),
        ]
        by_name = {one.version: one for one in cleaning.comparison.outcomes}
        # What is dropped here is what is wrong, so that both are one training.
        # The rows are read apart, in other micro-batches: equal to rounding.
        for name, values in by_name["all that are right"].values.items():
            assert by_name["drop"].values[name] == pytest.approx(values, rel=1e-5)
        chance = by_name["random, as many as drop"].values["loss"]
        assert chance[0] != chance[1]
        assert cleaning.comparison.warnings == []
        written = json.loads((tmp_path / "new" / "cleaning.json").read_text())
        assert written["comparison"] == cleaning.comparison.describe().to_dict()
        assert written["strategy"] == "drop"
        page = (tmp_path / "new" / "cleaning.html").read_text()
        assert "random rows, as many as drop" in page
        assert "nothing (as given)" in page
        assert "of text-to-image R@1" in page
        assert "ero-shot" not in page
        assert str(tmp_path) not in page
        assert len(load_dataset(str(tmp_path / "new" / "kept"), split="train")) == 40

    def test_relabelled_rows_are_trained_with_their_new_captions(
        self, audit: Path, test_source: str
    ) -> None:
        request = CleanRequest(
            audit=audit, strategy="relabel", test=test_source, test_split="train", repeats=1
        )
        found = run_clean(request).comparison
        model = InfluenceModel.from_pretrained(MODEL, CONFIG)
        scored = load_dataset(str(audit / "scored"), split="train")
        kept, test = (
            model.read(part)
            for part in (clean(scored, "relabel").kept, Dataset.load_from_disk(test_source))
        )
        alone = compare(model, {"all": [Version(model.read(scored))], "x": [Version(kept)]}, test)
        assert found is not None
        for name in MEASURES:
            assert found.outcomes[2].values[name] == pytest.approx(alone[2].values[name])

    def test_leaks_are_told(self, audit: Path) -> None:
        request = CleanRequest(
            audit=audit, test=str(audit / "scored"), test_split="train", repeats=1
        )
        found = run_clean(request).comparison
        assert found is not None
        assert "60 images of the test are in the audited data" in found.warnings[0]

    def test_the_query_is_no_test(self, audit: Path, test_source: str, tmp_path: Path) -> None:
        summary = json.loads((audit / "summary.json").read_text())
        summary["query"]["source"] = f"{test_source}, split train"
        (tmp_path / "scored").symlink_to(audit / "scored")
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        request = CleanRequest(audit=tmp_path, test=test_source, test_split="train", repeats=1)
        found = run_clean(request).comparison
        assert found is not None
        assert "The test is the query" in found.warnings[0]

    def test_no_summary(self, audit: Path, test_source: str, tmp_path: Path) -> None:
        (tmp_path / "scored").symlink_to(audit / "scored")
        with pytest.raises(UserError, match=r"no summary\.json that names the audited model"):
            run_clean(CleanRequest(audit=tmp_path, test=test_source))

    def test_other_columns(self, audit: Path, data: Dataset, tmp_path: Path) -> None:
        data.select(range(5)).select_columns(["image"]).save_to_disk(tmp_path / "t")
        with pytest.raises(UserError, match=r"`test=.*could hold the texts"):
            run_clean(CleanRequest(audit=audit, test=str(tmp_path / "t"), test_split="train"))

    def test_mistakes_write_nothing(self, audit: Path, tmp_path: Path) -> None:
        request = CleanRequest(audit=audit, output=tmp_path / "new", test="no/such/rows")
        with pytest.raises(UserError, match="no/such/rows"):
            run_clean(request)
        assert list(tmp_path.iterdir()) == []


def arguments(audit: Path, test_source: str) -> list[object]:
    return ["clean", audit, "--dry-run", "--test", test_source, "--test-split", "train"]


def test_command(run: Run, audit: Path, test_source: str) -> None:
    classes = ["--class-column", "category", "--class-template", "an icon of a {}"]
    strategy = ["--strategy", "drop", "--repeats", 2]
    status, output = run(*arguments(audit, test_source), *strategy, *classes)
    assert status == 0, output
    assert "random, as many as drop" in output
    assert "Zero-shot accuracy, all that are right over all rows: " in output
    assert " ± " in output


def test_command_in_json(run: Run, audit: Path, test_source: str) -> None:
    several = ["--strategy", "drop", "--strategy", "relabel", "--json"]
    status, output = run(*arguments(audit, test_source), "--repeats", 1, *several)
    assert status == 0, output
    found = json.loads(output)
    assert found["counts"]["drop"]["removed"] == 20
    assert found["counts"]["relabel"]["relabelled"] == 10
    assert len(found["comparison"]["outcomes"]) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--repeats", 0], "--repeats"),
        (["--strategy", "drop", "--share", 0.1], "only the strategy"),
        (["--class-column", "colour"], "--class-column 'colour'"),
        (["--class-template", "a {}"], "means nothing without --class-column"),
    ],
)
def test_command_tells_mistakes(
    run: Callable[..., tuple[int, str]],
    audit: Path,
    test_source: str,
    options: list[object],
    words: str,
) -> None:
    status, output = run(*arguments(audit, test_source), *options)
    assert (status, words in output) == (2, True), output
