"""Whole commands on what people have: lists of captions, classes, and tars as a stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset

import hf_ecif
from hf_ecif.applications.audit import run_audit
from hf_ecif.applications.clean import run_clean
from hf_ecif.applications.fit import run_fit
from hf_ecif.applications.requests import AuditRequest, CleanRequest, FitRequest, ScoreRequest
from hf_ecif.applications.score import run_score
from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.errors import UserError
from hf_ecif.hub.dataset_repo import DatasetRepo
from tests.support import DEMO
from tests.support.formats import write_tar
from tests.support.rows import read

MODEL = str(DEMO / "model")
QUICK = InfluenceConfig(batch_size=16, fit_epochs=1, partitions=2, probes=2, max_iterations=2)
ONCE = DetectionConfig(injections=1)


def demo(count: int = 40) -> Dataset:
    return read(DEMO / "data" / "train.parquet").select(range(count))


def audit(rows: Dataset, folder: Path, **options: Any) -> AuditFolder:
    rows.save_to_disk(folder / "data")
    run_audit(
        AuditRequest(
            model=MODEL,
            dataset=str(folder / "data"),
            output=folder / "out",
            detection=ONCE,
            **options,
        ),
        QUICK,
    )
    return AuditFolder(folder / "out")


@pytest.mark.slow
class TestLists:
    @pytest.fixture(scope="class")
    def lists(self) -> list[list[str | None] | None]:
        texts: list[str] = demo()["text"][:]
        return [[text, f"this is {text}"] for text in texts[:-3]] + [[], None, [None, texts[-1]]]

    @pytest.fixture(scope="class")
    def audited(
        self, lists: list[list[str | None] | None], tmp_path_factory: pytest.TempPathFactory
    ) -> AuditFolder:
        kinds = Features(image=Image(), captions=List(Value("string")), id=Value("int64"))
        columns = {"image": demo()["image"][:], "captions": lists, "id": list(range(40))}
        rows = Dataset.from_dict(columns, features=kinds)
        return audit(rows, tmp_path_factory.mktemp("lists"))

    def test_are_lists_again_in_all_folders(
        self, audited: AuditFolder, lists: list[list[str | None] | None]
    ) -> None:
        summary = audited.read_summary()
        assert summary.rows == 2 * 37 + 1 + 1 + 2
        assert summary.kept + summary.removed == summary.rows
        audited.check_counts(summary)
        scored = pq.read_table(audited.shards("scored")[0]).to_pylist()
        assert [row["captions"] for row in scored] == lists
        assert [len(row["ecif_flag"]) for row in scored[:37]] == [2] * 37
        assert [row["ecif_reason"] for row in scored[37:]] == [
            ["caption missing"],
            ["caption missing"],
            ["caption missing", None],
        ]
        parts = [
            (row["id"], place, text)
            for part in ("kept", "removed")
            for row in pq.read_table(audited.shards(part)).to_pylist()  # type: ignore[arg-type]
            for place, text in zip(
                row["ecif_place:captions"], row["captions"] or [None], strict=False
            )
        ]
        expected = [
            (row, place, text)
            for row, texts in enumerate(lists)
            for place, text in enumerate(texts or [])
        ]
        assert sorted(part for part in parts if part[1] is not None and part[1] >= 0) == expected

    def test_are_rows_to_whoever_goes_on(self, audited: AuditFolder, tmp_path: Path) -> None:
        loaded = hf_ecif.load_audit(audited.path)
        assert len(loaded.dataset) == loaded.summary.rows
        request = CleanRequest(audit=audited.path, output=tmp_path / "clean", strategy="weight")
        assert len(run_clean(request).result.kept) == loaded.summary.rows
        kept = load_dataset("parquet", data_files=str(tmp_path / "clean/kept/*.parquet"))
        assert kept["train"].features["ecif_weight"] == List(Value("float32"))

    def test_can_be_published(self, audited: AuditFolder) -> None:
        repo = DatasetRepo(audited.path)
        with repo.publish_as("me/pairs", removed=True, other_splits=False) as (files, card):
            assert "summary.json" in " ".join(files)
            assert card.layout.counts["kept"] == repo.summary.kept


@pytest.mark.slow
def test_classes_are_relabelled_with_their_captions(tmp_path: Path) -> None:
    rows = demo(60)
    names = sorted(set(rows["category"][:]))
    kinds = ClassLabel(names=names)
    rows = rows.select_columns(["image", "category"]).cast_column("category", kinds)
    audited = audit(rows, tmp_path, template="an icon of {}").path
    summary = hf_ecif.load_audit(audited).summary
    assert (summary.columns.text, summary.reading.text) == ("ecif_caption", "category")
    assert summary.reading.template == "an icon of {}"
    cleaned = hf_ecif.load_audit(audited).clean("relabel")
    for row in cleaned.kept.select_columns(["category", "ecif_caption"]):
        assert row["ecif_caption"] == f"an icon of {names[row['category']]}"
    with pytest.raises(UserError, match=r"finished|`resume`"):
        audit(rows, tmp_path, template="a {}", resume=True)


class TestTarsAsAStream:
    @pytest.fixture(scope="class")
    def fit(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("fit")
        demo(24).save_to_disk(folder / "data")
        request = FitRequest(model=MODEL, dataset=str(folder / "data"), output=folder / "fit")
        run_fit(request, QUICK.__class__(**{**QUICK.to_dict(), "batch_size": 4}))
        return folder / "fit"

    @pytest.fixture(scope="class")
    def tars(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        folder = tmp_path_factory.mktemp("tars")
        for number in range(2):
            files = {}
            for row, cells in enumerate(demo(48).select(range(20 * number, 20 * number + 20))):
                files[f"{number}{row:04d}.png"] = cells["image"]["bytes"]
                files[f"{number}{row:04d}.json"] = json.dumps({"caption": cells["text"]}).encode()
            write_tar(folder / f"{number:05d}.tar", files)
        return f"{folder}/{{00000..00001}}.tar"

    def score(self, fit: Path, tars: str, output: Path, **options: Any) -> dict[str, Any]:
        request = ScoreRequest(influence=str(fit), dataset=tars, output=output, **options)
        return run_score(request)

    def test_has_the_scores_of_all_rows_at_once(self, fit: Path, tars: str, tmp_path: Path) -> None:
        for name, streaming in (("stream", True), ("whole", False)):
            told = self.score(fit, tars, tmp_path / name, streaming=streaming)
            assert (told["rows"], told["unscored"]) == (40, 0)
            assert told["columns"] == {"image": "png", "text": "caption"}
        scored = [
            pq.read_table(tmp_path / name / "scored").to_pydict() for name in ("stream", "whole")
        ]
        for column in ("ecif_score", "caption", "json", "__key__"):
            assert scored[0][column] == scored[1][column]

    def test_of_the_first_rows_alone(self, fit: Path, tars: str, tmp_path: Path) -> None:
        assert self.score(fit, tars, tmp_path / "a", streaming=True, limit=10)["rows"] == 10
        assert self.score(fit, tars, tmp_path / "b", limit=30, sample=10)["rows"] == 10
        with pytest.raises(UserError, match="`sample` needs to know"):
            self.score(fit, tars, tmp_path / "c", streaming=True, sample=10)
