"""The app as a person meets it, in Chromium: every tab, by mouse and by key."""

import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from hf_ecif.app.app import launch, make_app
from hf_ecif.app.limits import HOME, SPACE, Limits
from hf_ecif.app.session import STORAGE_KEY
from tests.app.conftest import HTML
from tests.app.visitor import CHROMIUM, FLAGS, PHONE, WAIT, Visitor, visit
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
def visitor(browser: Browser, many_url: str) -> Iterator[Visitor]:
    with visit(browser, many_url) as visitor:
        yield visitor


@pytest.fixture
def stranger(browser: Browser, real_url: str) -> Iterator[Visitor]:
    with visit(browser, real_url) as visitor:
        yield visitor


def set_threshold(visitor: Visitor, value: str) -> None:
    field = visitor["#threshold input[type=number]"]
    field.fill(value)
    field.press("Enter")


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
        found = visitor["#overview-picked"].inner_text()
        assert 0 < int(re.match(r"([\d,]+)", found)[1].replace(",", "")) < 1000
        visitor.page.get_by_role("button", name="Clear the selection").click()
        visitor.sees("#overview-picked", "1,000 pairs are flagged. ")

    def test_html_in_a_caption_is_text(self, visitor: Visitor):
        visitor.sees("#overview-cards [data-row='0']", HTML)
        assert visitor.page.title() != "hurt"
        visitor.press("#overview-cards [data-row='0']")
        visitor.sees("#review-detail .detail-caption", HTML)
        visitor.sees("#review-detail .reason", "looks <b>wrong</b>")
        assert visitor.page.title() != "hurt"


class TestReview:
    def test_decide_by_button_and_key_undo_reload_and_export(self, visitor: Visitor, tmp_path):
        visitor.tab("Review")
        visitor.sees("#review-detail", "row 0")
        visitor.press("#review-cards [data-row='2']")
        visitor.sees("#review-detail", "row 2")
        visitor.shot("review")
        visitor.press("#review-keep")
        visitor.sees("#review-detail", "row 3")
        visitor.page.keyboard.press("r")
        visitor.sees("#review-detail", "row 4")
        visitor["#review-caption textarea"].fill("a crow, keep it")  # its k and p are no keys
        visitor.press("#review-recaption")
        visitor.sees("#review-detail", "row 5")
        visitor.sees("#review-progress", "1 keep, 1 remove, 1 new caption")
        visitor.page.keyboard.press("r")
        visitor.sees("#review-detail", "row 6")
        visitor.page.keyboard.press("u")
        visitor.sees("#review-detail", "row 5")
        visitor.sees("#review-progress", "1 keep, 1 remove, 1 new caption")

        visitor.reload()
        visitor.tab("Review")
        visitor.sees("#review-progress", "1 keep, 1 remove, 1 new caption")
        visitor.sees("#review-cards [data-row='3'] .decision", "remove")
        visitor.page.get_by_role("radio", name="decided").check()
        expect(visitor["#review-cards [data-row]"]).to_have_count(3, timeout=WAIT)

        visitor.press("#review-export")
        link = visitor["#review-exported a[download], #review-exported a"].first
        expect(link).to_be_visible(timeout=WAIT)
        with visitor.page.expect_download() as waiting:
            link.click()
        waiting.value.save_as(tmp_path / "export.zip")
        with zipfile.ZipFile(tmp_path / "export.zip") as archive:
            decisions = json.loads(archive.read("decisions.json"))["log"]
            summary = json.loads(archive.read("summary.json"))
        assert [(d["row"], d["action"], d["text"]) for d in decisions] == [
            (2, "keep", None),
            (3, "remove", None),
            (4, "recaption", "a crow, keep it"),
        ]
        assert summary["removed"] == 1000 - 2 + 1

    def test_a_thousand_come_in_pages(self, visitor: Visitor):
        visitor.tab("Review")
        expect(visitor["#review-cards [data-row]"]).to_have_count(24, timeout=WAIT)
        page = visitor["#review-page input[type=number]"]
        expect(page).to_have_attribute("max", "42", timeout=WAIT)  # the cards come before it
        page.fill("42")
        page.press("Enter")
        visitor.sees("#review-cards", "bird number 999")
        expect(visitor["#review-cards [data-row]"]).to_have_count(16)
        visitor.press("#review-cards [data-row='999']")
        visitor.sees("#review-detail", "row 999")
        visitor.page.keyboard.press("p")
        visitor.sees("#review-detail", "row 998")
        visitor.page.keyboard.press("j")
        visitor.sees("#review-detail", "row 999")

    def test_the_threshold_survives_a_reload(self, visitor: Visitor):
        set_threshold(visitor, "0.95")
        visitor.sees("#overview-tiles .accent", "95 %")
        # Encrypted, so only its length tells that something is in it.
        visitor.page.wait_for_function(
            "key => (localStorage.getItem(key) || '').length > 100", arg=STORAGE_KEY
        )
        visitor.reload()
        visitor.sees("#overview-tiles .accent", "95 %")

    def test_two_visitors_do_not_mix(self, browser: Browser, visitor: Visitor, many_url: str):
        visitor.tab("Review")
        visitor.sees("#review-detail", "row 0")
        visitor.press("#review-remove")
        visitor.sees("#review-progress", "1 remove")
        with visit(browser, many_url) as other:
            other.tab("Review")
            other.sees("#review-progress", "0 decided")
            other.sees("#review-detail", "row 0")

    def test_a_pair_has_neighbours(self, stranger: Visitor):
        stranger.tab("Review")
        stranger.sees("#review-detail", "row ")
        stranger.press("#review-nearest button")
        stranger.sees("#review-near", "Similar images, other captions")
        stranger.shot("review-neighbours")
        row = stranger["#review-near [data-row]"].first.get_attribute("data-row")
        stranger.press("#review-near [data-row]")
        stranger.sees("#review-detail", f"row {row}")


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
            visitor.tab("Review")
            visitor.press("#review-keep")
            visitor.sees("#review-progress", "1 keep")
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
    visitor.tab("Review")
    visitor["#review-cards [data-row]"].first.focus()
    visitor.page.keyboard.press("Tab")
    visitor.page.keyboard.press("Enter")
    visitor.sees("#review-detail", "row 1")


NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, img')]
  .filter(e => e.offsetParent && e.type !== 'file' && e.tabIndex !== -1)
  .filter(e => !(e.innerText || '').trim() && !e.ariaLabel && !e.labels?.length && !e.title
    && !e.hasAttribute('alt') && !e.closest('label') && !e.getAttribute('aria-labelledby'))
  .map(e => e.outerHTML.slice(0, 200))"""
