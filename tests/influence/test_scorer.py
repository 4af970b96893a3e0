"""The fit as a function of a batch, in `Dataset.map`, on streams and in Ray Data."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from secrets import token_hex
from typing import Any

import datasets.config
import numpy as np
import pytest
import torch
from datasets import Dataset, Image, IterableDataset, Value
from datasets.fingerprint import Hasher
from transformers import AutoModel, AutoProcessor, CLIPModel

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.columns import SCORES
from hf_ecif.errors import UserError
from hf_ecif.influence import scorer as module
from hf_ecif.influence.columns import REASON
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.scorer import Scorer
from tests.support import DEMO

CONFIG = InfluenceConfig(batch_size=4, fit_epochs=1, partitions=2, probes=2, max_iterations=2)
ROWS, BLOCK = 48, 16
BAD = {3: "image missing", 20: "caption empty", 21: "caption missing"}
NEW = (*SCORES, REASON)


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("caches")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
        patch.setattr("hf_ecif.influence.scorer.HF_HOME", str(root / "home"))
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Rows of the demo, some of them unreadable, in a file, so that results are cached."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    rows = Dataset.from_parquet(str(DEMO / "data" / "train.parquet")).select(range(ROWS))
    columns = rows.select_columns(["image", "text", "emoji"]).cast_column(
        "image", Image(decode=False)
    )
    cells = columns[:]
    cells["image"][3], cells["text"][20], cells["text"][21] = None, "", None
    changed = Dataset.from_dict(cells, features=columns.features)
    changed.cast_column("image", Image()).to_parquet(path)
    return Dataset.from_parquet(str(path))


@pytest.fixture(scope="module")
def influence(dataset: Dataset) -> Influence:
    model = InfluenceModel.from_pretrained(DEMO / "model", CONFIG)
    return model.fit(dataset.select(range(24)), dataset.select(range(24, 48)))


@pytest.fixture(scope="module")
def scorer(influence: Influence) -> Scorer:
    return Scorer.from_influence(influence)


def scored_alone(influence: Influence, rows: Dataset) -> dict[str, list[float | None]]:
    """What the influence itself says of a block, by row."""
    found = influence.model.read(rows)
    scores, given = influence.scores(found), influence.model.score_as_given(found)
    values = {
        "ecif_score": scores.positive + scores.negative,
        "ecif_positive": scores.positive,
        "ecif_negative": scores.negative,
        "ecif_stderr": scores.stderr,
        "ecif_relative": (scores.positive + scores.negative) / scores.size,
        "ecif_self": scores.self_influence,
        "ecif_loo_loss": scores.loss + scores.self_influence,
        "clip_score": given.clip_score,
        "neg_clip_loss": -given.loss / (2 * given.scale),
    }
    columns: dict[str, list[float | None]] = {}
    for name, column in values.items():
        columns[name] = [None] * len(rows)
        for row, value in zip(found.positions.tolist(), column.tolist(), strict=True):
            columns[name][row] = value
    return columns


@pytest.fixture(scope="module")
def expected(influence: Influence, dataset: Dataset) -> dict[str, list[float | None]]:
    """Of all blocks of 16 rows."""
    blocks = [
        scored_alone(influence, dataset.select(range(start, start + BLOCK)))
        for start in range(0, ROWS, BLOCK)
    ]
    return {name: [*chain.from_iterable(block[name] for block in blocks)] for name in SCORES}


def assert_scored(rows: dict[str, list[Any]], expected: dict[str, list[float | None]]) -> None:
    """Exactly these scores, and reasons where there are none."""
    for name in SCORES:
        assert rows[name] == expected[name], name
        assert [row for row, value in enumerate(rows[name]) if value is None] == list(BAD)
    for row, reason in enumerate(rows[REASON]):
        assert (reason is None) == (row not in BAD)
        assert reason is None or BAD[row] in reason


class TestObject:
    def test_is_small(self, scorer: Scorer) -> None:
        assert len(pickle.dumps(scorer)) < 1000

    def test_comes_back_from_pickle(self, scorer: Scorer) -> None:
        assert pickle.loads(pickle.dumps(scorer)) == scorer

    def test_hash_is_stable(self, scorer: Scorer, influence: Influence) -> None:
        assert Hasher.hash(scorer) == Hasher.hash(Scorer.from_influence(influence))

    def test_hash_is_that_of_the_fit(self, scorer: Scorer) -> None:
        assert Hasher.hash(scorer) != Hasher.hash(replace(scorer, fingerprint="0" * 16))

    def test_block_is_several_contrastive_batches(self, scorer: Scorer) -> None:
        assert scorer.rows == BLOCK

    def test_is_in_the_cache_once(self, scorer: Scorer, influence: Influence) -> None:
        folder = Path(scorer.source)
        Scorer.from_influence(influence)
        assert folder.is_absolute()
        assert [path.name for path in folder.parent.iterdir()] == [influence.fingerprint]


class TestMap:
    @pytest.mark.parametrize("decoded", [False, True])
    def test_equals_the_model(
        self,
        scorer: Scorer,
        dataset: Dataset,
        expected: dict[str, list[float | None]],
        decoded: bool,
    ) -> None:
        rows = dataset.cast_column("image", Image(decode=decoded))
        scored = rows.map(
            scorer, batched=True, batch_size=BLOCK, features=scorer.features(rows)
        ).cast_column("image", Image(decode=False))
        assert scored.column_names == ["image", "text", "emoji", *NEW]
        assert_scored(scored[:], expected)
        assert scored.select_columns(["text", "emoji"])[:] == {
            name: dataset[name][:] for name in ("text", "emoji")
        }
        if not decoded:  # else `map` encodes them anew
            assert scored["image"][:] == rows["image"][:]

    def test_types(self, scorer: Scorer, dataset: Dataset) -> None:
        features = scorer.features(dataset)
        assert [features[name] for name in SCORES] == [Value("float32")] * len(SCORES)
        assert features[REASON] == Value("string")
        assert features["image"] == dataset.features["image"]

    def test_second_time_is_from_the_cache(
        self, influence: Influence, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = Scorer.from_influence(influence)
        options = {"batched": True, "batch_size": BLOCK, "features": first.features(dataset)}
        once = dataset.map(first, **options)
        monkeypatch.setattr(Scorer, "_columns", lambda *_: pytest.fail("it was scored again"))
        again = dataset.map(Scorer.from_influence(influence), **options)
        assert again.cache_files == once.cache_files
        assert again["ecif_score"][:] == once["ecif_score"][:]

    def test_with_two_processes(
        self, scorer: Scorer, influence: Influence, dataset: Dataset
    ) -> None:
        scored = dataset.map(
            scorer,
            batched=True,
            batch_size=scorer.rows,
            num_proc=2,
            features=scorer.features(dataset),
            new_fingerprint=token_hex(8),  # else the cache gives the blocks of one process
        )
        blocks = [range(0, 16), range(16, 24), range(24, 40), range(40, 48)]  # of each half
        for rows in blocks:
            alone = scored_alone(influence, dataset.select(rows))
            for name in SCORES:
                assert scored[name][rows.start : rows.stop] == alone[name]

    @pytest.mark.parametrize("decoded", [False, True])
    def test_of_a_stream(
        self,
        scorer: Scorer,
        dataset: Dataset,
        expected: dict[str, list[float | None]],
        decoded: bool,
    ) -> None:
        stream: IterableDataset = dataset.to_iterable_dataset(num_shards=1)
        stream = stream.cast_column("image", Image(decode=decoded))
        scored = stream.map(
            scorer, batched=True, batch_size=BLOCK, features=scorer.features(stream)
        )
        rows = list(scored)
        assert_scored({name: [row[name] for row in rows] for name in NEW}, expected)
        assert [row["emoji"] for row in rows] == dataset["emoji"][:]

    def test_other_columns(self, influence: Influence, dataset: Dataset, expected: Any) -> None:
        renamed = dataset.rename_columns({"image": "picture", "text": "caption"})
        scorer = Scorer.from_influence(influence, image_column="picture", text_column="caption")
        scored = renamed.map(scorer, batched=True, batch_size=BLOCK)
        assert_scored(scored.select_columns(list(NEW))[:], expected)


class TestBatches:
    def test_one_row_has_nobody_to_be_compared_with(self, scorer: Scorer, dataset: Dataset) -> None:
        columns = scorer(dataset[:1])
        assert columns == {
            **{name: [None] for name in SCORES},
            REASON: ["no other caption in its batch to compare it with"],
        }

    def test_one_readable_row_among_others(self, scorer: Scorer, dataset: Dataset) -> None:
        columns = scorer(dataset[20:23])
        reasons = columns[REASON]
        assert ["caption empty" in reasons[0], "caption missing" in reasons[1]] == [True, True]
        assert "no other caption" in reasons[2]
        assert columns["ecif_score"] == [None] * 3

    def test_of_unreadable_rows_alone(self, scorer: Scorer, dataset: Dataset) -> None:
        columns = scorer(dataset[20:22])
        assert columns["ecif_score"] == [None, None]
        assert all(columns[REASON])

    def test_equal_captions_are_nothing_to_compare(self, scorer: Scorer, dataset: Dataset) -> None:
        columns = scorer(dataset[:2] | {"text": ["a dog", "a dog"]})
        assert columns["ecif_relative"] == [None, None]
        assert all("no other caption" in reason for reason in columns[REASON])

    def test_batches_do_not_depend_on_each_other(self, scorer: Scorer, dataset: Dataset) -> None:
        first = scorer(dataset[:16])
        scorer(dataset[16:40])
        assert scorer(dataset[:16]) == first

    def test_numpy_batch_comes_back_whole(
        self, scorer: Scorer, dataset: Dataset, expected: dict[str, list[float | None]]
    ) -> None:
        rows = dataset.cast_column("image", Image(decode=False))[:BLOCK]
        batch = {name: np.array(values, dtype=object) for name, values in rows.items()}
        scored = scorer(batch)
        assert list(scored) == ["image", "text", "emoji", *NEW]
        assert all(scored[name] is batch[name] for name in batch)
        for name in SCORES:
            assert scored[name].dtype == np.float32
            wanted = np.array(expected[name][:BLOCK], dtype=np.float32)
            np.testing.assert_array_equal(scored[name], wanted)  # null is not a number there

    def test_images_may_be_bytes_paths_or_arrays(
        self, scorer: Scorer, dataset: Dataset, tmp_path: Path
    ) -> None:
        rows = dataset.cast_column("image", Image(decode=False))[8:16]
        contents = [cell["bytes"] for cell in rows["image"]]
        paths = [tmp_path / str(number) for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        arrays = [np.asarray(image.convert("RGB")) for image in dataset[8:16]["image"]]
        pictures = [image.convert("RGB") for image in dataset[8:16]["image"]]
        usual = scorer(rows)
        assert scorer(rows | {"image": contents}) == usual
        assert scorer(rows | {"image": [str(path) for path in paths]}) == usual
        assert scorer(rows | {"image": arrays}) == scorer(rows | {"image": pictures})

    def test_missing_column_is_named(self, scorer: Scorer, dataset: Dataset) -> None:
        with pytest.raises(UserError, match=r"no column 'text'.*emoji"):
            scorer({"image": dataset[:4]["image"], "emoji": dataset[:4]["emoji"]})


class TestFolder:
    def test_another_fit_in_its_place_is_refused(
        self, influence: Influence, dataset: Dataset, tmp_path: Path
    ) -> None:
        scorer = Scorer.from_influence(influence, tmp_path / "fit")
        other = InfluenceModel.from_pretrained(DEMO / "model", replace(CONFIG, seed=1))
        rows = other.read(dataset.select(range(24)))
        other.fit(rows, rows).save_pretrained(tmp_path / "fit")
        module._load.cache_clear()
        with pytest.raises(UserError, match="another fit by now: make the scorer again"):
            scorer(dataset[:8])

    def test_without_a_fit_is_refused(self, dataset: Dataset) -> None:
        with pytest.raises(UserError, match="holds no fit"):
            Scorer(str(DEMO / "model"), "0" * 16, 16)(dataset[:8])

    @pytest.mark.parametrize("parameters", ["projections", "last_block", "lora"])
    def test_comes_back_the_same(self, dataset: Dataset, tmp_path: Path, parameters: str) -> None:
        config = replace(CONFIG, parameters=parameters, lora_rank=2, max_iterations=1)
        model = InfluenceModel.from_pretrained(DEMO / "model", config)
        rows = model.read(dataset.select(range(22, 34)))
        influence = model.fit(rows, rows)
        influence.save_pretrained(tmp_path / "fit")
        loaded = Influence.from_pretrained(tmp_path / "fit")
        assert loaded.config.to_dict() == config.to_dict()
        assert loaded.fingerprint == influence.fingerprint
        one, other = influence.scores(rows), loaded.scores(dataset.select(range(22, 34)))
        for name in ("positive", "negative", "stderr", "size", "self_influence", "loss"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=0, atol=0)

        plain = AutoModel.from_pretrained(tmp_path / "fit")
        assert type(plain) is CLIPModel
        assert AutoProcessor.from_pretrained(tmp_path / "fit").tokenizer is not None
        weights = AutoModel.from_pretrained(DEMO / "model").state_dict()
        assert plain.state_dict().keys() == weights.keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-7)

    @pytest.mark.parametrize(
        "change", [{"seed": 1}, {"partitions": 3}, {"relative": "span"}, {"fit_epochs": 2}]
    )
    def test_other_config_is_another_fingerprint(
        self, influence: Influence, change: dict[str, Any]
    ) -> None:
        other = InfluenceModel.from_pretrained(DEMO / "model", replace(CONFIG, **change))
        changed = Influence(other, other.config, influence.fitted)
        assert changed.fingerprint != influence.fingerprint

    def test_other_fit_is_another_fingerprint(self, influence: Influence, dataset: Dataset) -> None:
        model = InfluenceModel.from_pretrained(DEMO / "model", CONFIG)
        rows = model.read(dataset.select(range(24)))
        for query, same in ((dataset.select(range(24, 48)), True), (rows, False)):
            other = model.fit(rows, query)
            assert (other.fingerprint == influence.fingerprint) is same


class TestRay:
    @pytest.fixture(scope="class")
    def cluster(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
        ray = pytest.importorskip("ray")
        with pytest.MonkeyPatch.context() as patch:
            # Of a data set of files, it looks through all that lies where it is started.
            patch.chdir(tmp_path_factory.mktemp("empty"))
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_AUTH_TOKEN", token_hex(16))  # else it is kept in the home folder
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield ray
            ray.shutdown()

    def test_same_batches_have_the_same_scores(
        self,
        cluster: Any,
        scorer: Scorer,
        dataset: Dataset,
        expected: dict[str, list[float | None]],
    ) -> None:
        rows = cluster.data.from_huggingface(dataset)
        scored = rows.map_batches(scorer, batch_size=scorer.rows).take_all()
        by_text = {(row["emoji"], row["text"]): row for row in scored}
        assert len(by_text) == len(scored) == ROWS
        before = dataset.cast_column("image", Image(decode=False))
        for number, row in enumerate(before):
            found = by_text[row["emoji"], row["text"]]
            assert set(found) == {*row, *NEW}
            assert found["image"] == row["image"]
            for name in SCORES:
                wanted = expected[name][number]
                value = found[name]
                assert np.isnan(value) if wanted is None else value == np.float32(wanted), name
            assert (found[REASON] is None) == (number not in BAD)
