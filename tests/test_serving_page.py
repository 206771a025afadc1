"""The chat page of `serve` and its documentation, in a real browser: they stream, and load nothing from elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from owl_deploy.serving.run import Serving

from .chromium import in_browser, launched, visited
from .served import KEY, Running, running

pytestmark = in_browser


@pytest.fixture(scope="module")
def server(served_tiny: Path) -> Iterator[Running]:
    with running(served_tiny, Serving(slots=2)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


def test_a_message_is_answered_and_shown_as_text(server: Running, browser: Browser) -> None:
    with visited(browser, f"{server.url}/") as page:
        expect(page.locator("#model")).to_have_text("tiny")
        page.get_by_label("Message").fill("hello <b>there</b>")
        page.get_by_label("Message").press("Enter")
        expect(page.locator("article.user")).to_have_text("hello <b>there</b>")
        expect(page.locator("article.assistant")).not_to_be_empty()
        expect(page.get_by_role("status")).to_have_text(re.compile(r"\d+ tokens, [\d.]+ a second"))
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("article")).to_have_count(0)


def test_a_long_answer_can_be_stopped(server: Running, browser: Browser) -> None:
    assert server.opened is not None
    model = server.opened.engine._model
    decode = model.decode
    model.decode = lambda *given: (time.sleep(0.1), decode(*given))[1]  # 25 s an answer
    try:
        with visited(browser, f"{server.url}/") as page:
            page.get_by_label("Message").fill("a long answer")
            page.get_by_role("button", name="Send").click()
            expect(page.locator("article.assistant")).not_to_be_empty()
            page.get_by_role("button", name="Stop").click()
            expect(page.get_by_role("status")).to_have_text("stopped")
            expect(page.get_by_role("button", name="Send")).to_be_enabled()
        assert server.opened.engine.counts()[:2] == (0, 0)
    finally:
        model.decode = decode


def test_an_error_is_shown_and_the_message_kept(server: Running, browser: Browser) -> None:
    with browser.new_page() as page:
        page.goto(f"{server.url}/")
        page.get_by_label("Message").fill("x" * 2000)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("article.failed")).to_contain_text("leaves no room in the context of 512")
        expect(page.get_by_label("Message")).to_have_value("x" * 2000)


def test_a_key_is_asked_for_where_one_is_needed(served_tiny: Path, browser: Browser) -> None:
    with running(served_tiny, Serving(slots=1), api_key=KEY) as served, browser.new_page() as page:
        page.goto(f"{served.url}/")
        expect(page.get_by_role("status")).to_contain_text("API key is missing or wrong")
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("Message").fill("hello")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("article.assistant")).not_to_be_empty()


@pytest.mark.parametrize("width", [360, 1280])
def test_the_documentation_names_every_field_and_fits(server: Running, browser: Browser, width: int) -> None:
    with visited(browser, f"{server.url}/docs", width=width) as page:
        for field in ("max_completion_tokens", "response_format", "min_p", "logit_bias"):
            expect(page.get_by_role("cell", name=field, exact=True).first).to_be_attached()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
