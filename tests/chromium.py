"""The system's Chromium without a screen, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")

in_browser = pytest.mark.skipif(EXECUTABLE is None, reason="chromium is not here: `make browser` installs it")


@contextmanager
def launched() -> Iterator[Browser]:
    """A running Chromium; it ends with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=list(_SWITCHES))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visited(browser: Browser, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A page in a window of its own, of this size in CSS pixels.

    Raises:
        AssertionError: when the block ends, if the page wrote to the console, left an exception uncaught, or asked
            another host than its own for anything.
    """
    complaints: list[str] = []
    own = url.split("/", 3)[:3]
    with browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    ) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.split("/", 3)[:3] == own or complaints.append(request.url))
        page.goto(url)
        yield page
        assert complaints == []
