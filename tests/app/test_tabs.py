"""What the tabs that need no model show, as plain functions of their inputs."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from hf_ecif.app import overview, session, what_if
from hf_ecif.app import review as reviewing
from hf_ecif.app.desk import DESKS, Place
from hf_ecif.app.selection import is_audit, open_audit
from hf_ecif.errors import UserError
from tests.app.conftest import FLAGGED, MANY


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

    def test_what_is_borderline_follows_the_threshold(self, real):
        audit = open_audit(real)
        near = audit.borderline(audit.threshold)
        assert (near == audit.rows.borderline).all()
        distance = np.abs(audit.rows.probability - 0.9)
        there = audit.borderline(0.9)
        assert there.any() == near.any()
        if there.any() and not there.all():
            assert distance[there].max() <= distance[~there].min() + 0.2

    def test_without_error_nothing_is_borderline_anywhere(self, many):
        audit = open_audit(many)
        assert not audit.borderline(0.4).any()
        assert not audit.borderline(0.9).any()

    def test_decisions_belong_to_the_rows_not_to_the_folder(self, many, tmp_path):
        (tmp_path / "moved").symlink_to(many)
        assert open_audit(str(tmp_path / "moved")).key == open_audit(many).key


class TestOverview:
    def test_counts_and_gallery_follow_the_threshold(self, many):
        low = overview.show(many, None, 0.4, None)
        high = overview.show(many, None, 0.95, None)
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
        said = overview.show(many, None, 0.4, span).picked
        assert f"{len(rows):,} pairs are flagged" in said

    def test_html_in_a_caption_stays_text(self, many):
        cards = overview.show(many, None, 0.4, None).cards
        assert "<img src=x" not in cards
        assert "&lt;img src=x" in cards


@pytest.fixture
def reviews(many, tmp_path) -> Iterator[str]:
    """A desk for that audit, with decisions kept in a folder of its own."""
    token = DESKS.open(many, "", Place(shared=False, own=many, keep=tmp_path / "kept"))
    yield token
    DESKS.close(token)


def decide(reviews: str, row: int, action: str, **more: Any) -> None:
    DESKS.get(reviews).log.append(
        [{"id": f"step-{row}-{action}", "rows": [row], "action": action} | more]
    )


class TestReviewing:
    def test_the_export_has_rows_and_decisions(self, many, reviews, tmp_path):
        decide(reviews, 0, "keep")
        archive = reviewing.write_export(many, reviews, 0.4).value["path"]
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(tmp_path)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["removed"] == FLAGGED  # one kept, and the one that cannot be read
        assert json.loads((tmp_path / "decisions.json").read_text())["log"][0]["row"] == 0
        assert is_audit(str(tmp_path))
        Path(archive).unlink()

    def test_the_page_is_told_where_to_look(self, many):
        told = reviewing.tell(many, "<desk>", 0.4, (-1.0, 2.0), (7, 3.5))
        for part in ("&lt;desk&gt;", 'data-own="1"', 'data-low="-1.0"', 'data-row="7"'):
            assert part in told
        assert "data-row" not in reviewing.tell(many, None, 0.3, None, None)


class TestSession:
    def test_one_begins_where_the_threshold_was_left(self, many, tmp_path):
        place = Place(shared=False, own=many, keep=tmp_path)
        begun = session.begin(place, many, None, None)
        assert (begun.threshold, begun.span, begun.row) == (0.4, None, None)
        assert session.keep_threshold(many, begun.reviews, 0.95) == begun.reviews
        begun = session.begin(place, many, begun.visitor, begun.reviews)
        assert begun.threshold == 0.95
        assert overview.go_back(many, begun.reviews)[0] == 0.4
        assert session.begin(place, many, begun.visitor, begun.reviews).threshold == 0.4

    def test_a_threshold_for_another_one_is_forgotten(self, many, reviews):
        step = {"id": "threshold-1", "threshold": 0.95, "own": 0.7}
        DESKS.get(reviews).log.append([step])
        decide(reviews, 3, "keep")
        review = session.read_review(reviews, open_audit(many))
        assert (review.threshold, len(review.log)) == (None, 1)

    def test_strangers_have_decisions_of_their_own(self, many, tmp_path):
        place = Place(shared=True, own=many, keep=tmp_path)
        one, other = (session.begin(place, many, None, None) for _ in range(2))
        decide(one.reviews, 3, "keep")
        audit = open_audit(many)
        assert session.read_review(one.reviews, audit).log
        assert not session.read_review(other.reviews, audit).log
        again = session.begin(place, many, one.visitor, one.reviews)
        assert session.read_review(again.reviews, audit).log
        assert not session.read_review(one.reviews, audit).log  # that page is closed

    def test_at_home_all_pages_share_them(self, many, tmp_path):
        place = Place(shared=False, own=many, keep=tmp_path)
        one, other = (session.begin(place, many, None, None) for _ in range(2))
        decide(one.reviews, 3, "keep")
        assert session.read_review(other.reviews, open_audit(many)).log

    def test_what_cannot_be_written_beside_the_audit_goes_to_the_users_folder(
        self, many, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        monkeypatch.setattr("hf_ecif.app.desk._can_write", lambda path: False)
        token = DESKS.open(many, "", Place(shared=False, own=many))
        decide(token, 3, "keep")
        (file,) = (tmp_path / "hf_ecif" / "reviews").iterdir()
        assert file.stem == open_audit(many).key

    def test_a_desk_shows_no_other_audit(self, many, real, reviews):
        decide(reviews, 3, "keep")
        assert not session.read_review(reviews, open_audit(real)).log
        assert not session.read_review("made up", open_audit(many)).log


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
