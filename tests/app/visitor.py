"""A person at the page: Chromium with a tab of its own, which nothing may go wrong in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
]
SHOTS = Path(__file__).parents[2] / "runs" / "screenshots"
WAIT = 60_000  # milliseconds; machines that test are busy
DESKTOP, PHONE = (1300, 900), (390, 844)


class Visitor:
    """Reads and presses what the page shows.

    Attributes:
        page: of the browser.
        problems: errors of its console and of its scripts, and requests that leave this machine.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.problems, self._leaving = page, [], False
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: message.type == "error" and self._note(message.text))
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("request", self._watch)
        page.goto(url)
        self.arrive()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """What is done in here loads a page: what the old one had asked for breaks off, and it
        says so."""
        self._leaving = True
        with self.page.expect_navigation():
            yield
        self.arrive()
        self._leaving = False

    def reload(self) -> None:
        """Load the page once more."""
        with self.leaving():
            self.page.reload()

    def arrive(self) -> None:
        """Wait until the page shows the audit."""
        expect(self["#title h1"]).to_be_visible(timeout=WAIT)
        expect(self["#overview-tiles .tile"].first).to_be_visible(timeout=WAIT)

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def tab(self, name: str) -> None:
        """Go to a tab; on a narrow screen by way of the menu."""
        button = self.page.get_by_role("tab", name=name, exact=True)
        if not button.count() or not button.first.is_visible():
            self[".overflow-menu > button"].first.click()
            button = self[".overflow-dropdown button"].filter(has_text=name)
        button.first.click()

    def press(self, selector: str) -> None:
        """Press a button."""
        self[selector].first.click()

    def sees(self, selector: str, text: str) -> None:
        """It is there, within a while."""
        expect(self[selector].first).to_contain_text(text, timeout=WAIT)

    def shot(self, name: str) -> None:
        """Keep a picture, and check that nothing is wider than the screen."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(300)
        width = self.page.viewport_size["width"]
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width, name
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def _note(self, problem: str) -> None:
        if not self._leaving:
            self.problems.append(problem)

    def _watch(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.problems.append(f"a request to {request.url}")


@contextmanager
def visit(
    browser: Browser, url: str, size: tuple[int, int] = DESKTOP, scheme: str = "light"
) -> Iterator[Visitor]:
    """A person who has never been here; nothing may have gone wrong when they leave."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, accept_downloads=True
    )
    visitor = Visitor(context.new_page(), url)
    yield visitor
    context.close()
    assert not visitor.problems, visitor.problems
