"""Audits of more rows than they learn from."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
import torch
from datasets import Dataset, Image, load_dataset

from hf_ecif import DetectionConfig, InfluenceConfig, load_audit
from hf_ecif.applications import judged as module
from hf_ecif.applications import result
from hf_ecif.applications.analysis import choose_sample
from hf_ecif.applications.audit import AuditRequest, run_audit
from hf_ecif.data.captions import plain
from hf_ecif.data.columns import COLUMNS, SCORES
from hf_ecif.data.summary import Summary
from hf_ecif.detection.annotate import FEATURES
from tests.support import DEMO
from tests.support.rows import read

ROWS, LEARNED, PART = 150, 90, 32
CONFIG = InfluenceConfig(batch_size=16, fit_epochs=2, partitions=2, probes=2, max_iterations=3)
DAMAGED = {7: "image missing", 50: "caption empty", 101: "caption missing"}
COPIES = slice(120, 124)  # of one pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data`` with rows that cannot be read and copies, and a query."""
    root = tmp_path_factory.mktemp("judged")
    train, query = (read(DEMO / "data" / f"{split}.parquet") for split in ("train", "validation"))
    cells = train.select([*range(ROWS - 4), *[60] * 4])[:]
    cells["image"][7], cells["text"][50], cells["text"][101] = None, "", None
    for name in ("image", "text"):
        cells[name][COPIES] = [cells[name][10]] * 4
    (root / "data").mkdir()
    for name, rows in (("train", cells), ("validation", query[:60])):
        made = Dataset.from_dict(rows, features=(train if name == "train" else query).features)
        made.cast_column("image", Image()).to_parquet(root / "data" / f"{name}.parquet")
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[..., AuditRequest]:
    """Audits, each done once; the request, with the output."""
    data = str(folder / "data")

    def run(name: str, **options: Any) -> AuditRequest:
        request = AuditRequest(
            model=str(DEMO / "model"),
            dataset=data,
            query=data,
            output=folder / name,
            detection=DetectionConfig(injections=2),
            suggest_probability=0.0,
            truth_column="is_misaligned",
            group_column="noise",
            learn_rows=LEARNED,
        )
        request = replace(request, **options)
        if not request.output.exists():
            with pytest.MonkeyPatch.context() as patch:
                if name != "judged":  # figures take longer than all the rest
                    patch.setattr(result, "render_report", lambda scored, summary: "")
                patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
                patch.setattr(module, "PART_ROWS", PART)
                run_audit(request, CONFIG)
        return request

    return run


@pytest.fixture(scope="module")
def scored(run: Callable[..., AuditRequest]) -> Dataset:
    return read(run("judged").output / "scored")


@pytest.fixture(scope="module")
def summary(run: Callable[..., AuditRequest]) -> Summary:
    return Summary.load(run("judged").output / "summary.json")


@pytest.fixture(scope="module")
def sample(run: Callable[..., AuditRequest]) -> np.ndarray:
    """Numbers of the rows that were learned from."""
    rows = choose_sample(None, ROWS, run("judged"), CONFIG.seed)
    assert rows is not None
    return rows.numpy()


class TestResult:
    def test_all_rows_are_there_in_their_order(self, scored: Dataset, folder: Path) -> None:
        before = read(folder / "data" / "train.parquet")
        assert scored.column_names == [*before.column_names, *COLUMNS]
        for name in before.column_names:
            assert scored[name][:] == before[name][:]
        assert {name: scored.features[name] for name in COLUMNS} == FEATURES

    def test_every_readable_row_has_a_verdict(self, scored: Dataset) -> None:
        for name in (*SCORES, "ecif_noise_probability", "ecif_suspicion", "ecif_flag"):
            missing = [row for row, value in enumerate(scored[name]) if value is None]
            assert missing == list(DAMAGED), name
        for row, reason in DAMAGED.items():
            assert reason in scored[row]["ecif_reason"]

    def test_counts_reconcile(
        self, scored: Dataset, summary: Summary, run: Callable[..., AuditRequest]
    ) -> None:
        flags = scored["ecif_flag"][:]
        assert (summary.rows, summary.unreadable) == (ROWS, len(DAMAGED))
        assert summary.flagged == flags.count(True) > 5
        assert summary.kept == flags.count(False)
        assert summary.noise.borderline == scored["ecif_borderline"][:].count(True)
        assert sum(summary.unreadable_reasons.values()) == len(DAMAGED)
        for part, expected in (("kept", summary.kept), ("removed", summary.removed)):
            rows = load_dataset(str(run("judged").output / part), split="train")
            assert rows.num_rows == expected
        assert summary.suggestions is not None
        suggested = [text for text in scored["ecif_suggested_text"] if text is not None]
        assert summary.suggestions.count == len(suggested) > 0
        chances = [value for value in scored["ecif_suggested_probability"] if value is not None]
        assert summary.suggestions.expected_right == pytest.approx(sum(chances), rel=1e-4)

    def test_groups_and_truth_are_of_all_rows(self, scored: Dataset, summary: Summary) -> None:
        assert summary.groups is not None
        readable = ROWS - len(DAMAGED)
        assert sum(g.rows for g in summary.groups.table) + summary.groups.other_rows == readable
        for group in summary.groups.table:
            rows = scored.filter(lambda row, name=group.group: row["noise"] == name)
            flags = [flag for flag in rows["ecif_flag"] if flag is not None]
            assert (group.rows, group.flagged) == (len(flags), sum(flags))
        wrong = [row for row in scored if row["is_misaligned"] and row["ecif_flag"] is not None]
        assert summary.truth is not None
        assert summary.truth.misaligned == len(wrong)
        assert summary.truth.found == sum(row["ecif_flag"] for row in wrong)

    def test_says_how_many_rows_it_learned_from(
        self, summary: Summary, sample: np.ndarray, run: Callable[..., AuditRequest]
    ) -> None:
        learned = LEARNED - len(set(sample.tolist()) & set(DAMAGED))
        assert summary.learned_from == learned
        page = (run("judged").output / "report.html").read_text()
        assert f"learned from {learned} of {ROWS}" in " ".join(page.split())

    def test_is_loaded_like_any_other(self, run: Callable[..., AuditRequest]) -> None:
        audit = load_audit(run("judged").output)
        assert len(audit.clean().kept) == audit.summary.kept

    def test_nothing_is_left_over(self, run: Callable[..., AuditRequest]) -> None:
        names = {path.name for path in run("judged").output.iterdir()}
        assert names == {"scored", "kept", "removed", "summary.json", "report.html"}


class TestVerdicts:
    @pytest.mark.slow
    def test_rows_learned_from_are_those_of_an_audit_of_them_alone(
        self, run: Callable[..., AuditRequest], scored: Dataset, sample: np.ndarray, folder: Path
    ) -> None:
        alone = folder / "sample"
        if not alone.exists():
            rows = read(folder / "data" / "train.parquet").select(sample)
            rows.cast_column("image", Image()).to_parquet(alone / "train.parquet")
        found = read(run("alone", dataset=str(alone)).output / "scored")
        inside = scored.select(sample)
        for name in COLUMNS:
            if name not in ("ecif_reason", "ecif_duplicate_group"):  # which number other rows
                assert inside[name][:] == found[name][:], name

    def test_duplicates_are_those_of_an_audit_of_all_rows(
        self, run: Callable[..., AuditRequest], scored: Dataset, summary: Summary
    ) -> None:
        whole = run("whole", learn_rows=ROWS).output
        found = read(whole / "scored")
        assert scored["ecif_duplicate_group"][:] == found["ecif_duplicate_group"][:]
        assert summary.duplicates == Summary.load(whole / "summary.json").duplicates
        assert set(scored["ecif_duplicate_group"][COPIES]) == {10}

    def test_copies_have_one_verdict(self, scored: Dataset, sample: np.ndarray) -> None:
        rows = [10, *range(COPIES.start, COPIES.stop)]
        assert set(rows) - set(sample.tolist()), "all of them were learned from"
        for name in ("ecif_score", "ecif_noise_probability", "ecif_flag"):
            assert len({scored[name][row] for row in rows}) == 1, name

    def test_reasons_name_rows_of_the_whole_data(self, scored: Dataset) -> None:
        named = [
            (row["text"], int(number))
            for row in scored
            if row["ecif_flag"]
            for number in re.findall(r"caption is also that of rows? (\d+)", row["ecif_reason"])
        ]
        assert named
        assert all(plain(scored["text"][number]) == plain(text) for text, number in named)

    @pytest.mark.slow
    def test_parts_make_no_difference(
        self, run: Callable[..., AuditRequest], scored: Dataset, folder: Path
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
            patch.setattr(result, "render_report", lambda scored, summary: "")
            request = replace(run("judged"), output=folder / "one part")
            run_audit(request, CONFIG)
        found = read(request.output / "scored")
        for name in COLUMNS:
            first, second = scored[name][:], found[name][:]
            if FEATURES[name] == FEATURES["ecif_score"]:
                values = (np.array(side, dtype=float) for side in (first, second))
                np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=name)
            elif name != "ecif_reason":
                assert first == second, name

    @pytest.mark.slow
    def test_without_suggestions_duplicates_are_null(
        self, run: Callable[..., AuditRequest]
    ) -> None:
        request = run("plain", suggest=False)
        rows = read(request.output / "scored")
        assert set(rows["ecif_duplicate_group"]) == {None}
        assert json.loads((request.output / "summary.json").read_text())["duplicates"] is None


class TestSample:
    def test_is_all_rows_where_they_are_few(self, run: Callable[..., AuditRequest]) -> None:
        assert choose_sample(None, LEARNED, run("judged"), 0) is None

    def test_is_random_and_ascending(self, run: Callable[..., AuditRequest]) -> None:
        found = [choose_sample(None, 10_000, run("judged"), seed) for seed in (0, 0, 1)]
        first, again, other = (rows for rows in found if rows is not None)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(first, first.unique())
        assert len(first) == LEARNED
        assert first[LEARNED // 2] > 2000

    def test_has_rows_that_a_person_judged(self, run: Callable[..., AuditRequest]) -> None:
        verdicts = np.zeros(10_000, dtype=int)
        verdicts[:30] = 1
        rows = choose_sample(verdicts, 10_000, run("judged"), 0)
        assert rows is not None
        assert (rows < 30).sum() == 30
        verdicts[:300] = -1
        rows = choose_sample(verdicts, 10_000, run("judged"), 0)
        assert rows is not None
        assert (rows < 300).sum() == LEARNED // 2
        assert len(rows) == LEARNED
