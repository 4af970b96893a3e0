"""The file of a review: nothing is lost, nothing counts twice, and what holds is what it says."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ecif.data.review import Decision, Review
from hf_ecif.data.review_log import ReviewLog, steps_of
from hf_ecif.errors import UserError

ROWS = 20


def log(folder: Path, audit: str = "key") -> ReviewLog:
    return ReviewLog(folder / "review.jsonl", audit, ROWS)


def step(number: int, rows: list[int], action: str = "keep", **more) -> dict:
    return {"id": f"step-{number}", "rows": rows, "action": action} | more


class TestAppending:
    def test_it_survives_being_opened_again(self, tmp_path):
        steps = [step(1, [3, 4], "remove"), step(2, [5], "recaption", texts=["a <b>crow</b> ø"])]
        assert log(tmp_path).append(steps) == 2
        again = log(tmp_path)
        assert again.since(0) == (steps, 2)
        assert again.since(1) == (steps[1:], 2)
        assert again.review().log == (
            Decision(3, "remove"),
            Decision(4, "remove"),
            Decision(5, "recaption", "a <b>crow</b> ø"),
        )

    def test_what_is_sent_twice_counts_once(self, tmp_path):
        one = log(tmp_path)
        assert one.append([step(1, [3])]) == 1
        assert one.append([step(1, [3]), step(2, [4]), step(2, [4])]) == 1
        assert len(one.since(0)[0]) == 2

    def test_two_servers_write_to_one_file(self, tmp_path):
        one, other = log(tmp_path), log(tmp_path)
        one.append([step(1, [1])])
        other.append([step(2, [2], "remove")])
        one.append([step(3, [3])])
        told = [1, 2, 3]
        assert [found["rows"][0] for found in one.since(0)[0]] == told
        assert [found["rows"][0] for found in other.since(0)[0]] == told

    @pytest.mark.parametrize("cut", range(2, 40, 3))
    def test_a_crash_in_the_middle_of_a_line_costs_that_line(self, tmp_path, cut):
        one = log(tmp_path)
        one.append([step(1, [1]), step(2, [2])])
        content = one.path.read_bytes()
        one.path.write_bytes(content[:-cut])
        again = log(tmp_path)
        assert again.review().log == (Decision(1, "keep"),)
        again.append([step(3, [3])])
        last = log(tmp_path).review().log
        assert last == (Decision(1, "keep"), Decision(3, "keep"))

    def test_decisions_on_other_rows_are_set_aside_and_kept(self, tmp_path):
        log(tmp_path, "key").append([step(1, [1])])
        other = log(tmp_path, "another")
        assert not other.review().log
        other.append([step(2, [2])])
        assert (tmp_path / "review-key.jsonl").exists()
        assert log(tmp_path, "another").review().log == (Decision(2, "keep"),)

    def test_a_file_that_was_deleted_is_begun_anew(self, tmp_path):
        one = log(tmp_path)
        one.append([step(1, [1])])
        one.path.unlink()
        assert one.since(0) == ([], 0)
        one.append([step(2, [2])])
        assert log(tmp_path).review().log == (Decision(2, "keep"),)

    def test_it_does_not_grow_without_end(self, tmp_path):
        small = ReviewLog(tmp_path / "review.jsonl", "key", ROWS, most_bytes=200)
        small.append([step(1, [1])])
        with pytest.raises(UserError, match="no room"):
            small.append([step(2, [2], "recaption", texts=["a" * 200])])
        assert len(small.since(0)[0]) == 1

    @pytest.mark.parametrize(
        "bad",
        [
            {},
            "text",
            {"id": "x", "rows": [1], "action": "keep"},
            step(1, []),
            step(1, [1, 1]),
            step(1, [ROWS]),
            step(1, [-1]),
            step(1, [True]),
            step(1, ["1"]),
            step(1, [1], "burn"),
            step(1, [1], "keep", texts=["no"]),
            step(1, [1], "recaption"),
            step(1, [1], "recaption", texts=[" "]),
            step(1, [1, 2], "recaption", texts=["one"]),
            step(1, [1], note="both"),
            step(1, [1], colour="red"),
            {"id": "step-1", "rows": [1], "note": "a" * 2001},
            {"id": "step-1", "undo": 3},
            {"id": "step-1", "threshold": 2},
            {"id": "step-1", "threshold": "high"},
        ],
    )
    def test_what_is_no_step_is_refused_and_nothing_of_its_post_is_written(self, tmp_path, bad):
        one = log(tmp_path)
        with pytest.raises(UserError):
            one.append([step(9, [9]), bad])
        assert not one.path.exists()


class TestWhatHolds:
    def test_undo_and_redo(self, tmp_path):
        one = log(tmp_path)
        one.append([step(1, [1, 2]), step(2, [2], "remove"), {"id": "undo-1", "undo": "step-2"}])
        assert one.review().current == {1: Decision(1, "keep"), 2: Decision(2, "keep")}
        one.append([{"id": "undo-2", "undo": "step-1"}])
        assert not one.review().log
        one.append([{"id": "redo-1", "redo": "step-2"}])
        assert one.review().current == {2: Decision(2, "remove")}

    def test_notes_and_threshold(self, tmp_path):
        one = log(tmp_path)
        one.append([{"id": "note-1", "rows": [4], "note": "blurred"}])
        one.append([{"id": "threshold-1", "threshold": 0.3, "own": 0.5}])
        assert one.review() == Review((), 0.3, {4: "blurred"})
        assert one.own_threshold == 0.5
        one.append([{"id": "note-2", "rows": [4], "note": ""}])
        assert one.review().notes == {}

    def test_clear_takes_a_decision_away(self, tmp_path):
        one = log(tmp_path)
        one.append([step(1, [1, 2]), step(2, [1], "clear")])
        assert one.review().current == {2: Decision(2, "keep")}

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_it_is_what_a_list_of_live_steps_says(self, tmp_path_factory, data):
        """Against a naive fold over the steps that are not undone."""
        steps: list[dict] = []
        undone: set[str] = set()
        for number in range(data.draw(st.integers(1, 15))):
            kind = data.draw(st.sampled_from(["decide", "decide", "undo", "redo"]))
            decided = [one["id"] for one in steps if "action" in one]
            if kind == "decide" or not decided:
                rows = data.draw(st.lists(st.integers(0, 4), min_size=1, unique=True))
                action = data.draw(st.sampled_from(["keep", "remove", "unsure", "clear"]))
                steps.append(step(number, rows, action))
            else:
                name = data.draw(st.sampled_from(decided))
                steps.append({"id": f"step-{number}", kind: name})
                (undone.add if kind == "undo" else undone.discard)(name)
        expected: dict[int, str] = {}
        for one in steps:
            if "action" in one and one["id"] not in undone:
                expected |= dict.fromkeys(one["rows"], one["action"])
        one = log(tmp_path_factory.mktemp("log"))
        one.append(steps)
        found = {row: decision.action for row, decision in one.review().current.items()}
        assert found == {row: action for row, action in expected.items() if action != "clear"}


class TestImporting:
    def test_what_an_export_wrote(self, tmp_path):
        review = Review((Decision(3, "keep"), Decision(4, "recaption", "a tit")), 0.3, {3: "hm"})
        one = log(tmp_path)
        one.append(steps_of(review.to_json(), "import-1"))
        assert one.review() == Review(review.log, None, {3: "hm"})

    def test_what_version_0_1_wrote(self, tmp_path):
        text = '{"log": [{"row": 3, "action": "remove", "text": null}], "threshold": null}'
        one = log(tmp_path)
        one.append(steps_of(text, "import-1"))
        assert one.review().log == (Decision(3, "remove"),)

    def test_a_file_of_steps(self, tmp_path):
        one = log(tmp_path)
        one.append([step(1, [1]), step(2, [2], "remove")])
        other = log(tmp_path / "other")
        assert other.append(steps_of(one.path.read_text(), "import-1")) == 2
        assert other.append(steps_of(one.path.read_text(), "import-2")) == 0
        assert other.review() == one.review()

    @pytest.mark.parametrize("text", ["", "[]", "nonsense\nmore", json.dumps({"log": 3})])
    def test_what_is_neither_is_refused(self, text):
        with pytest.raises(UserError, match="no saved decisions"):
            steps_of(text, "import-1")
