"""The HTML report: complete without a script, safe whatever a row says, and usable in a real browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from owl_deploy.benchmarking.rows import Row
from owl_deploy.report.page.memory import memory_figures
from owl_deploy.report.page.render import page

from .chromium import in_browser, launched, visited
from .test_report import CANNOT_RUN, MACHINE, make_dense, make_failed, make_row, make_sweep

VOID = {"br", "hr", "img", "input", "link", "meta", "wbr"}
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>'\"&amp;{{ 7 * 7 }}\u2028]]>"


class Outline(HTMLParser):
    """The elements of a page with their attributes, each closed in order, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def rendered(rows: list[Row]) -> str:
    return page(rows, command="owl-deploy bench sparse-*", csv="results.csv", results="results.jsonl")


def embedded(outline: Outline) -> dict[str, Any]:
    """The rows that the page holds."""
    kinds = [attributes.get("type") for attributes in outline.all("script")]
    value: dict[str, Any] = json.loads(outline.texts["script"][kinds.index("application/json")])
    return value


@pytest.fixture(scope="module")
def outline() -> Outline:
    return Outline(rendered([*make_sweep(), make_row("onnxruntime", 0.5, 1.1, batch=4)]))


def test_the_page_needs_nothing_but_itself(outline: Outline) -> None:
    for tag, attributes in outline.elements:
        for name in ("href", "src", "action", "data", "srcset", "xlink:href"):
            target = attributes.get(name, "#")
            assert target.startswith("#") or target in ("data:,", "results.csv", "results.jsonl"), (tag, target)
    (policy,) = [meta["content"] for meta in outline.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert all("url(" not in style and "@import" not in style for style in outline.texts["style"])
    assert not any("style" in attributes for _, attributes in outline.elements)


def test_a_reader_who_does_not_see_finds_the_way(outline: Outline) -> None:
    assert outline.elements[0] == ("html", {"lang": "en"})
    assert {"header", "nav", "main", "footer", "h1"} <= {tag for tag, _ in outline.elements}
    assert len(outline.texts["caption"]) == len(outline.texts["table"])
    assert len(outline.texts["figcaption"]) == len(outline.texts["figure"])
    assert {heading.get("scope") for heading in outline.all("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.elements:
        named = f"{attributes.get('aria-describedby', '')} {attributes.get('aria-labelledby', '')}".split()
        assert set(named) <= set(ids)
    for link in outline.all("a"):
        assert not link["href"].startswith("#") or link["href"][1:] in ids
    for image in outline.all("svg"):
        assert image.get("aria-hidden") == "true" or image["aria-label"]


def test_tables_charts_and_samples_are_there_without_a_script(outline: Outline) -> None:
    cells = [text.strip() for text in outline.texts["td"]]
    for figure in ("▲ faster: 2.50x (2.45–2.55)", "▼ slower: 0.95x (0.93–0.97)", "failed", "2.78x"):
        assert figure in cells
    tips = outline.texts["title"]
    assert "deepsparse, 90%: 2.50x, rounds from 2.45 to 2.55" in tips
    assert any(tip.startswith("onnxruntime dense: 15.0 ms/token, perplexity 12.00") for tip in tips)
    assert any("4 decode samples in 2 rounds, from 19.5 to 20.5 ms" in text for text in outline.texts["p"])
    assert any(CANNOT_RUN in text for text in outline.texts["pre"])
    assert any("not production use" in " ".join(text.split()) for text in outline.texts["p"])


def test_the_page_holds_every_row_and_sample() -> None:
    rows = [make_row(perplexity=math.inf), make_failed()]
    held = embedded(Outline(rendered(rows)))
    assert [Row.model_validate(row) for row in held["rows"]] == rows


@pytest.mark.parametrize(
    "row",
    [
        make_row(engine=HOSTILE, model=HOSTILE, bundle=HOSTILE, engine_facts={HOSTILE: HOSTILE}),
        make_failed(error=HOSTILE),
        make_row(machine=MACHINE.model_copy(update={"cpu": HOSTILE}), perplexity_text=HOSTILE),
    ],
)
def test_no_text_of_a_row_becomes_part_of_the_page(row: Row) -> None:
    outline = Outline(rendered([row]))
    assert len(outline.all("script")) == 2
    assert outline.all("img") == []
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert [Row.model_validate(held) for held in embedded(outline)["rows"]] == [row]


@pytest.mark.parametrize(
    "rows", [[make_failed()], [make_row(perplexity=None, decode_ms_p50=None, speedup_same_engine=None)]]
)
def test_a_page_of_one_poor_row_is_still_a_page(rows: list[Row]) -> None:
    assert "Perplexity was not measured" in " ".join(Outline(rendered(rows)).texts["p"])


def test_equal_rows_give_equal_pages() -> None:
    assert rendered(make_sweep()) == rendered(make_sweep())


def test_the_share_of_memory_takes_the_whole_file_as_read() -> None:
    figures = memory_figures(make_row(decode_ms_p50=50.0, file_bytes=10**9))
    assert figures is not None
    assert (figures.gb_s, figures.share) == (20.0, pytest.approx(20 / MACHINE.memory_bandwidth_gb_s))
    assert memory_figures(make_failed()) is None


# -------------------- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    rows = [*make_sweep(), make_dense("onnxruntime-int4", weights="int4", model=f"someone/{HOSTILE}")]
    path.write_text(rendered(rows), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def report(chromium: Browser, url: str) -> Iterator[Page]:
    """The report, in a window; what it complained of fails the test."""
    with visited(chromium, url) as page:
        yield page


def column(report: Page, index: int) -> list[str]:
    """The first line of each cell of a column of the table."""
    rows = report.locator("#rows tbody tr")
    return [text.split("\n")[0].strip() for text in rows.locator(f"> :nth-child({index + 1})").all_inner_texts()]


@in_browser
def test_a_heading_sorts_by_click_and_by_key(report: Page) -> None:
    decode = report.locator("#rows thead button").nth(4)
    decode.click()
    ascending = column(report, 4)
    assert ascending == sorted(ascending, key=lambda text: (text == "–", text != "–" and float(text)))
    assert ascending[-1] == "–"
    assert decode.locator("..").get_attribute("aria-sort") == "ascending"
    decode.press("Enter")
    descending = column(report, 4)
    assert descending[:-1] == ascending[-2::-1]
    assert descending[-1] == "–"
    assert report.locator("[aria-sort]").count() == 1
    assert "descending" in (report.locator("#said").text_content() or "")


@in_browser
def test_points_explain_themselves_to_the_keyboard(report: Page) -> None:
    tip = report.locator("#tip")
    assert report.locator('svg.chart .mark[tabindex="0"]').count() == report.locator("svg.chart").count()
    report.locator("svg.chart .mark").first.focus()
    first = tip.inner_text()
    report.keyboard.press("ArrowRight")
    second = tip.inner_text()
    assert first and second and first != second
    assert tip.text_content() == report.locator("svg.chart .mark:focus").get_attribute("aria-label")
    report.keyboard.press("Escape")
    assert tip.is_hidden()


@in_browser
def test_an_engine_can_be_hidden_everywhere(report: Page) -> None:
    box = report.locator("input[data-toggles]").first
    shown = report.locator("#rows tbody tr:not([hidden])")
    before = shown.count()
    box.click()
    assert 0 < shown.count() < before
    box.click()
    assert shown.count() == before


@in_browser
def test_a_row_leads_to_its_samples(report: Page) -> None:
    report.locator("#rows tbody a").first.click()
    report.locator("details[open]").wait_for()
    assert report.locator("details[open]").count() == 1


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_has_the_contrast_of_wcag_aa(dark: bool, chromium: Browser, url: str) -> None:
    with visited(chromium, url, dark=dark) as report:
        colours = report.evaluate(
            "[...document.querySelectorAll('p, li, td, th, a, figcaption, caption, summary, svg text')].map(e => "
            "getComputedStyle(e)[e instanceof SVGElement ? 'fill' : 'color']).concat("
            "getComputedStyle(document.documentElement).backgroundColor)"
        )
    paper = luminance(colours.pop())
    for colour in set(colours):
        light, shade = sorted((luminance(colour), paper), reverse=True)
        assert (light + 0.05) / (shade + 0.05) >= 4.5, colour


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@in_browser
@pytest.mark.parametrize("width", [320, 360, 800])
def test_the_page_fits_its_window(width: int, chromium: Browser, url: str) -> None:
    with visited(chromium, url, width=width) as report:
        report.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        assert report.evaluate("document.documentElement.scrollWidth") == width


@in_browser
def test_the_page_prints(report: Page) -> None:
    assert report.pdf(prefer_css_page_size=True).startswith(b"%PDF-")


@in_browser
def test_nothing_of_a_row_runs(report: Page) -> None:
    assert report.title().startswith("Sparse decode speed of")
    assert len(json.loads(report.locator("#data").text_content() or "")["rows"]) == 9
