"""What the tabs that need no model show, as plain functions of their inputs."""

import json
import zipfile
from pathlib import Path

import gradio as gr
import numpy as np
import pytest

from hf_ecif.app import overview, session, what_if
from hf_ecif.app import review as reviewing
from hf_ecif.app.selection import is_audit, open_audit
from hf_ecif.errors import UserError
from tests.app.conftest import FLAGGED, MANY


def decide(folder: str, reviews: dict, action: str, row: int | None, text: str | None = None):
    return reviewing.decide(action, folder, reviews, 0.4, None, "flagged", row, text)


class TestAudits:
    def test_what_is_no_audit_is_refused(self, tmp_path):
        assert not is_audit(str(tmp_path))
        with pytest.raises(UserError, match="holds no finished audit"):
            open_audit(str(tmp_path))

    def test_the_likeliest_come_first(self, real):
        audit = open_audit(real)
        rows = audit.pick("all", audit.threshold)
        assert len(rows) == 120
        assert (np.diff(audit.rows.probability[rows]) <= 0).all()

    def test_flags_and_the_rest_are_all(self, real):
        audit = open_audit(real)
        for threshold in (audit.threshold, 0.2):
            parts = [audit.pick(which, threshold) for which in ("flagged", "not flagged")]
            assert sorted([*parts[0], *parts[1]]) == list(range(120))

    def test_decisions_belong_to_the_rows_not_to_the_folder(self, many, tmp_path):
        (tmp_path / "moved").symlink_to(many)
        assert open_audit(str(tmp_path / "moved")).key == open_audit(many).key


class TestOverview:
    def test_counts_and_gallery_follow_the_threshold(self, many):
        low = overview.show(many, {}, 0.4, None)
        high = overview.show(many, {}, 0.95, None)
        assert ">1,000<" in low.tiles
        assert low.cards.count("data-row") == overview.SHOWN
        assert ">0<" in high.tiles
        assert "Lower the threshold" in high.cards

    def test_the_histogram_holds_every_scored_pair(self, many):
        table = overview.histogram_table(open_audit(many), 0.4)
        assert table.groupby("what")["pairs"].sum().to_dict() == {
            "flagged": FLAGGED,
            "kept": MANY - FLAGGED - 1,
        }

    def test_a_large_scatter_is_a_sample_with_the_flagged_ones(self, many, monkeypatch):
        monkeypatch.setattr(overview, "MOST_POINTS", 1100)
        what = overview.scatter_table(open_audit(many), 0.4)["what"]
        assert (len(what), (what == "flagged").sum()) == (1100, FLAGGED)

    def test_a_brush_narrows_the_gallery(self, many):
        audit = open_audit(many)
        event = gr.SelectData(None, {"index": [0.0, 1.0], "value": None, "selected": True})
        span = overview.brushed(many, event)
        rows = audit.pick("flagged", 0.4, span=span)
        assert 0 < len(rows) < FLAGGED
        low, high = span
        assert all(low <= audit.rows.positive[row] <= high for row in rows)
        said = overview.show(many, {}, 0.4, span).picked
        assert f"{len(rows):,} pairs are flagged" in said

    def test_html_in_a_caption_stays_text(self, many):
        cards = overview.show(many, {}, 0.4, None).cards
        assert "<img src=x" not in cards
        assert "&lt;img src=x" in cards


class TestReviewing:
    def test_pages_of_a_thousand(self, many):
        first = reviewing.show_page(many, {}, 0.4, None, "flagged", 1, None)
        last = reviewing.show_page(many, {}, 0.4, None, "flagged", 42, None)
        assert first.number.maximum == last.number.value == 42
        assert first.cards.count("data-row=") == reviewing.PAGE
        assert last.cards.count("data-row=") == FLAGGED - 41 * reviewing.PAGE

    def test_a_chosen_pair_is_on_the_page_that_is_shown(self, many):
        page = reviewing.show_page(many, {}, 0.4, None, "flagged", 1, 30)
        assert page.number.value == 2
        assert 'data-row="30"' in page.cards

    def test_one_turns_pages_away_from_the_chosen_pair(self, many):
        page = reviewing.show_page(many, {}, 0.4, None, "flagged", 2, 0, follow=False)
        assert page.number.value == 2
        assert 'data-row="24"' in page.cards

    def test_a_pair_at_full_length(self, many):
        pair = reviewing.show_pair(many, {}, 0.4, 1)
        assert "±" in pair.detail
        assert "as positive" in pair.detail
        assert "looks &lt;b&gt;wrong&lt;/b&gt;" in pair.detail
        assert pair.caption == "bird number 1"

    @pytest.mark.parametrize("row", [None, MANY])
    def test_nothing_chosen_is_said(self, many, row):
        assert "Choose a pair" in reviewing.show_pair(many, {}, 0.4, row).detail

    def test_a_decision_goes_on_to_the_next_and_undo_comes_back(self, many):
        reviews, row = decide(many, {}, "remove", 0)
        assert row == 1
        reviews, row = decide(many, reviews, "recaption", 1, "a crow")
        assert reviewing.show_pair(many, reviews, 0.4, 1).caption == "a crow"
        page = reviewing.show_page(many, reviews, 0.4, None, "decided", 1, None)
        assert page.cards.count("data-row=") == 2
        assert "1 remove, 1 new caption" in page.progress
        reviews, row = reviewing.take_back(many, reviews)
        assert row == 1
        reviews, row = reviewing.take_back(many, reviews)
        assert row == 0
        assert not session.read_review(reviews, open_audit(many)).log
        assert reviewing.take_back(many, reviews) == (reviews, None)

    def test_an_empty_caption_is_no_decision(self, many):
        assert decide(many, {}, "recaption", 3, "  ") == ({}, 3)
        assert decide(many, {}, "keep", None) == ({}, None)

    def test_steps_stop_at_both_ends(self, many):
        assert reviewing.step(many, {}, 0.4, None, "flagged", 0, -1) == 0
        assert reviewing.step(many, {}, 0.4, None, "flagged", FLAGGED - 1, 1) == FLAGGED - 1
        assert reviewing.step(many, {}, 0.4, None, "flagged", None, 1) == 0
        assert reviewing.step(many, {}, 0.95, None, "flagged", 7, 1) == 7

    def test_the_export_has_rows_and_decisions(self, many, tmp_path):
        reviews, _ = decide(many, {}, "keep", 0)
        archive = reviewing.write_export(many, reviews, 0.4).value["path"]
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(tmp_path)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["removed"] == FLAGGED  # one kept, and the one that cannot be read
        assert json.loads((tmp_path / "decisions.json").read_text())["log"][0]["row"] == 0
        assert is_audit(str(tmp_path))
        Path(archive).unlink()


class TestSession:
    def test_what_a_browser_makes_up_is_no_review(self, many):
        audit = open_audit(many)
        for text in ("nonsense", '{"log": [{"row": -3}], "threshold": 2}'):
            assert not session.read_review({audit.key: text}, audit).log

    def test_a_browser_keeps_the_newest_audits(self, many):
        audit = open_audit(many)
        old = {f"{n}": "{}" for n in range(30)}
        kept = session.keep_review(old, audit, session.read_review({}, audit))
        assert len(kept) == session.MOST_AUDITS
        assert list(kept)[-2:] == ["29", audit.key]

    def test_one_begins_where_the_threshold_was_left(self, many):
        assert session.begin(many, {}) == (0.4, None, 0)
        reviews = session.keep_threshold(many, {}, 0.95)
        assert session.begin(many, reviews) == (0.95, None, None)
        assert overview.go_back(many, reviews)[0] == 0.4
        reviews = overview.go_back(many, reviews)[1]
        assert session.begin(many, reviews).threshold == 0.4


class TestWhatIf:
    def test_the_curve_is_the_sum_of_scores(self, real):
        table = what_if.draw(real).set_index(["order", "share"])["change"]
        scores = np.sort(open_audit(real).rows.score)
        assert table["most harmful first", 0] == 0
        assert table["most harmful first", 10] == pytest.approx(scores[:12].sum())

    def test_the_most_harmful_first_promises_most(self, real):
        table = what_if.draw(real).pivot(index="share", columns="order", values="change")
        best = table["most harmful first"]
        assert (best <= table.min(axis=1) + 1e-12).all()

    @pytest.mark.parametrize("share", [0, 10])
    def test_it_is_said_in_words(self, real, share):
        said = what_if.say(real, share, "most harmful first")
        assert ("stay" if share == 0 else "fall by") in said
