"""The app as a person meets it, in Chromium: every tab, by mouse and by key."""

import json
import re
import shutil
import signal
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pyarrow.parquet as pq
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect, sync_playwright

from hf_ecif.app import review_rows
from hf_ecif.app import run as running
from hf_ecif.app.app import launch, make_app
from hf_ecif.app.limits import HOME, NEIGHBOURS, SPACE, Limits
from hf_ecif.app.pictures import Pictures
from hf_ecif.app.run import Run
from hf_ecif.data.review_log import ReviewLog
from tests.app.conftest import HTML
from tests.app.visitor import CHROMIUM, DESKTOP, FLAGS, PHONE, WAIT, Visitor, visit
from tests.support.hub import server
from tests.support.hub.calls import User
from tests.support.hub.server import HubServer
from tests.support.images import bomb

MOCK = "mock-oauth-token-for-local-dev"  # what Gradio's login hands out away from a Space
SMALL = replace(SPACE, login=False, rows=100, upload=2**20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        reason = "THE APP IS NOT TESTED IN A BROWSER: there is no chromium (see `make chromium`)"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def serve(folder: str, limits: Limits) -> Iterator[str]:
    app = make_app(folder, limits)
    launch(app, limits, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield app.local_url
    app.close()


@pytest.fixture(scope="module")
def many_url(many: str) -> Iterator[str]:
    """An app on a thousand flags."""
    yield from serve(many, HOME)


@pytest.fixture(scope="module")
def real_url(real: str) -> Iterator[str]:
    """An app on a real audit, shared by strangers."""
    yield from serve(real, SMALL)


@pytest.fixture
def visitor(browser: Browser, many: str, many_url: str) -> Iterator[Visitor]:
    with visit(browser, many_url) as visitor:
        yield visitor
    (Path(many) / "review.jsonl").unlink(missing_ok=True)  # the next one begins anew


@pytest.fixture
def stranger(browser: Browser, real_url: str) -> Iterator[Visitor]:
    with visit(browser, real_url) as visitor:
        yield visitor


def set_threshold(visitor: Visitor, value: str) -> None:
    field = visitor["#threshold input[type=number]"]
    field.fill(value)
    field.press("Enter")


def brush(visitor: Visitor) -> None:
    """Select a part of the chart of influence."""
    figure = visitor["#overview-scatter canvas, #overview-scatter svg"].first
    expect(figure).to_be_visible(timeout=WAIT)
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    mouse, middle = visitor.page.mouse, box["y"] + box["height"] / 2
    mouse.move(box["x"] + box["width"] * 0.6, middle)
    mouse.down()
    mouse.move(box["x"] + box["width"] * 0.8, middle, steps=8)
    mouse.up()
    visitor.sees("#overview-picked", "with an influence as a positive from")


@pytest.mark.slow
class TestOverview:
    def test_counts_and_gallery_follow_the_threshold(self, visitor: Visitor):
        visitor.sees("#overview-tiles .accent", "1,000")
        expect(visitor["#overview-cards [data-row]"]).to_have_count(16)
        visitor.shot("overview")
        set_threshold(visitor, "0.95")
        visitor.sees("#overview-cards", "No pair is flagged here")
        visitor.sees("#overview-tiles .accent", "at a threshold of 95 %")
        visitor.shot("overview-none")
        visitor.page.get_by_role("button", name="Reset to the audit's").click()
        visitor.sees("#overview-tiles .accent", "1,000")

    def test_the_slider_moves_by_key(self, visitor: Visitor):
        visitor["#threshold input[type=range]"].focus()
        visitor.page.keyboard.press("ArrowRight")
        visitor.sees("#overview-tiles .accent", "at a threshold of 40.1 %")

    def test_a_brush_picks_pairs(self, visitor: Visitor):
        brush(visitor)
        found = visitor["#overview-picked"].inner_text()
        assert 0 < int(re.match(r"([\d,]+)", found)[1].replace(",", "")) < 1000
        visitor.page.get_by_role("button", name="Clear the selection").click()
        visitor.sees("#overview-picked", "1,000 pairs are flagged. ")

    def test_html_in_a_caption_is_text(self, visitor: Visitor):
        visitor.sees("#overview-cards [data-row='0']", HTML)
        assert visitor.page.title() != "hurt"
        visitor.press("#overview-cards [data-row='0']")
        visitor.sees("#review-detail .pair-words", HTML)
        visitor.sees("#review-detail .why", "looks <b>wrong</b>")
        visitor.sees("#review-cards [data-row='0']", HTML)
        assert visitor.page.title() != "hurt"


def open_review(visitor: Visitor) -> None:
    """Go to the review, and wait until its first pair is there."""
    visitor.tab("Review")
    visitor.sees("#review-detail .facts", "row ")
    expect(visitor["#review-detail .picture img[data-done]"]).to_be_visible(timeout=WAIT)


def decisions(folder: Path | str) -> list[tuple[list[int], str]]:
    """What was decided on an audit's rows, in order."""
    lines = (Path(folder) / "review.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [(step["rows"], step["action"]) for step in steps if "action" in step]


def wait_for_server(visitor: Visitor) -> None:
    """Until the server has written all that was decided."""
    expect(visitor[".review[data-waiting='0']"]).to_have_count(1, timeout=WAIT)


def slow_down(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, seconds: float) -> None:
    """Make a function of the server take its time."""
    real = getattr(owner, name)

    def slow(*values: object) -> object:
        time.sleep(seconds)
        return real(*values)

    monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def fresh(many: str, tmp_path: Path) -> str:
    """The audit of a thousand flags in a folder of its own, without decisions."""
    return str(shutil.copytree(many, tmp_path / "audit"))


@pytest.fixture
def fresh_url(fresh: str) -> Iterator[str]:
    yield from serve(fresh, HOME)


class TestReview:
    def test_decide_by_button_and_key_undo_reload_and_export(self, browser, fresh_url, tmp_path):
        with visit(browser, fresh_url) as visitor:
            open_review(visitor)
            visitor.sees("#review-detail", "row 0")
            visitor.press("#review-cards [data-row='2']")
            visitor.sees("#review-detail", "row 2")
            visitor.shot("review")
            visitor.press("#review-keep")
            visitor.sees("#review-detail", "row 3")
            visitor.page.keyboard.press("r")
            visitor.sees("#review-detail", "row 4")
            visitor["#review-caption"].fill("a crow, keep it")  # its k and p are no keys
            visitor.press("#review-recaption")
            visitor.sees("#review-detail", "row 5")
            visitor.sees("#review-progress", "1 keep, 1 remove, 1 new caption")
            for key, row in (("r", 6), ("s", 7), ("u", 6), ("u", 5), ("y", 5), ("u", 5)):
                visitor.page.keyboard.press(key)
                visitor.sees("#review-detail", f"row {row}")
            visitor.sees("#review-progress", "1 keep, 1 remove, 1 new caption.")
            visitor.page.keyboard.press("n")
            visitor.page.keyboard.type("blurred")
            visitor.page.keyboard.press("Enter")
            wait_for_server(visitor)

            visitor.reload()
            open_review(visitor)
            visitor.sees("#review-detail", "row 0")  # the first one that is not decided
            visitor.sees("#review-progress", "1 keep, 1 remove, 1 new caption")
            visitor.sees("#review-cards [data-row='3'] .decision", "remove")
            visitor.press(".more summary")
            visitor["#review-decided"].select_option("any")
            expect(visitor["#review-cards [data-row]"]).to_have_count(3, timeout=WAIT)
            visitor.page.keyboard.press("u")  # also what an earlier page has decided
            visitor.press("#review-export")
            link = visitor["#review-exported a[download], #review-exported a"].first
            expect(link).to_be_visible(timeout=WAIT)
            with visitor.page.expect_download() as waiting:
                link.click()
            waiting.value.save_as(tmp_path / "export.zip")
        with zipfile.ZipFile(tmp_path / "export.zip") as archive:
            told = json.loads(archive.read("decisions.json"))
            summary = json.loads(archive.read("summary.json"))
        assert [(d["row"], d["action"], d["text"]) for d in told["log"]] == [
            (2, "keep", None),
            (3, "remove", None),
            (4, "recaption", "a crow, keep it"),
        ]
        assert told["notes"] in ({}, {"5": "blurred"})  # the note was the last step
        assert summary["removed"] == 1000 - 2 + 1

    def test_a_hundred_keys_all_land_where_they_were_aimed(
        self, browser, fresh, fresh_url, monkeypatch
    ):
        """Faster than the server answers: each key acts on the pair that was on the screen."""
        slow_down(monkeypatch, ReviewLog, "append", 1.5)
        slow_down(monkeypatch, review_rows, "details", 0.7)
        slow_down(monkeypatch, Pictures, "get", 0.3)
        with visit(browser, fresh_url) as visitor:
            open_review(visitor)
            seen = []
            for number in range(100):
                shown = visitor["#review-detail"].get_attribute("data-row")
                seen.append((int(shown), "keep" if number % 3 else "remove"))
                visitor.page.keyboard.press("k" if number % 3 else "r")
                visitor.page.wait_for_timeout(200)
            visitor.sees("#review-progress", f"{len(dict(seen))} decided")
            wait_for_server(visitor)
        assert [(rows[0], action) for rows, action in decisions(fresh)] == seen
        assert len(dict(seen)) > 80  # on a busy machine a key may find the pair of the one before

    def test_keys_pressed_early_wait_for_their_pair(self, browser, fresh, fresh_url, monkeypatch):
        with visit(browser, fresh_url) as visitor:
            open_review(visitor)
            slow_down(monkeypatch, Pictures, "get", 1.5)
            visitor["#review-order"].select_option("row")
            visitor.press("#review-mode")
            visitor.page.keyboard.press("End")
            for key in "krs":
                visitor.page.keyboard.press(key)
            visitor.sees("#review-status", "wait")
            visitor.sees("#review-progress", "1 decided")
            wait_for_server(visitor)
        assert decisions(fresh) == [([999], "keep"), ([999], "remove"), ([999], "unsure")]

    def test_two_tabs_lose_nothing(self, browser, fresh, fresh_url):
        with visit(browser, fresh_url) as visitor:
            open_review(visitor)
            other = visitor.page.context.new_page()
            other.goto(fresh_url)
            other.get_by_role("tab", name="Review", exact=True).click()
            expect(other.locator("#review-detail")).to_contain_text("row 0", timeout=WAIT)
            visitor.press("#review-keep")
            visitor.sees("#review-detail", "row 1")
            expect(other.locator("#review-progress")).to_contain_text("1 keep", timeout=WAIT)
            other.locator("#review-cards [data-row='5']").click()
            other.locator("#review-remove").click()
            visitor.sees("#review-progress", "1 keep, 1 remove")
            visitor.press("#review-keep")
            visitor.sees("#review-progress", "2 keep, 1 remove")
            wait_for_server(visitor)
            visitor.reload()
            open_review(visitor)
            visitor.sees("#review-progress", "2 keep, 1 remove")
        assert sorted(decisions(fresh)) == [([0], "keep"), ([1], "keep"), ([5], "remove")]

    def test_what_the_server_did_not_hear_it_hears_from_the_next_page(
        self, browser, fresh, fresh_url
    ):
        with visit(browser, fresh_url) as visitor:
            open_review(visitor)
            visitor.page.route("**/review/*/steps", lambda route: route.abort())
            visitor._leaving = True  # the browser's console tells of what was cut off
            for _ in range(3):
                visitor.page.keyboard.press("k")
                visitor.page.wait_for_timeout(100)
            visitor.sees("#review-status", "3 decisions kept here, not yet on the server")
            assert not (Path(fresh) / "review.jsonl").exists()
            visitor.page.unroute("**/review/*/steps")
            visitor.reload()
            open_review(visitor)
            visitor.sees("#review-progress", "3 keep")
            wait_for_server(visitor)
        assert decisions(fresh) == [([row], "keep") for row in range(3)]

    def test_many_at_once(self, browser, fresh, fresh_url):
        with visit(browser, fresh_url) as visitor:
            open_review(visitor)
            visitor.press("#review-cards [data-row='3']")
            visitor["#review-cards [data-row='6']"].click(modifiers=["Shift"])
            visitor.sees("#review-selected", "4 pairs selected")
            visitor["#review-cards [data-row='4']"].click(modifiers=["ControlOrMeta"])
            visitor.sees("#review-selected", "3 pairs selected")
            visitor.shot("review-selected")
            visitor.page.keyboard.press("r")
            visitor.sees("#review-progress", "3 remove")
            visitor.sees("#review-detail", "row 7")
            visitor.page.keyboard.press("x")
            visitor.page.keyboard.press("Shift+ArrowRight")
            visitor.page.keyboard.press("s")
            visitor.sees("#review-progress", "3 remove, 2 not sure")
            visitor.page.keyboard.press("u")
            visitor.sees("#review-progress", "3 remove.")
            wait_for_server(visitor)
        assert decisions(fresh) == [([3, 5, 6], "remove"), ([7, 8], "unsure")]

    def test_a_thousand_are_scrolled_searched_and_sorted(self, visitor: Visitor):
        open_review(visitor)
        visitor.sees("#review-progress", "1,000 pairs of 1,200")
        assert visitor["#review-cards [data-row]"].count() < 100  # those in sight
        visitor.page.keyboard.press("End")
        visitor.sees("#review-detail", "row 999")
        visitor.sees("#review-cards", "bird number 999")
        visitor.page.keyboard.press("p")
        visitor.sees("#review-detail", "row 998")
        visitor["#review-which"].select_option("all")
        visitor["#review-search"].fill("NUMBER 119")
        visitor.sees("#review-progress", "10 pairs of 1,200")  # 119, and 1190 to 1198
        visitor["#review-order"].select_option("row")
        visitor.press("#review-reverse")
        visitor.sees("#review-cards [aria-posinset='1']", "bird number 1198")
        visitor.press(".more summary")
        visitor["#review-column"].select_option("kind")
        visitor["#review-value"].select_option(label="crow")
        visitor.sees("#review-progress", "5 pairs of 1,200")
        visitor["#review-search"].fill("no such words")
        visitor.sees(".listed", "There is no pair with these filters.")
        visitor["#review-search"].fill("")
        visitor.press("#review-cards [aria-posinset='1']")
        visitor.page.keyboard.press("f")
        visitor.sees("#review-chips", "with captions of the same words")
        visitor.page.keyboard.press("Escape")
        expect(visitor["#review-chips .chip"]).to_have_count(0)

    def test_keys_are_told_and_pictures_grow(self, visitor: Visitor):
        open_review(visitor)
        visitor.page.keyboard.press("?")
        visitor.sees("#review-help", "accept the suggested caption")
        visitor.page.keyboard.press("k")  # no key of the page while they are told
        visitor.page.keyboard.press("Escape")
        visitor.page.keyboard.press("z")
        expect(visitor["#review-zoom img"]).to_be_visible()
        visitor.page.keyboard.press("Escape")
        expect(visitor["#review-zoom"]).to_be_hidden()
        small = visitor["#review-cards .card"].first.bounding_box()["width"]
        visitor.page.keyboard.press("+")
        visitor.page.wait_for_timeout(200)
        assert visitor["#review-cards .card"].first.bounding_box()["width"] > small
        visitor.sees("#review-progress", " 0 decided")

    def test_a_brush_and_the_threshold_narrow_it_visibly(self, visitor: Visitor):
        brush(visitor)
        visitor.tab("Review")
        visitor.sees("#review-chips", "Selected in the chart: influence as a positive from")
        found = visitor["#review-progress"].inner_text()
        assert 0 < int(re.match(r"([\d,]+)", found)[1].replace(",", "")) < 1000
        visitor.press("#review-chips button")
        visitor.sees("#review-progress", "1,000 pairs of 1,200")
        visitor.tab("Overview")
        visitor.sees("#overview-picked", "1,000 pairs are flagged. ")
        set_threshold(visitor, "0.95")
        visitor.tab("Review")
        visitor.sees("#review-progress", "0 pairs of 1,200")
        visitor.sees(".listed", "No pair is flagged")
        visitor.tab("Overview")
        visitor.page.get_by_role("button", name="Reset to the audit's").click()
        visitor.sees("#overview-tiles .accent", "1,000")

    def test_a_pair_that_is_pressed_elsewhere_is_shown_each_time(self, visitor: Visitor):
        for _ in range(2):
            visitor.tab("Overview")
            visitor.press("#overview-cards [data-row='7']")
            visitor.sees("#review-detail .facts", "row 7")
            visitor.page.keyboard.press("j")
            visitor.sees("#review-detail .facts", "row 8")

    def test_the_threshold_survives_a_reload(self, browser: Browser, fresh: str, fresh_url: str):
        with visit(browser, fresh_url) as visitor:
            set_threshold(visitor, "0.95")
            visitor.sees("#overview-tiles .accent", "95 %")
            visitor.page.wait_for_timeout(500)
            visitor.reload()
            visitor.sees("#overview-tiles .accent", "95 %")

    def test_strangers_do_not_mix(self, browser: Browser, many: str):
        for url in serve(many, NEIGHBOURS):
            with visit(browser, url) as visitor:
                open_review(visitor)
                visitor.press("#review-remove")
                visitor.sees("#review-progress", "1 remove")
                wait_for_server(visitor)
                with visit(browser, url) as other:
                    open_review(other)
                    other.sees("#review-progress", " 0 decided")
                visitor.reload()
                open_review(visitor)
                visitor.sees("#review-progress", "1 remove")

    def test_a_file_of_decisions_is_imported(self, visitor: Visitor, tmp_path: Path):
        log = [{"row": 11, "action": "remove", "text": None}]
        (tmp_path / "decisions.json").write_text(json.dumps({"log": log, "threshold": None}))
        open_review(visitor)
        visitor["#review-place input[type=file]"].set_input_files(tmp_path / "decisions.json")
        visitor.sees("#review-status", "1 step read, 1 of them new.")
        visitor.sees("#review-cards [data-row='11'] .decision", "remove")
        visitor.page.keyboard.press("u")
        visitor.sees("#review-progress", " 0 decided")

    @pytest.mark.slow
    def test_a_pair_has_neighbours(self, stranger: Visitor):
        open_review(stranger)
        stranger.press("#review-nearest summary")
        stranger.sees("#review-nearest", "with similar images and other captions")
        stranger.shot("review-neighbours")
        row = stranger["#review-nearest [data-row]"].first.get_attribute("data-row")
        stranger.press("#review-nearest [data-row]")
        stranger.sees("#review-detail", f"row {row}")
        stranger.sees("#review-nearest", "with similar images")  # it stays open


@pytest.mark.slow
class TestTrace:
    def test_an_error_is_traced_to_pairs(self, stranger: Visitor):
        stranger.tab("Trace")
        stranger.sees("#trace-causes", "appear here")
        stranger.press("#trace-find")
        stranger.sees("#trace-errors", "captions retrieve the wrong image")
        stranger.press("#trace-errors [data-row]")
        stranger.sees("#trace-causes", "nats against the")
        expect(stranger["#trace-causes [data-row]"]).to_have_count(8)
        stranger.shot("trace")
        row = stranger["#trace-causes [data-row]"].first.get_attribute("data-row")
        stranger.press("#trace-causes [data-row]")
        stranger.sees("#review-detail", f"row {row}")

    def test_a_pair_of_ones_own(self, stranger: Visitor, many: str, tmp_path: Path):
        stranger.tab("Trace")
        stranger.press("#trace-own button")
        stranger.press("#trace-ask")
        stranger.sees("#trace-causes", "Give an image and its caption")
        (tmp_path / "own.png").write_bytes(bomb(64))
        stranger["#trace-image input[type=file]"].set_input_files(tmp_path / "own.png")
        expect(stranger["#trace-image img"]).to_be_visible(timeout=WAIT)
        stranger["#trace-text textarea, #trace-text input"].first.fill("black square")
        stranger["#trace-classes textarea"].fill("cat\n<b>dog</b>")
        stranger.press("#trace-ask")
        stranger.sees("#trace-causes", "black square")
        expect(stranger["#trace-causes [data-row]"]).to_have_count(8, timeout=WAIT)
        stranger.shot("trace-own")


@pytest.mark.slow
class TestWhatIf:
    def test_drag_predict_and_measure(self, stranger: Visitor):
        stranger.tab("What if")
        stranger.sees("#what-if-said", "12 pairs removed, most harmful first")
        share = stranger["#share input[type=number]"]
        share.fill("20")
        share.press("Enter")
        stranger.sees("#what-if-said", "24 pairs removed")
        stranger.page.get_by_role("radio", name="likeliest misaligned first").check()
        stranger.sees("#what-if-said", "likeliest misaligned first")
        stranger.press("#what-if-measure")
        stranger.sees("#what-if-measured", "without 24 pairs")
        stranger.shot("what-if")


@pytest.mark.slow
class TestRun:
    def test_cancel_and_result(self, stranger: Visitor, data: Path):
        stranger.tab("Run")
        stranger.shot("run")
        stranger.press("#run-start")
        stranger.sees("#run-said", "Name a data set on the Hub, or upload a file")
        stranger.shot("run-problem")
        stranger["#run-upload input[type=file]"].set_input_files(data / "test.parquet")
        stranger.sees("#run-upload", "test")
        stranger.press("#run-start")
        expect(stranger["#run-cancel"]).to_be_enabled(timeout=WAIT)
        stranger.press("#run-cancel")
        stranger.sees("#run-said", "Cancelled. Nothing was kept.")
        expect(stranger["#run-start"]).to_be_enabled(timeout=WAIT)

        stranger.press("#run-start")
        expect(stranger["#overview-tiles .figure"].first).to_have_text("40", timeout=4 * WAIT)
        stranger.tab("Run")
        stranger.sees("#run-said", "40 pairs")
        stranger.tab("Review")
        stranger.sees("#review-progress", "0 decided")

    def test_nothing_of_an_upload_stays_in_the_browser(self, stranger: Visitor, data: Path):
        upload = data / "test.parquet"
        captions = pq.read_table(upload)["text"].to_pylist()
        stranger.tab("Run")
        stranger["#run-upload input[type=file]"].set_input_files(upload)
        stranger.sees("#run-upload", "test")
        stranger.press("#run-start")
        expect(stranger["#overview-tiles .figure"].first).to_have_text("40", timeout=4 * WAIT)
        open_review(stranger)
        stranger["#review-which"].select_option("all")
        stranger.page.keyboard.press("k")
        stranger["#review-caption"].fill("a caption of mine")
        stranger.press("#review-recaption")
        wait_for_server(stranger)
        stranger.page.wait_for_timeout(1000)
        kept = stranger.page.evaluate(KEPT)
        assert "hf_ecif_visitor" in kept
        assert not [text for text in (*captions, "a caption of mine", "data:image") if text in kept]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [("data.parquet", b"<b>no", "This is no"), ("data.zip", bytes(1000), "This is no")],
    )
    def test_files_that_are_not_what_they_say(self, stranger, tmp_path, name, content, words):
        (tmp_path / name).write_bytes(content)
        stranger.tab("Run")
        stranger["#run-upload input[type=file]"].set_input_files(tmp_path / name)
        stranger.sees("#run-upload", "data")
        stranger.press("#run-start")
        stranger.sees("#run-said", words)

    def test_a_wrong_type_and_an_enormous_file_are_refused(self, browser, real_url, tmp_path):
        (tmp_path / "data.exe").write_bytes(b"x")
        (tmp_path / "data.parquet").write_bytes(bytes(2**20 + 2**17))
        for name in ("data.exe", "data.parquet"):
            context = browser.new_context()
            visitor = Visitor(context.new_page(), real_url)
            visitor.tab("Run")
            visitor["#run-upload input[type=file]"].set_input_files(tmp_path / name)
            toast = visitor["[data-testid=toast-body]"].first
            expect(toast).to_be_visible(timeout=WAIT)
            visitor.press("#run-start")
            visitor.sees("#run-said", "Name a data set on the Hub")
            context.close()


@pytest.mark.slow
class TestPublish:
    @pytest.fixture
    def shared_url(self, hub: HubServer, many: str, monkeypatch) -> Iterator[str]:
        """A Space's app; the machine's own login is ann, whoever logs in there is bob."""
        monkeypatch.setitem(server.TOKENS, MOCK, User("bob", True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the login is not the real one
            yield from serve(many, SPACE)

    def test_log_in_try_and_publish(self, browser: Browser, hub: HubServer, shared_url: str):
        hub.requests.clear()
        with visit(browser, shared_url) as visitor:
            visitor.tab("Publish")
            visitor["#publish-repo textarea, #publish-repo input"].first.fill("bob/birds-clean")
            expect(visitor["#publish-go"]).to_be_disabled()
            visitor.press("#publish-try")
            visitor.sees("#publish-said", "Log in with Hugging Face first")
            assert not hub.requests
            visitor.shot("publish-no-login")

            with visitor.leaving():
                visitor.press("#publish-login")
            visitor.tab("Publish")
            visitor.sees("#publish-login", "Logout (ann)")  # Gradio's mock has the machine's name
            open_review(visitor)
            visitor.press("#review-keep")
            visitor.sees("#review-progress", "1 keep")
            wait_for_server(visitor)
            visitor.tab("Publish")
            visitor["#publish-repo textarea, #publish-repo input"].first.fill("bob/birds-clean")
            visitor.press("#publish-try")
            visitor.sees("#publish-said", "would be pushed")
            with pytest.raises(KeyError):
                hub.commits("bob/birds-clean")
            visitor.shot("publish-tried")
            visitor.press("#publish-go")
            visitor.sees("#publish-said", "Pushed: ")
            visitor.shot("publish-done")
        files = hub.files("bob/birds-clean")
        assert {"README.md", "hf_ecif/summary.json"} <= set(files)
        assert json.loads(files["hf_ecif/summary.json"])["review"]["keep"] == 1
        assert {seen.user for seen in hub.requests if seen.route != "lfs_put"} == {"bob"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Browser, many_url: str, scheme: str):
    with visit(browser, many_url, PHONE, scheme) as visitor:
        for tab in ("Overview", "Review", "Trace", "What if", "Run", "Publish"):
            visitor.tab(tab)
            visitor.shot(f"phone-{scheme}-{tab.replace(' ', '-').lower()}")


@pytest.mark.slow
def test_it_is_dark_at_night(browser: Browser, many_url: str):
    with visit(browser, many_url, scheme="dark") as visitor:
        for tab in ("Overview", "Review", "What if", "Run", "Publish"):
            visitor.tab(tab)
            visitor.shot(f"dark-{tab.replace(' ', '-').lower()}")
        ground = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 150


def test_everything_has_a_name_and_the_keyboard_reaches_it(visitor: Visitor):
    """Whatever is on a tab and can be used says what it is, and takes the focus."""
    for tab in ("Overview", "Review", "Trace", "What if", "Run", "Publish"):
        visitor.tab(tab)
        visitor.page.wait_for_timeout(300)
        nameless = visitor.page.evaluate(NAMELESS)
        assert not nameless, (tab, nameless)
    open_review(visitor)
    visitor["#review-cards"].focus()
    visitor.page.keyboard.press("ArrowRight")
    visitor.sees("#review-detail", "row 1")
    expect(visitor["#review-cards"]).to_have_attribute("aria-activedescendant", "pair-1")


# All that the page's origin keeps in this browser, as text.
KEPT = """async () => {
  const found = {...localStorage, ...sessionStorage, cookie: document.cookie};
  for (const {name} of await indexedDB.databases()) {
    const base = await new Promise(done => {
      const asked = indexedDB.open(name);
      asked.onsuccess = () => done(asked.result);
    });
    for (const store of base.objectStoreNames) {
      found[`${name}/${store}`] = await new Promise(done => {
        const asked = base.transaction(store).objectStore(store).getAll();
        asked.onsuccess = () => done(asked.result);
      });
    }
  }
  for (const name of await caches.keys()) found[`cache ${name}`] = true;
  return JSON.stringify(found);
}"""


class Endless:
    """A process that goes on until it is ended."""

    exitcode: int | None = None

    def is_alive(self) -> bool:
        return self.exitcode is None

    def terminate(self) -> None:
        self.exitcode = -signal.SIGTERM

    def join(self, seconds: float) -> None:
        pass


class TestQueue:
    def test_who_waits_can_cancel_and_the_first_goes_on(
        self, browser: Browser, many: str, data: Path, monkeypatch
    ):
        started = []

        def start(request: dict, folder: Path, limits: Limits) -> Run:
            started.append(Run(Endless(), Queue(), folder))
            return started[-1]

        monkeypatch.setattr(running, "_start", start)
        for url in serve(many, NEIGHBOURS):
            with visit(browser, url) as first, visit(browser, url) as second:
                for visitor in (first, second):
                    visitor.tab("Run")
                    visitor["#run-upload input[type=file]"].set_input_files(data / "test.parquet")
                    visitor.sees("#run-upload", "test")
                    visitor.press("#run-start")
                    expect(visitor["#run-cancel"]).to_be_enabled(timeout=WAIT)
                second.page.wait_for_timeout(1000)
                assert len(started) == 1
                second.press("#run-cancel")
                second.sees("#run-said", "Cancelled. Nothing was kept.")
                expect(second["#run-start"]).to_be_enabled(timeout=WAIT)
                assert started[0].process.is_alive()
                first.press("#run-cancel")
                first.sees("#run-said", "Cancelled. Nothing was kept.")
                expect(first["#run-start"]).to_be_enabled(timeout=WAIT)
                first.page.wait_for_timeout(1000)
                assert not started[0].process.is_alive()
                assert not started[0].folder.exists()
                assert len(started) == 1  # the other one never began


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious(browser: Browser, many_url: str, scheme: str, size: tuple):
    with visit(browser, many_url, size, scheme) as visitor:
        open_review(visitor)
        assert not serious(visitor, "#review-place")
        if size == PHONE:
            visitor.page.get_by_text("Which pairs, and how they are shown").click()
        visitor.press("#review-mode")
        assert not serious(visitor, "#review-place")
        visitor.page.keyboard.press("?")
        assert not serious(visitor, "#review-place")


def serious(visitor: Visitor, place: str) -> list[str]:
    """What axe-core has against a part of the page, but for what is of little weight."""
    visitor.page.wait_for_timeout(300)
    found = Axe().run(visitor.page, place).response["violations"]
    return [
        f"{one['id']}: {targets}"
        for one in found
        if one["impact"] in ("serious", "critical")
        and (targets := [node["target"] for node in one["nodes"] if not of_brush(node)])
    ]


def of_brush(node: dict) -> bool:
    """Whether it is a mark of the chart's brush, which Vega draws and gives no name."""
    return all("brush_brush" in part for part in node["target"])


NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, img')]
  .filter(e => e.checkVisibility() && e.type !== 'file' && e.tabIndex !== -1)
  .filter(e => !(e.innerText || '').trim() && !e.ariaLabel && !e.labels?.length && !e.title
    && !e.hasAttribute('alt') && !e.closest('label') && !e.getAttribute('aria-labelledby'))
  .map(e => e.outerHTML.slice(0, 200))"""


@pytest.mark.slow
class TestCalibrating:
    def test_thirty_verdicts_at_speed(self, visitor: Visitor):
        """None is lost, whatever the server does meanwhile, and a reload goes on where one was."""
        visitor.tab("Calibrate")
        expect(visitor["#judge-pairs .judge li:not([hidden])"]).to_have_count(1, timeout=WAIT)
        judged = {}
        for number in range(24):
            item = visitor["#judge-pairs .judge li:not([hidden])"]
            key, verdict = (("1", "right"), ("2", "wrong"), ("3", "cannot tell"))[number % 3]
            judged[item.get_attribute("data-row")] = verdict
            visitor.page.keyboard.press(key)
            visitor.page.wait_for_timeout(100)
        assert len(judged) == 24
        visitor.sees("#judge-said", "After 16 of 30 verdicts")
        visitor.reload()
        visitor.tab("Calibrate")
        visitor.sees(".judge-place", "Pair 25 of 30, 24 judged")
        kept = {
            item.get_attribute("data-row"): item.get_attribute("data-verdict")
            for item in visitor["#judge-pairs .judge li"].all()
        }
        assert {row: verdict for row, verdict in kept.items() if verdict} == judged
        visitor.page.get_by_label("a second person").check()
        visitor.sees(".judge-place", "Pair 1 of 30, 0 judged")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious_elsewhere(
    browser: Browser, many_url: str, scheme: str, size: tuple
):
    with visit(browser, many_url, size, scheme) as visitor:
        expect(visitor["#overview-scatter [role^=graphics-]"].first).to_be_attached(timeout=WAIT)
        assert not serious(visitor, "body")
        for tab, place in (("Findings", ".findings"), ("Calibrate", ".judge li:not([hidden])")):
            visitor.tab(tab)
            expect(visitor[place].first).to_be_visible(timeout=WAIT)
            assert not serious(visitor, "body"), tab
