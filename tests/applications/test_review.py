"""A person's decisions on an audit, and the audit that they make of it."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_ecif.applications.review import apply_review
from hf_ecif.data.review import DECISION, Decision, Review
from hf_ecif.data.summary import ReviewFacts
from hf_ecif.errors import UserError
from hf_ecif.hub.dataset_repo import DatasetRepo
from tests.support.hub.audits import write_audit, write_source

ROWS = st.integers(0, 50)
DECISIONS = st.lists(
    st.builds(Decision, ROWS, st.sampled_from(["keep", "remove"]))
    | st.builds(Decision, ROWS, st.just("recaption"), st.sampled_from(["a tit", "<b>æ"]))
)


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows: 1 and 5 are flagged, 7 cannot be read."""
    place = tmp_path_factory.mktemp("review")
    return write_audit(place / "audit", str(write_source(place / "birds")))


def load(folder: Path, part: str) -> list[dict]:
    return list(load_dataset(str(folder / part), split="train").remove_columns("image"))


class TestReview:
    @given(DECISIONS, st.none() | st.floats(0, 1))
    def test_survives_being_saved(self, decisions, threshold):
        review = Review(tuple(decisions), threshold)
        assert Review.from_json(review.to_json()) == review

    def test_the_last_decision_on_a_row_counts(self):
        review = Review().decide(Decision(3, "remove")).decide(Decision(3, "recaption", "a crow"))
        assert review.current == {3: Decision(3, "recaption", "a crow")}
        assert review.counts() == {"keep": 0, "remove": 0, "recaption": 1, "unsure": 0}

    @pytest.mark.parametrize(
        "decision",
        [
            {"row": -1, "action": "keep"},
            {"row": "1", "action": "keep"},
            {"row": 1, "action": "burn"},
            {"row": 1, "action": "keep", "text": "no"},
            {"row": 1, "action": "recaption", "text": " "},
            {"row": 1, "action": "recaption", "text": "a" * 10_001},
        ],
    )
    def test_refuses_what_is_no_decision(self, decision):
        with pytest.raises(UserError):
            Decision(**decision)
        with pytest.raises(UserError):
            Review.from_json(json.dumps({"log": [decision], "threshold": None}))

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"log": [1], "threshold": null}', "null"])
    def test_refuses_what_was_never_saved(self, text):
        with pytest.raises(UserError, match="no saved decisions"):
            Review.from_json(text)


class TestApply:
    def test_without_decisions_it_is_the_audit(self, audit, tmp_path):
        apply_review(audit, Review(), tmp_path / "out")
        for part in ("kept", "removed"):
            plain = [{**row, DECISION: None} for row in load(audit, part)]
            assert load(tmp_path / "out", part) == plain

    def test_decisions_outweigh_flags_and_no_row_is_lost(self, audit, tmp_path):
        decisions = (
            Decision(1, "keep"),
            Decision(2, "remove"),
            Decision(5, "recaption", "a crow"),
            Decision(7, "keep"),
        )
        summary = apply_review(audit, Review(decisions), tmp_path / "out")
        kept, removed = (load(tmp_path / "out", part) for part in ("kept", "removed"))
        assert len(kept) + len(removed) == 12
        assert [row["text"] for row in removed] == ["bird number 2"]
        assert removed[0]["ecif_reason"] == "removed in review"
        changed = next(row for row in kept if row["text"] == "a crow")
        assert changed["ecif_original_text"] == "bird number 5"
        assert changed[DECISION] == "recaption"
        assert summary.review == ReviewFacts(decided=4, keep=2, remove=1, recaption=1)
        assert (summary.kept, summary.removed) == (11, 1)

    def test_a_threshold_moves_the_flags(self, audit, tmp_path):
        summary = apply_review(audit, Review(threshold=0.05), tmp_path / "out")
        assert (summary.flagged, summary.removed) == (11, 12)
        reasons = {row["ecif_reason"] for row in load(tmp_path / "out", "removed")}
        assert "at 10 %, above the threshold of the review, 5 %" in reasons
        summary = apply_review(audit, Review(threshold=0.95), tmp_path / "none")
        assert (summary.flagged, summary.removed) == (0, 1)

    def test_the_result_is_an_audit(self, audit, tmp_path):
        apply_review(audit, Review((Decision(2, "remove"),)), tmp_path / "out")
        assert DatasetRepo(tmp_path / "out").summary.removed == 4
        assert "bird number 2" in (tmp_path / "out" / "report.html").read_text()

    def test_decisions_of_another_audit_are_refused(self, audit, tmp_path):
        with pytest.raises(UserError, match="belong to another audit"):
            apply_review(audit, Review((Decision(99, "keep"),)), tmp_path / "out")
