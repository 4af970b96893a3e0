"""What an audit has learned, judging other rows: in `Dataset.map`, on streams, in Ray, in files."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import datasets.config
import numpy as np
import pytest
from datasets import Dataset, Image
from datasets.fingerprint import Hasher

import hf_ecif
from hf_ecif import Audit, DetectionConfig, Influence, InfluenceConfig, UserError
from hf_ecif.data.columns import COLUMNS, SCORES
from hf_ecif.detection.annotate import FEATURES
from hf_ecif.detection.auditor import Auditor
from hf_ecif.utils.progress import silent
from tests.support import DEMO

CONFIG = InfluenceConfig(batch_size=16, fit_epochs=2, partitions=2, probes=2, max_iterations=3)
LEARNED, OTHERS = 90, 40
SHARED = 8  # of the others, copies of rows that were learned from
BAD = {20: "image missing", 25: "caption empty"}
NAMES_ROWS = ("ecif_reason", "ecif_duplicate_group")  # of the audited data alone


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("caches")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
        patch.setattr("hf_ecif.detection.auditor.HF_HOME", str(root / "home"))
        yield


@pytest.fixture(scope="module")
def train() -> Dataset:
    rows = Dataset.from_parquet(str(DEMO / "data" / "train.parquet"))
    return rows.select_columns(["image", "text", "category"])


@pytest.fixture(scope="module")
def audit(train: Dataset) -> Audit:
    query = Dataset.from_parquet(str(DEMO / "data" / "validation.parquet"))
    return hf_ecif.audit(
        str(DEMO / "model"),
        train.select(range(LEARNED)),
        query=query.select(range(60)),
        image_column="image",
        text_column="text",
        config=CONFIG,
        detection=DetectionConfig(injections=2),
        suggest_probability=0.0,
        progress=silent,
    )


@pytest.fixture(scope="module")
def auditor(audit: Audit) -> Auditor:
    assert audit.auditor is not None
    return audit.auditor


@pytest.fixture(scope="module")
def others(train: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Rows some of which were learned from, and some of which cannot be read, in a file."""
    rows = train.select(range(LEARNED - SHARED, LEARNED - SHARED + OTHERS))
    cells = rows.cast_column("image", Image(decode=False))[:]
    cells["image"][20], cells["text"][25] = None, ""
    path = tmp_path_factory.mktemp("others") / "rows.parquet"
    Dataset.from_dict(cells, features=rows.features).to_parquet(path)
    return Dataset.from_parquet(str(path)).cast_column("image", Image(decode=False))


@pytest.fixture(scope="module")
def judged(auditor: Auditor, others: Dataset) -> Dataset:
    return judge(auditor, others)


def judge(auditor: Auditor, rows: Dataset, size: int = OTHERS, **options: Any) -> Dataset:
    kinds = auditor.features(rows)
    fresh = token_hex(8)  # else a cache may answer
    return rows.map(
        auditor,
        batched=True,
        batch_size=size,
        features=kinds,
        new_fingerprint=fresh,
        **options,
    )


def assert_alike(found: Any, expected: Any, names: Any = tuple(COLUMNS)) -> None:
    """The same up to rounding: products of other shapes are added up in another order."""
    for name in names:
        first, second = list(found[name]), list(expected[name])
        if FEATURES[name] == FEATURES["ecif_score"]:
            values = (np.array(side, dtype=np.float64) for side in (first, second))
            np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=name)
        elif name != "ecif_reason":  # which states numbers
            assert first == second, name


class TestObject:
    def test_is_pickled_by_its_name(self, auditor: Auditor) -> None:
        content = pickle.dumps(auditor)
        assert len(content) < 1000
        assert pickle.loads(content).fingerprint == auditor.fingerprint

    def test_hash_is_stable(self, auditor: Auditor) -> None:
        assert Hasher.hash(auditor) == Hasher.hash(replace(auditor))
        assert Hasher.hash(auditor) != Hasher.hash(replace(auditor, text_column="caption"))

    def test_missing_column_is_named(self, auditor: Auditor, others: Dataset) -> None:
        with pytest.raises(UserError, match="no column 'caption', but image, text, category"):
            replace(auditor, text_column="caption")(others[:2])

    def test_tells_what_it_is(self, auditor: Auditor) -> None:
        assert repr(auditor).startswith(f"Auditor(learned from {LEARNED} distinct pairs, flags")


class TestMap:
    def test_every_row_has_all_columns(self, judged: Dataset, others: Dataset) -> None:
        assert judged.column_names == [*others.column_names, *COLUMNS]
        assert {name: judged.features[name] for name in COLUMNS} == FEATURES
        readable = [row for row in range(OTHERS) if row not in BAD]
        for name in (*SCORES, "ecif_noise_probability", "ecif_suspicion", "ecif_flag"):
            column = judged[name][:]
            assert [row for row in range(OTHERS) if column[row] is not None] == readable, name
        assert judged["text"][:] == others["text"][:]

    def test_rows_that_cannot_be_read_have_a_reason(self, judged: Dataset) -> None:
        for row, reason in BAD.items():
            assert reason in judged[row]["ecif_reason"]

    def test_copies_have_the_verdicts_of_what_was_learned_from(
        self, judged: Dataset, audit: Audit
    ) -> None:
        rows = audit.dataset.select(range(LEARNED - SHARED, LEARNED))
        for name in [name for name in COLUMNS if name not in NAMES_ROWS]:
            if not name.startswith(("ecif_suggested", "ecif_wrong")):
                assert judged[name][:SHARED] == rows[name][:], name

    def test_others_are_not_trained_on(self, judged: Dataset) -> None:
        assert set(judged["ecif_self"][SHARED:]) == {0.0, None}
        assert all(judged["ecif_self"][:SHARED])

    def test_flagged_rows_have_reasons_and_suggestions(self, judged: Dataset) -> None:
        flagged = [row for row in judged if row["ecif_flag"]]
        assert len(flagged) > 3
        assert all("held out, its loss" in row["ecif_reason"] for row in flagged)
        assert not any(" of row" in row["ecif_reason"] for row in flagged)
        assert any(row["ecif_suggested_text"] for row in flagged)

    def test_batches_make_no_difference(
        self, auditor: Auditor, others: Dataset, judged: Dataset
    ) -> None:
        assert_alike(judge(auditor, others, 7), judged)

    @pytest.mark.slow
    def test_with_two_processes(self, auditor: Auditor, others: Dataset, judged: Dataset) -> None:
        assert_alike(judge(auditor, others, num_proc=2), judged)

    def test_of_a_stream(self, auditor: Auditor, others: Dataset, judged: Dataset) -> None:
        stream = others.to_iterable_dataset()
        kinds = auditor.features(stream)
        rows = [*stream.map(auditor, batched=True, batch_size=16, features=kinds)]
        assert_alike({name: [row[name] for row in rows] for name in COLUMNS}, judged)

    def test_a_batch_of_arrays_comes_back_whole(
        self, auditor: Auditor, others: Dataset, judged: Dataset
    ) -> None:
        batch = {name: np.array(values, dtype=object) for name, values in others[:16].items()}
        found = auditor(batch)
        assert list(found) == [*others.column_names, *COLUMNS]
        assert found["ecif_noise_probability"].dtype == np.float32
        np.testing.assert_allclose(
            found["ecif_suspicion"], judged["ecif_suspicion"][:16], rtol=1e-4
        )

    @pytest.mark.slow
    def test_in_ray(
        self, auditor: Auditor, others: Dataset, judged: Dataset, tmp_path: Path
    ) -> None:
        ray = pytest.importorskip("ray")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)  # it looks through all that lies where it is started
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_AUTH_TOKEN", token_hex(16))
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
            try:
                rows = ray.data.from_huggingface(others)
                found = rows.map_batches(auditor, batch_size=OTHERS).take_all()
            finally:
                ray.shutdown()
        values = [row["ecif_suspicion"] for row in found]
        known = sorted(value for value in values if not np.isnan(value))
        expected = [value for value in judged["ecif_suspicion"] if value is not None]
        assert known == pytest.approx(sorted(expected), rel=1e-4)


class TestFolder:
    @pytest.fixture(scope="class")
    def folder(self, auditor: Auditor, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "auditor"
        auditor.save_pretrained(folder)
        return folder

    def test_comes_back_the_same(
        self, auditor: Auditor, folder: Path, others: Dataset, judged: Dataset
    ) -> None:
        loaded = Auditor.from_pretrained(folder)
        assert loaded.fingerprint == auditor.fingerprint
        assert_alike(judge(loaded, others), judged)

    def test_is_pickled_where_it_lies(self, folder: Path) -> None:
        assert str(folder).encode() in pickle.dumps(Auditor.from_pretrained(folder))

    def test_holds_no_pickles(self, folder: Path) -> None:
        kinds = {path.suffix for path in folder.iterdir()}
        assert kinds <= {".safetensors", ".json", ".txt"}

    def test_is_a_fit_too(self, folder: Path, auditor: Auditor) -> None:
        fit = Influence.from_pretrained(folder)
        assert fit.fingerprint == auditor.learned.influence.fingerprint

    def test_a_fit_alone_is_refused(self, auditor: Auditor, tmp_path: Path) -> None:
        auditor.learned.influence.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="holds a fit, but no auditor"):
            Auditor.from_pretrained(tmp_path)

    def test_another_auditor_in_its_place_is_refused(self, auditor: Auditor, folder: Path) -> None:
        content = pickle.dumps(replace(Auditor.from_pretrained(folder), group_column="category"))
        with pytest.raises(UserError, match="another auditor by now"):
            pickle.loads(content)
