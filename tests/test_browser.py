"""report.html in a real browser: no errors, nothing wider than the page, cells that lead somewhere.

Needs Chromium, as Debian's package has it. Without one these tests skip, each by its name, so that
a run says how many were not done.
"""

from __future__ import annotations

import os
import shutil

import pytest
from report_cases import of_layers, report_of, with_later_rungs

from pytest_aprt.render import html

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH: apt-get install chromium to run this"
)
SIZES = [(400, 800), (1400, 900)]
SCHEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        "clean": report_of("clean"),
        "fault": report_of("fault"),
        "overflow": report_of("overflow"),
        "deep": of_layers(report_of("fault"), 28),
        "claims": with_claims(report_of("prompts")),
    }
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(html.render(report))
    return {name: (folder / f"{name}.html", report) for name, report in reports.items()}


@pytest.fixture
def opened(browser, pages):
    contexts = []

    def open_page(name, size=(1400, 900), scheme="light", **options):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True,
            **options,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("requestfailed", lambda request: page.complaints.append(request.url))
        page.goto(pages[name][0].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def with_claims(report):
    """Contracts of which one is falsified and one overstated."""
    claims = with_later_rungs(report_of("clean"))["contracts"]
    further = {"id": "FALSIFY-X-002", "outcome": "passed", "supported": "PROPOSED"}
    return {**report, "contracts": [*claims, {**claims[0], **further}]}


def test_a_falsified_claim_is_led_to_from_the_top(opened):
    page = opened("claims")
    page.locator("#rung-contracts").evaluate("d => d.open = false")
    page.get_by_role("link", name="2 claims of the contracts").click()
    page.locator("#rung-contracts table").wait_for(state="visible")
    assert "FALSIFY-X-002" in page.locator("#rung-contracts").inner_text()


def overflow_of(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES, ids=["400", "1400"])
@pytest.mark.parametrize("name", ["clean", "fault", "overflow", "deep", "claims"])
def test_the_page_fits_and_complains_of_nothing(opened, pages, name, size, scheme):
    page = opened(name, size, scheme)
    assert page.complaints == []
    assert overflow_of(page) <= 0
    cells = page.locator(".grid td a")
    assert cells.count() == len(pages[name][1]["points"])
    boxes = cells.evaluate_all("all => all.map(a => a.getBoundingClientRect().toJSON())")
    assert all(box["width"] >= 8 and box["height"] >= 8 for box in boxes)
    page.evaluate("document.querySelectorAll('details.rung').forEach(d => d.open = true)")
    figures = page.locator("#rung-decode figure:visible svg")
    assert figures.count() == (name == "clean")  # the others' engine has no steps
    assert all(box["height"] > 80 for box in figures.evaluate_all(
        "all => all.map(a => a.getBoundingClientRect().toJSON())"
    ))  # fmt: skip
    for details in ("layer", "rung", "point"):
        page.evaluate(f"document.querySelectorAll('details.{details}').forEach(d => d.open = true)")
    assert overflow_of(page) <= 0


@pytest.mark.parametrize("name", ["L02-k_post_rope", "L01-ffn_silu", "lm_head"])
def test_a_cell_opens_its_point(opened, name):
    page = opened("fault")
    page.locator(f'.grid a[href="#p-{name}"]').click()
    point = page.locator(f"[id='p-{name}']")
    assert point.evaluate("d => d.open")
    point.locator("table").first.wait_for(state="visible")
    assert page.evaluate("document.activeElement.closest('details').id") == f"p-{name}"
    page.locator(f'.grid a[href="#p-{name}"]').scroll_into_view_if_needed()
    point.evaluate("d => d.open = false")
    page.locator(f'.grid a[href="#p-{name}"]').click()  # the same again
    point.locator("table").first.wait_for(state="visible")


def test_an_address_with_a_point_opens_it(opened, pages):
    page = opened("fault")
    page.goto(pages["fault"][0].as_uri() + "#p-L03-ffn_out")
    page.locator("[id='p-L03-ffn_out'] table").first.wait_for(state="visible")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_switch_changes_colours(opened, scheme):
    page = opened("fault", scheme=scheme)
    cell = page.locator('.grid a[href="#p-L03-ffn_out"]')
    seen = {}
    for error in ("local", "engine", "weights", "total"):
        page.locator(f"label[for=show-{error}]").click()
        assert page.locator(f".say-{error}").is_visible()
        seen[error] = cell.evaluate("a => getComputedStyle(a).backgroundColor")
    assert seen["local"] not in (seen["engine"], seen["weights"], seen["total"])
    assert "rgba(0, 0, 0, 0)" not in seen.values()


def test_the_keyboard_reaches_and_moves_in_the_map(opened):
    page = opened("fault")
    page.locator("#show-local").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#show-engine").is_checked()
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('href')"
    assert page.evaluate(focused) == "#p-L00-embedding"
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate(focused) == "#p-L02-attn_norm"
    assert "L02-attn_norm: noise" in page.locator(".readout").inner_text()
    page.keyboard.press("Enter")
    page.locator("[id='p-L02-attn_norm'] table").first.wait_for(state="visible")


def test_without_scripts_everything_is_still_there(opened):
    page = opened("fault", java_script_enabled=False)
    assert page.locator(".grid td a").count() == 71
    page.locator("label[for=show-total]").click()
    assert page.locator(".say-total").is_visible()
    assert page.locator("[id='p-L02-k_post_rope'] svg").is_visible()


CONTRAST = """
() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= .03928 ? v / 12.92 :
    ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > .99) return c; } return [255, 255, 255]; };
  const poor = [];
  const texts = 'p, dd, dt, th, td, summary, label, a, h1, h2, code, .chip';
  for (const e of document.querySelectorAll(texts)) {
    if (!e.checkVisibility() || !e.innerText || e.closest('.grid td, .skip')) continue;
    const a = lum(parse(getComputedStyle(e).color)), b = lum(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push([e.tagName, e.className, e.innerText.slice(0, 30), ratio]);
  }
  return poor;
}
"""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["clean", "fault", "claims"])
def test_text_has_the_contrast_that_wcag_asks(opened, name, scheme):
    page = opened(name, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CONTRAST) == []


def test_a_deep_page_opens_in_two_seconds(opened):
    page = opened("deep")
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert 0 < page.evaluate(timing) < 2000


def test_it_prints_light_and_whole(opened, tmp_path):
    page = opened("fault", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    assert not page.locator(".bar").is_visible()
    assert page.locator("#origins svg").first.is_visible()
    page.pdf(path=tmp_path / "page.pdf", format="A4", print_background=True)
    assert (tmp_path / "page.pdf").stat().st_size > 20_000
