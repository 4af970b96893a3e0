"""Summaries: typed, strict, and read back from any version."""

import json
import math
from pathlib import Path

import pytest

from hf_ecif.data.summary import (
    FORMAT,
    CleaningFacts,
    Measured,
    RemovalSummary,
    Summary,
    TracedError,
)
from hf_ecif.errors import UserError
from tests.support import ROOT
from tests.support.hub.audits import fake_summary

OLD = ROOT / "tests" / "support" / "audits" / "summary_0_1.json"  # of the demo, by version 0.1
CAUSE = {
    **{"rank": 0, "cause_row": 7, "cause_text": "a hat", "role": "negative", "score": -1e-3},
    **{"stderr": 1e-4, "relative": -2.0, "positive": 0.0, "negative": -1e-3},
    **{"partner_row": None, "partner_text": None, "partner_part": None},
}
ERROR = {"error_row": 3, "error_text": "a cat", "predicted_row": 5, "predicted_text": "a dog"}


@pytest.fixture
def values() -> dict:
    return fake_summary("birds", 12, 2, 1)


class TestRoundTrip:
    def test_a_file_gives_the_same_summary(self, values: dict, tmp_path: Path) -> None:
        # Numbers all, since not-a-number does not equal itself.
        values["query"] |= {"loss": 1.0, "loss_before_fit": 2.0, "alignment": 0.5}
        values["noise"] |= {"planted_auroc": 0.9, "planted_score_auroc": 0.7}
        values["fit"] |= {"gradient_norm": 0.1}
        values["solvers"][0] |= {"mean_eigenvalue": 0.1}
        summary = Summary.from_dict(values)
        summary.save(tmp_path / "summary.json")
        assert Summary.load(tmp_path / "summary.json") == summary

    def test_what_is_not_a_number_is_null_in_the_file(self, values: dict, tmp_path: Path) -> None:
        summary = Summary.from_dict(values)
        assert math.isnan(summary.query.loss)
        summary.save(tmp_path / "summary.json")
        assert json.loads((tmp_path / "summary.json").read_text())["query"]["loss"] is None
        assert math.isnan(Summary.load(tmp_path / "summary.json").query.loss)


class TestOlderVersions:
    def test_the_demo_of_0_1(self) -> None:
        summary = Summary.load(OLD)
        assert summary.format_version == FORMAT
        assert (summary.rows, summary.flagged, summary.kept) == (1492, 333, 1159)
        assert summary.noise.injected_auroc == pytest.approx(0.879, abs=1e-3)
        assert summary.solvers[0].converged
        assert summary.truth is not None
        assert summary.truth.precision == pytest.approx(0.832, abs=1e-3)

    def test_causes_told_their_error_again(self, values: dict) -> None:
        error = ERROR | {"margin": 2.0}
        traced = {
            "errors": {"kind": "retrieval-text", "wrong": 1, "traced": 1, "of": 12},
            **{"top_k": 1, "as_negatives": 1.0, "often": []},
            "worst": [error | {"causes": [error | CAUSE]}],
        }
        summary = Summary.from_dict(values | {"trace": traced})
        assert summary.trace is not None
        (found,) = summary.trace.worst
        assert isinstance(found, TracedError)
        assert (found.error_row, found.causes[0].cause_row) == (3, 7)

    def test_measures_of_a_cleaning_lay_beside_its_version(self, values: dict) -> None:
        loss = {"mean": 1.0, "stderr": None, "values": [1.0]}
        outcome = {"version": "drop", "rows": 9.0, "loss": loss}
        compared = {"test": "t", "test_rows": 3, "warnings": [], "outcomes": [outcome]}
        cleaning = {"audit": "a", "strategy": "drop", "share": None, "counts": {"kept": 9}}
        summary = Summary.from_dict(values | {"cleaning": cleaning | {"comparison": compared}})
        assert isinstance(summary.cleaning, CleaningFacts)
        assert summary.cleaning.comparison is not None
        assert summary.cleaning.comparison.outcomes[0].measures["loss"] == Measured(**loss)

    def test_steps_of_a_removal_had_no_name(self, values: dict) -> None:
        shared = ("model", "dataset", "split", "columns", "rows", "scored", "unreadable")
        removal = {"removed": 2, "change": 0.1, "residuals": [1.0], "trials": 1}
        removal["solvers"] = [{"method": "cg", "converged": False, "tolerance": 1e-3}]
        summary = RemovalSummary.from_dict(
            {name: values[name] for name in (*shared, "query", "config")}
            | {"where": "bad", "test": None, "predicted_change": 0.0, "measures": {}}
            | {"removal": removal}
        )
        assert summary.removal.solvers[0].purpose == "step 1"


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"rows": "many"}, "'rows' input should be a valid integer"),
            ({"noise": {"rate": 0.1}}, "'noise.threshold' is missing"),
            ({"surprise": 1}, "'surprise' extra inputs are not permitted"),
            ({"format_version": FORMAT + 1}, "newer version of hf_ecif.*Update"),
        ],
    )
    def test_another_file_is_told(
        self, values: dict, tmp_path: Path, change: dict, words: str
    ) -> None:
        (tmp_path / "summary.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=f"summary.json .*{words}"):
            Summary.load(tmp_path / "summary.json")

    def test_no_field_is_changed_in_place(self, values: dict) -> None:
        summary = Summary.from_dict(values)
        with pytest.raises(ValueError, match="frozen"):
            summary.rows = 3
        assert summary.replace(rows=3).rows == 3
        with pytest.raises(ValueError, match="integer"):
            summary.replace(rows="three")


def test_the_dictionary_of_0_1_works_with_a_warning(values: dict) -> None:
    summary = Summary.from_dict(values)
    with pytest.warns(DeprecationWarning, match=r"use summary\.noise"):
        noise = summary["noise"]
    assert noise == summary.noise
    with pytest.raises(KeyError):
        summary["nothing"]


def test_gain_is_repeat_by_repeat() -> None:
    one = Measured(mean=2.0, stderr=1.0, values=[1.0, 3.0])
    other = Measured(mean=1.0, stderr=1.0, values=[0.5, 1.5])
    assert one.gain(other) == (pytest.approx(1.0), pytest.approx(0.5))
    assert Measured(mean=1.0, stderr=None, values=[1.0]).gain(
        Measured(mean=0.0, stderr=None, values=[0.0])
    ) == (1.0, None)
