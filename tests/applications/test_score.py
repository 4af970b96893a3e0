"""Fit once, score blocks of rows into shards: on disk, as a stream, and by the command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Image, Value, load_dataset
from typer.testing import CliRunner

from hf_ecif.applications.fit import FitRequest, run_fit
from hf_ecif.applications.score import BATCHES, ScoreRequest, run_score
from hf_ecif.cli.main import app
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.columns import SCORES
from hf_ecif.errors import UserError
from hf_ecif.influence.columns import REASON
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.model import InfluenceModel
from tests.support import DEMO
from tests.support.rows import read

CONFIG = InfluenceConfig(
    batch_size=4, fit_epochs=1, partitions=2, probes=2, max_iterations=2, max_pixels=1_000_000
)
SIZE = BATCHES * CONFIG.batch_size
ROWS = 2 * SIZE + 5
MISSING = {2: "image missing", SIZE + 1: "caption empty"}
SOURCE = ["image", "text", "category", "emoji", "is_misaligned"]


def columns_of(rows: Dataset) -> dict[str, list[Any]]:
    return rows.cast_column("image", Image(decode=False))[:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``rows.parquet``, the demo's first rows with two that cannot be read."""
    folder = tmp_path_factory.mktemp("endless")
    rows = read(DEMO / "data" / "train.parquet").select(range(ROWS)).select_columns(SOURCE)
    columns = rows[:]
    columns["image"][2], columns["text"][SIZE + 1] = None, " "
    written = Dataset.from_dict(columns, features=rows.features)
    written.cast_column("image", Image()).to_parquet(folder / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def fit_request(root: Path) -> FitRequest:
    return FitRequest(
        model=str(DEMO / "model"), dataset=str(root / "rows.parquet"), output=root / "fit"
    )


@pytest.fixture(scope="module")
def fit(fit_request: FitRequest) -> Path:
    run_fit(fit_request, CONFIG)
    return fit_request.output


@pytest.fixture(scope="module")
def score(root: Path, fit: Path) -> Callable[..., dict[str, Any]]:
    """Score with other options than the usual ones."""

    def score(name: str, **options: Any) -> dict[str, Any]:
        request = ScoreRequest(
            influence=str(fit), dataset=str(root / "rows.parquet"), output=root / name
        )
        return run_score(replace(request, **options))

    return score


@pytest.fixture(scope="module")
def summary(score: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return score("out")


@pytest.fixture(scope="module")
def scored(summary: dict[str, Any], root: Path) -> Dataset:
    return load_dataset(str(root / "out" / "scored"), split="train")


@pytest.fixture(scope="module")
def before(root: Path) -> Dataset:
    return Dataset.from_parquet(str(root / "rows.parquet"))


class TestFit:
    def test_is_loaded_with_its_config_and_the_same_fit(self, fit: Path) -> None:
        rows = read(fit.parent / "rows.parquet")
        model = InfluenceModel.from_pretrained(DEMO / "model", CONFIG)
        from hf_ecif.influence.queries import choose_query

        train = model.read(rows)
        influence = model.fit(train, choose_query(train, model.encoder, seed=CONFIG.seed))
        fitted, loaded = influence.fitted, Influence.from_pretrained(fit)
        assert loaded.config.to_dict() == CONFIG.to_dict()
        assert loaded.fingerprint == influence.fingerprint
        for one, other in zip(loaded.fitted.directions, fitted.directions, strict=True):
            assert torch.equal(one, other)
        assert loaded.fitted.solvers == fitted.solvers
        assert loaded.fitted.train_count == ROWS - len(MISSING)

    def test_leaves_no_checkpoints(self, fit: Path) -> None:
        assert [path.name for path in fit.iterdir() if path.name.startswith(".")] == []

    def test_finished_one_is_not_replaced_by_mistake(self, fit_request: FitRequest, fit: Path):
        for resume in (False, True):
            with pytest.raises(UserError, match=r"finished. `overwrite` replaces it"):
                run_fit(replace(fit_request, resume=resume), CONFIG)

    def test_overwrite_replaces_it(self, fit_request: FitRequest, tmp_path: Path) -> None:
        request = replace(fit_request, output=tmp_path / "fit")
        run_fit(request, replace(CONFIG, fit_epochs=0))
        other = Influence.from_pretrained(request.output).fingerprint
        run_fit(replace(request, overwrite=True), CONFIG)
        assert Influence.from_pretrained(request.output).fingerprint != other

    def test_foreign_output_is_refused(self, fit_request: FitRequest, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(UserError, match="holds other files"):
            run_fit(replace(fit_request, output=tmp_path, overwrite=True), CONFIG)
        assert (tmp_path / "thesis.txt").read_text() == "years of work"


class TestShards:
    def test_last_rows_join_the_block_before(self, summary: dict[str, Any], root: Path) -> None:
        shards = sorted((root / "out" / "scored").iterdir())
        assert [pq.read_metadata(shard).num_rows for shard in shards] == [SIZE, SIZE + 5]
        assert summary["shards"] == 2

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("count", "expected"),
        [
            (2, [2]),
            (SIZE // 2, [SIZE // 2]),
            (SIZE, [SIZE]),
            (SIZE + SIZE // 2, [SIZE + SIZE // 2]),
            (SIZE + SIZE // 2 + 1, [SIZE, SIZE // 2 + 1]),
            (2 * SIZE, [SIZE, SIZE]),
        ],
    )
    def test_blocks_of_any_count(
        self,
        score: Callable[..., dict[str, Any]],
        before: Dataset,
        tmp_path: Path,
        count: int,
        expected: list[int],
        streaming: bool,
    ) -> None:
        before.select(range(count)).to_parquet(tmp_path / "few.parquet")
        output = tmp_path / "out"
        dataset = str(tmp_path / "few.parquet")
        summary = score("", dataset=dataset, output=output, streaming=streaming)
        shards = sorted((output / "scored").iterdir())
        assert [pq.read_metadata(shard).num_rows for shard in shards] == expected
        assert (summary["rows"], summary["shards"]) == (count, len(expected))

    def test_open_with_load_dataset_in_the_order_of_the_rows(
        self, scored: Dataset, before: Dataset
    ) -> None:
        assert scored.num_rows == ROWS
        for name in SOURCE[1:]:
            assert scored[name] == before[name]

    def test_source_columns_are_untouched(self, scored: Dataset, before: Dataset) -> None:
        assert scored.column_names == [*SOURCE, *SCORES, REASON]
        assert {name: scored.features[name] for name in SOURCE} == before.features
        assert columns_of(scored)["image"] == columns_of(before)["image"]

    def test_types(self, scored: Dataset) -> None:
        types = {name: scored.features[name] for name in (*SCORES, REASON)}
        assert types == dict.fromkeys(SCORES, Value("float32")) | {REASON: Value("string")}

    def test_every_row_has_scores_or_a_reason(
        self, scored: Dataset, summary: dict[str, Any]
    ) -> None:
        reasons = scored[REASON][:]
        assert {row for row, reason in enumerate(reasons) if reason} == set(MISSING)
        for row, words in MISSING.items():
            assert words in reasons[row]
        for name in SCORES:
            values = scored[name][:]
            assert {row for row, value in enumerate(values) if value is None} == set(MISSING)
            assert np.isfinite([value for value in values if value is not None]).all()
        assert (summary["rows"], summary["unscored"]) == (ROWS, len(MISSING))

    def test_scores_are_those_of_the_blocks(
        self, scored: Dataset, before: Dataset, fit: Path
    ) -> None:
        influence = Influence.from_pretrained(fit)
        model = influence.model
        for rows in (range(SIZE), range(SIZE, ROWS)):
            read_rows = model.read(before.select(rows))
            scores, given = influence.scores(read_rows), model.score_as_given(read_rows)
            block = scored.select([rows.start + row for row in read_rows.positions.tolist()])
            for name, values in {
                "ecif_score": scores.positive + scores.negative,
                "ecif_relative": (scores.positive + scores.negative) / scores.size,
                "ecif_loo_loss": scores.loss + scores.self_influence,
                "clip_score": given.clip_score,
            }.items():
                assert block[name][:] == values.tolist(), name

    def test_summary_is_written(self, summary: dict[str, Any], root: Path) -> None:
        assert json.loads((root / "out" / "scoring.json").read_text()) == summary
        assert {path.name for path in (root / "out").iterdir()} == {"scored", "scoring.json"}

    def test_in_many_blocks_the_order_stays(
        self, score: Callable[..., dict[str, Any]], root: Path, scored: Dataset
    ) -> None:
        many = Dataset.from_dict(
            columns_of(scored.select_columns(SOURCE).select([5, 6] * 6 * SIZE)) | {},
            features=scored.select_columns(SOURCE)
            .cast_column("image", Image(decode=False))
            .features,
        )
        numbered = many.add_column("number", list(range(len(many))))
        numbered.cast_column("image", Image()).to_parquet(root / "many.parquet")
        for name, streaming in (("many", False), ("many stream", True)):
            score(name, dataset=str(root / "many.parquet"), streaming=streaming)
            rows = load_dataset(str(root / name / "scored"), split="train")
            assert rows["number"][:] == list(range(12 * SIZE))


class TestStream:
    @pytest.fixture(scope="class")
    def streamed(self, score: Callable[..., dict[str, Any]], root: Path) -> Dataset:
        score("stream", streaming=True)
        return load_dataset(str(root / "stream" / "scored"), split="train")

    def test_has_the_same_rows_and_scores(self, streamed: Dataset, scored: Dataset) -> None:
        assert streamed.features == scored.features
        assert columns_of(streamed) == columns_of(scored)

    def test_of_nothing_is_refused(
        self, score: Callable[..., dict[str, Any]], root: Path, before: Dataset
    ) -> None:
        before.select(range(0)).to_parquet(root / "none.parquet")
        with pytest.raises(UserError, match="the split 'train' has no rows"):
            score("stream of none", dataset=str(root / "none.parquet"), streaming=True)

    def test_of_images_in_a_folder(
        self, score: Callable[..., dict[str, Any]], root: Path, before: Dataset
    ) -> None:
        folder = root / "images"
        folder.mkdir()
        lines = []
        for number in range(SIZE + 2, SIZE + 8):
            before[number]["image"].save(folder / f"{number}.png")
            lines.append({"file_name": f"{number}.png", "text": before[number]["text"]})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for name, streaming in (("folder", False), ("folder stream", True)):
            score(name, dataset=str(folder), streaming=streaming)
        one, other = (
            load_dataset(str(root / name / "scored"), split="train")
            for name in ("folder", "folder stream")
        )
        assert sorted(one["ecif_score"][:]) == sorted(other["ecif_score"][:])
        assert one[0]["image"].size == before[SIZE + 2]["image"].size  # the bytes came along


class TestColumns:
    def test_those_of_an_earlier_run_are_replaced(
        self, score: Callable[..., dict[str, Any]], root: Path, scored: Dataset
    ) -> None:
        stale = scored.remove_columns("ecif_score").add_column("ecif_score", [7.0] * ROWS)
        stale.add_column("ecif_flag", [True] * ROWS).to_parquet(root / "stale.parquet")
        for name, streaming in (("stale", False), ("stale stream", True)):
            score(name, dataset=str(root / "stale.parquet"), streaming=streaming)
            again = load_dataset(str(root / name / "scored"), split="train")
            assert again.column_names == scored.column_names
            assert columns_of(again) == columns_of(scored)

    def test_may_have_other_names(
        self, score: Callable[..., dict[str, Any]], root: Path, scored: Dataset, before: Dataset
    ) -> None:
        renamed = before.rename_columns({"image": "picture", "text": "caption"})
        renamed.to_parquet(root / "renamed.parquet")
        score(
            "renamed",
            dataset=str(root / "renamed.parquet"),
            image_column="picture",
            text_column="caption",
        )
        again = load_dataset(str(root / "renamed" / "scored"), split="train")
        assert again["ecif_score"][:] == scored["ecif_score"][:]

    def test_relative_score_is_the_one_of_the_config(
        self, score: Callable[..., dict[str, Any]], root: Path, fit_request: FitRequest
    ) -> None:
        span = replace(fit_request, output=root / "span fit")
        run_fit(span, replace(CONFIG, relative="span"))
        score("span", influence=str(span.output))
        found = load_dataset(str(root / "span" / "scored"), split="train")["ecif_relative"]
        assert min(value for value in found if value is not None) >= 0  # a norm


class TestErrors:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"text_column": "caption"}, r"no text column 'caption'.*`text_column`"),
            ({"image_column": "emoji_"}, r"no image column 'emoji_'.*`image_column`"),
            ({"text_column": "is_misaligned"}, r"must hold strings"),
            ({"split": "nowhere"}, r"nowhere"),
            ({"dataset": "no/such/folder/at all"}, r"no such"),
        ],
    )
    def test_of_the_data_are_found_before_anything_is_written(
        self,
        score: Callable[..., dict[str, Any]],
        root: Path,
        options: dict[str, Any],
        words: str,
        streaming: bool,
    ) -> None:
        with pytest.raises(UserError, match=words):
            score("wrong", streaming=streaming, **options)
        assert not (root / "wrong").exists()

    def test_no_fit_in_the_folder(self, score: Callable[..., dict[str, Any]], root: Path) -> None:
        with pytest.raises(UserError, match=r"holds no fit.*give the folder of 'hf-ecif fit'"):
            score("wrong", influence=str(DEMO / "model"))
        assert not (root / "wrong").exists()

    def test_no_such_fit(self, score: Callable[..., dict[str, Any]], root: Path) -> None:
        with pytest.raises(UserError, match=r"no fit to score with.*no such folder.*hf-ecif fit"):
            score("wrong", influence=str(root / "none"))
        assert not (root / "wrong").exists()

    def test_finished_output(
        self, score: Callable[..., dict[str, Any]], summary: dict[str, Any]
    ) -> None:
        for resume in (False, True):
            with pytest.raises(UserError, match=r"finished. `overwrite` replaces it"):
                score("out", resume=resume)

    def test_foreign_output(self, score: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
        (tmp_path / "scored").mkdir()
        for overwrite in (False, True):
            with pytest.raises(UserError, match="holds other files"):
                score("", output=tmp_path, overwrite=overwrite)

    def test_output_that_is_a_file(
        self, score: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="is a file"):
            score("", output=tmp_path / "file")


class TestCommand:
    def test_json_is_one_line(self, root: Path, fit: Path, scored: Dataset) -> None:
        data = str(root / "rows.parquet")
        model, output = str(DEMO / "model"), str(root / "command fit")
        options = [
            f"--{name.replace('_', '-')}={value}" for name, value in CONFIG.to_dict().items()
        ]
        flags = [option for option in options if not option.startswith("--mask-repeated")]
        fitted = CliRunner().invoke(
            app, ["fit", "--model", model, "--dataset", data, "--output", output, "--json", *flags]
        )
        assert fitted.exit_code == 0, fitted.output
        assert fitted.stdout.count("\n") == 1
        assert json.loads(fitted.stdout)["train_count"] == ROWS - len(MISSING)
        done = CliRunner().invoke(
            app,
            ["score", output, "--dataset", data, "--output", str(root / "command"), "--json"],
        )
        assert done.exit_code == 0, done.output
        assert done.stdout.count("\n") == 1
        assert json.loads(done.stdout) == json.loads(
            (root / "command" / "scoring.json").read_text()
        )
        again = load_dataset(str(root / "command" / "scored"), split="train")
        assert columns_of(again) == columns_of(scored)

    def test_words_say_what_was_done(self, root: Path, fit: Path) -> None:
        done = CliRunner().invoke(
            app,
            [
                "score",
                str(fit),
                "--dataset",
                str(root / "rows.parquet"),
                "--output",
                str(root / "words"),
                "--quiet",
            ],
        )
        assert f"{ROWS} rows scored, 2 of them without a score, in 2 shards." in done.stdout


def test_schema_holds_in_a_shard_without_scores(
    score: Callable[..., dict[str, Any]], root: Path, before: Dataset, scored: Dataset
) -> None:
    """A block of unreadable rows has the types of all others, so that shards fit together."""
    texts = ["" if row < SIZE else text for row, text in enumerate(before["text"])]
    before.remove_columns("text").add_column("text", texts).to_parquet(root / "blank.parquet")
    summary = score("blank", dataset=str(root / "blank.parquet"))
    assert summary["unscored"] == SIZE + 1  # one more is blank in the rows themselves
    schemas: list[pa.Schema] = [
        pq.read_schema(shard) for shard in sorted((root / "blank" / "scored").iterdir())
    ]
    assert schemas[0] == schemas[1]
