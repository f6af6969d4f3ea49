"""The report in headless Chromium: it is quiet, asks for nothing, and does what it says."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from report_study import (
    HOSTILE,
    METHODS,
    NUM_PROBLEMS,
    is_right,
    make_study,
    problem_id,
    report_arguments,
)

from gsm8k_core import charts
from gsm8k_core.report import json_for_script
from gsm8k_core.tables import SCHEMA, to_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
THEMES = ["light", "dark"]
MILLISECONDS = 120_000  # a busy machine takes its time
expect.set_options(timeout=MILLISECONDS)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)"),
]


@dataclass
class Opened:
    """A page with all that it said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def go(self, report: Path, fragment: str = "") -> None:
        self.page.set_default_timeout(MILLISECONDS)
        self.page.goto(f"{report.as_uri()}{fragment}")
        self.page.wait_for_selector("html[data-ready]", state="attached")


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, script: Callable[[str], ModuleType]) -> Path:
    paths = make_study(tmp_path_factory.mktemp("report"), script)
    assert script("report").main(report_arguments(paths)) == 0
    return paths["output"]


@pytest.fixture(scope="module")
def report_of_two_models(
    tmp_path_factory: pytest.TempPathFactory, script: Callable[[str], ModuleType]
) -> Path:
    folder = tmp_path_factory.mktemp("two_models")
    paths = make_study(folder, script, num_samples=0, models=("m1", "m2"))
    assert script("report").main(report_arguments(paths)) == 0
    return paths["output"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses root, as which containers run.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, report: Path) -> Iterator[Open]:
    contexts = []

    def open_one(theme: str = "light", width: int = 1280, fragment: str = "") -> Opened:
        context = chromium.new_context(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if theme == "dark" else "light",
        )
        contexts.append(context)
        opened = Opened(context.new_page())
        page = opened.page
        page.on("console", lambda message: opened.said.append(message.text))
        page.on("pageerror", lambda error: opened.said.append(str(error)))
        page.on("dialog", lambda dialog: opened.said.append(dialog.message))
        page.on("request", lambda request: opened.asked.append(request.url))
        opened.go(report, fragment)
        return opened

    yield open_one
    for context in contexts:
        context.close()


def test_the_tables_of_a_comparison_are_as_wide_as_the_screen(
    chromium: Browser, tmp_path: Path
) -> None:
    numbers: dict[str, object] = dict.fromkeys(SCHEMA)
    deltas = [f"delta{of}_vs_{kind}" for of in ("", "_pass_at_1") for kind in ("parent", "base")]
    for name in ("accuracy", "pass_at_1", *deltas):
        numbers |= {name: 0.914, f"{name}_ci_low": 0.737, f"{name}_ci_high": 1.0}
    numbers |= {"p_value_vs_parent_holm": 0.0001, "p_value_vs_base_holm": 0.0001}
    numbers |= {"accuracy_flexible": 1.0, "format_fraction": 1.0, "num_samples": 16}
    numbers |= {"smallest_detectable_delta": 0.153, "num_seeds": 3, "num_problems": 1319}
    numbers |= {"model": "Qwen2.5-0.5B-Instruct", "suite": "gsm8k_platinum_8shot_greedy"}
    numbers |= {"method": f"sft_{'long_' * 7}", "parent": f"grpo_{'long_' * 7}"}
    by_seed = ";".join(f"{seed}:0.875" for seed in range(10))
    numbers |= {"accuracy_by_seed": by_seed, "pass_at_1_by_seed": f"{by_seed}0"}
    numbers |= {"flags": "right and then contradicted: 2.53 %; 2 seeds; base: engine, dtype"}
    numbers |= {"study": "widest", "confidence": 0.95}
    path = tmp_path / "comparison.html"
    path.write_text(to_html(pl.DataFrame([numbers], schema=SCHEMA)), encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    page.goto(path.as_uri())
    tables = page.locator(".scroll")
    assert tables.count() == 5
    for place in range(5):
        hidden = tables.nth(place).evaluate("box => box.scrollWidth - box.clientWidth")
        assert hidden <= 0, place
    page.close()


def draw_all(page: Page) -> int:
    """Scroll every chart into view and wait for it; returns how many there are."""
    boxes = page.locator(".chart-box:visible")
    for number in range(boxes.count()):
        boxes.nth(number).scroll_into_view_if_needed()
        expect(boxes.nth(number).locator("svg.marks")).to_be_visible()
    return boxes.count()


def listed(page: Page) -> list[str]:
    return page.locator("#problems .row-id").all_text_contents()


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("theme", THEMES)
def test_it_draws_every_chart_without_a_word_or_a_request(
    open_page: Open, report: Path, theme: str, width: int
) -> None:
    opened = open_page(theme, width)
    assert draw_all(opened.page) >= 9
    for details in opened.page.locator("details:visible").all():
        details.locator("summary").click()
    assert opened.page.locator("details[open] table").count() >= 9
    opened.page.locator(".chart-box svg.marks path").first.hover()
    assert opened.said == []
    assert opened.asked == [report.as_uri()]
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.page.evaluate(overflow) <= 0


SECTIONS = ("answer", "learning", "cost", "completions", "agreement", "provenance")
PAPER = {"light": (255, 255, 255), "dark": (18, 22, 27)}


def picture(shown: Locator) -> NDArray[np.int64]:
    """A screenshot (height, width, 3), 0 to 255."""
    with Image.open(io.BytesIO(shown.screenshot())) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int64)


def ink(image: NDArray[np.int64], theme: str) -> NDArray[np.bool_]:
    """Which pixels are clearly another colour than the page."""
    return np.asarray(np.abs(image - PAPER[theme]).max(axis=-1) > 40)


@pytest.fixture(scope="module")
def pictures(chromium: Browser, report: Path) -> dict[tuple[str, int, str], NDArray[np.int64]]:
    """Screenshots by theme, width and part: a section, or `chart 0`, `chart 1`, …"""
    found = {}
    for theme, width in itertools.product(THEMES, (1280, 375)):
        context = chromium.new_context(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if theme == "dark" else "light",
        )
        opened = Opened(context.new_page())
        opened.go(report, "#p/m1/test/test-20")
        num_charts = draw_all(opened.page)
        # It sticks to the window, and would cover what is behind it.
        opened.page.evaluate("document.querySelector('header').hidden = true")
        for name in SECTIONS:
            found[theme, width, name] = picture(opened.page.locator(f"#{name}"))
        for place in range(num_charts):
            box = opened.page.locator(".chart-box:visible").nth(place)
            found[theme, width, f"chart {place}"] = picture(box)
        context.close()
    return found


def test_screenshots_show_every_section_and_chart_on_the_page_of_its_theme(
    pictures: dict[tuple[str, int, str], NDArray[np.int64]],
) -> None:
    for (theme, width, part), image in pictures.items():
        where = f"{part}, {theme}, {width} wide"
        share = ink(image, theme).mean()
        assert 0.003 < share < 0.6, f"{where}: {share:.2%} of it is no background"
        assert (image == PAPER[theme]).all(axis=-1).mean() > 0.2, where
        if part in SECTIONS:
            colours = image @ (65_536, 256, 1)
            assert len(np.unique(colours)) > 20, f"{where}: few colours"
        # Ink is in all quarters of the height but for what lies below the last line of a part.
        quarters = np.array_split(ink(image, theme), 4)
        assert all(quarter.any() for quarter in quarters[:3]), f"{where}: part of it is blank"


def test_screenshots_of_the_themes_show_the_same_in_other_colours(
    pictures: dict[tuple[str, int, str], NDArray[np.int64]],
) -> None:
    for (theme, width, part), light in pictures.items():
        if theme != "light":
            continue
        dark = pictures["dark", width, part]
        where = f"{part}, {width} wide"
        assert light.shape == dark.shape, where
        assert light.mean() > 190 and dark.mean() < 75, where
        # What stands out from the page in one theme does so in the other.
        both, either = (
            op(ink(light, "light"), ink(dark, "dark")).sum()
            for op in (np.logical_and, np.logical_or)
        )
        assert both / either > 0.35, f"{where}: {both / either:.0%}"


def test_screenshots_on_a_phone_are_narrow_and_long_and_no_chart_is_squeezed(
    pictures: dict[tuple[str, int, str], NDArray[np.int64]],
) -> None:
    for theme, part in itertools.product(THEMES, SECTIONS):
        phone, desktop = pictures[theme, 375, part], pictures[theme, 1280, part]
        assert phone.shape[1] <= 375 < 1000 < desktop.shape[1]
        assert phone.shape[0] > desktop.shape[0], part
    charts = {key: image for key, image in pictures.items() if key[2].startswith("chart")}
    assert len({key[2] for key in charts}) >= 9
    for key, image in charts.items():
        height, width, _ = image.shape
        assert width > 300 and height > 100, key
        columns = np.flatnonzero(ink(image, key[0]).any(axis=0))
        assert columns[-1] - columns[0] > 0.7 * width, f"{key}: drawn on a part of its place"


LOOK = """() => ({
    empty: document.querySelectorAll(".chart-box:not(:has(svg.marks))").length,
    hidden: document.querySelectorAll("[data-view][hidden]").length,
    flags: document.querySelectorAll(".flags[open]").length,
    page: getComputedStyle(document.body).backgroundColor,
    inks: [...new Set([...document.querySelectorAll(".role-axis-label text")]
        .map((text) => text.getAttribute("fill")))],
})"""


def test_paper_has_every_chart_view_and_flag_in_the_light_theme(
    chromium: Browser, report_of_two_models: Path
) -> None:
    context = chromium.new_context(color_scheme="dark")
    # Before the page's own listener, which puts everything back.
    context.add_init_script(
        f"addEventListener('afterprint', () => {{ window.paper ??= ({LOOK})() }})"
    )
    opened = Opened(context.new_page())
    opened.go(report_of_two_models)
    page = opened.page
    before = page.evaluate(LOOK)
    assert before["empty"] > 0 and before["hidden"] > 0 and before["flags"] == 0
    page.pdf()
    printed: dict[str, Any] = page.evaluate("window.paper")
    assert printed == {
        "empty": 0,
        "hidden": 0,
        "flags": 2,
        "page": "rgb(255, 255, 255)",
        "inks": [charts.SURFACES["light"]["quiet"]],
    }
    after = page.evaluate(LOOK)
    assert after["hidden"] == before["hidden"] and after["flags"] == 0
    assert after["page"] == before["page"] == "rgb(18, 22, 27)"
    # A view that only paper has shown is drawn anew, as wide as its place.
    page.select_option("#view", "1")
    drawn = page.locator("#answer [data-view='1'] svg.marks").first
    dark = charts.SURFACES["dark"]["quiet"]
    expect(drawn.locator(".role-axis-label text").first).to_have_attribute("fill", dark)
    assert drawn.evaluate("svg => svg.clientWidth") > 300
    context.close()


def test_tables_are_no_wider_than_paper(open_page: Open) -> None:
    page = open_page(width=703).page  # 186 mm
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    expect(page.locator(".chart-box svg.marks").last).to_be_visible()
    wide = """() => [...document.querySelectorAll("main table, main svg")].filter((shown) =>
        shown.checkVisibility() && shown.getBoundingClientRect().right > innerWidth + 1)
        .map((shown) => shown.outerHTML.slice(0, 100))"""
    assert page.locator(".ranking").is_visible()
    assert page.evaluate(wide) == []
    assert background(page) == "rgb(255, 255, 255)"


def test_the_theme_is_the_systems_until_it_is_chosen(open_page: Open) -> None:
    light, dark = open_page("light"), open_page("dark")
    assert background(light.page) == "rgb(255, 255, 255)"
    assert background(dark.page) == "rgb(18, 22, 27)"
    draw_all(light.page)
    label = light.page.locator(".chart-box svg.marks text").first
    before = label.get_attribute("fill")
    light.page.select_option("#theme", "dark")
    assert background(light.page) == "rgb(18, 22, 27)"
    expect(light.page.locator(".chart-box svg.marks text").first).not_to_have_attribute(
        "fill", str(before)
    )
    draw_all(light.page)
    light.page.reload()
    light.page.wait_for_selector("html[data-ready]", state="attached")
    assert background(light.page) == "rgb(18, 22, 27)"
    assert light.said == []


@pytest.mark.parametrize(
    ("outcome", "a", "b", "wanted"),
    [
        ("gained", "sft", "twin", [30]),
        ("lost", "sft", "twin", [3]),
        ("changed", "sft", "twin", [3, 30]),
        ("a-right", "base", "", [0, 1, 2, 3]),
        ("both-right", "base", "twin", [0, 1, 2]),
        ("a-mixed", "grpo", "", [1, 6]),
        ("a-wrong", "grpo", "", [36, 37, 38, 39]),
    ],
)
def test_the_list_is_filtered_by_what_methods_get_right(
    open_page: Open, outcome: str, a: str, b: str, wanted: list[int]
) -> None:
    page = open_page().page
    page.select_option("#outcome", outcome)
    page.select_option("#method-a", label=a)
    if b:
        page.select_option("#method-b", label=b)
    assert sorted(listed(page)) == sorted(map(problem_id, wanted))
    expect(page.locator("#count")).to_have_text(f"{len(wanted)} of {NUM_PROBLEMS} problems")


def test_one_seed_and_the_samples_can_be_asked_for(open_page: Open) -> None:
    page = open_page().page
    page.select_option("#outcome", "a-wrong")
    page.select_option("#method-a", label="grpo")
    page.select_option("#seed", label="seed 0")
    assert sorted(listed(page)) == sorted(map(problem_id, [1, 6, 36, 37, 38, 39]))
    page.select_option("#decoding", "sampled")
    assert sorted(listed(page)) == sorted(map(problem_id, [36, 37, 38, 39]))


def test_words_are_searched_in_problems_and_when_asked_in_completions(open_page: Open) -> None:
    page = open_page().page
    page.fill("#search", "PEARS question 12:")
    expect(page.locator("#count")).to_have_text(f"1 of {NUM_PROBLEMS} problems")
    assert listed(page) == ["test-12"]
    page.fill("#search", "sft thinks of 33")
    expect(page.locator("#count")).to_have_text(f"0 of {NUM_PROBLEMS} problems")
    page.check("#in-completions")
    expect(page.locator("#count")).to_have_text(f"1 of {NUM_PROBLEMS} problems")
    assert listed(page) == ["test-33"]


def shares_right(number: int) -> list[float]:
    """Share of the methods' greedy answers that are right, seeds together, one a method."""
    shares = {method: float(is_right(method, number)) for method in METHODS}
    if number in (1, 6):  # hostile texts of grpo's seed 0 that state no answer
        shares["grpo"] = 0.5
    return list(shares.values())


ORDERS: dict[str, Callable[[list[float]], float]] = {
    "suite": lambda _: 0.0,
    "hardest": sum,
    "easiest": lambda shares: -sum(shares),
    "spread": lambda shares: min(shares) - max(shares),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_can_begin_with_what_is_hard_or_easy_or_what_methods_disagree_on(
    open_page: Open, order: str
) -> None:
    page = open_page().page
    page.select_option("#order", order)
    wanted = sorted(range(NUM_PROBLEMS), key=lambda number: ORDERS[order](shares_right(number)))
    assert listed(page) == [problem_id(number) for number in wanted]


def test_a_fragment_opens_its_problem_and_the_address_follows(open_page: Open) -> None:
    opened = open_page(fragment="#p/m1/test/test-12")
    page = opened.page
    expect(page.locator("#problem-id")).to_have_text("test-12")
    expect(page.locator("#position")).to_have_text(f"13 of {NUM_PROBLEMS}")
    page.locator("#problems button", has_text="test-20").click()
    assert page.evaluate("location.hash") == "#p/m1/test/test-20"
    assert page.locator("#permalink").get_attribute("href") == "#p/m1/test/test-20"
    page.evaluate("location.hash = '#p/m1/test/test-5'")
    expect(page.locator("#problem-id")).to_have_text("test-5")
    assert opened.said == []


@pytest.mark.parametrize("fragment", ["#p/m1/test/nothing", "#p/no/such/view", "#p/%", "#p/"])
def test_a_fragment_of_no_problem_is_told_so(open_page: Open, fragment: str) -> None:
    opened = open_page(fragment=fragment)
    if fragment != "#p/%":
        expect(opened.page.locator("#missing")).to_contain_text("holds no problem")
    assert len(listed(opened.page)) == NUM_PROBLEMS
    assert opened.said == []


def test_everything_can_be_done_from_the_keyboard(open_page: Open) -> None:
    opened = open_page()
    page = opened.page
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(page.locator("#problem-id")).to_have_text("test-2")
    page.keyboard.press("k")
    expect(page.locator("#problem-id")).to_have_text("test-1")
    page.keyboard.press("/")
    page.keyboard.type("question apples")  # s and t are letters here
    expect(page.locator("#count")).to_have_text(f"20 of {NUM_PROBLEMS} problems")
    page.keyboard.press("Escape")
    page.locator("#problems button[tabindex='0']").focus()
    page.keyboard.press("End")
    expect(page.locator("#problem-id")).to_have_text("test-39")
    assert page.evaluate("document.activeElement.dataset.place") == "39"
    page.keyboard.press("ArrowUp")
    expect(page.locator("#problem-id")).to_have_text("test-37")
    page.keyboard.press("s")
    expect(page.locator("#decoding")).to_have_value("sampled")
    page.keyboard.press("t")
    expect(page.locator("#theme")).to_have_value("light")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    assert opened.said == []


def test_keys_of_one_character_can_be_turned_off_and_stay_off(open_page: Open) -> None:
    opened = open_page()
    page = opened.page
    page.keyboard.press("?")
    expect(page.locator("#help button")).to_be_focused()
    page.locator("#keys").uncheck()
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    shown = page.locator("#problem-id").inner_text()
    for key in ("j", "t", "?", "/"):
        page.keyboard.press(key)
    expect(page.locator("#problem-id")).to_have_text(shown)
    expect(page.locator("#theme")).to_have_value("auto")
    expect(page.locator("#help")).to_be_hidden()
    expect(page.locator("#search")).not_to_be_focused()
    page.locator("#search").focus()
    page.keyboard.press("Escape")
    expect(page.locator("#search")).not_to_be_focused()
    page.locator("#show-help").click()
    page.locator("#keys").check()
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    expect(page.locator("#problem-id")).not_to_have_text(shown)
    assert opened.said == []


def test_what_scrolls_can_be_scrolled_from_the_keyboard(open_page: Open) -> None:
    page = open_page(fragment="#p/m1/test/test-20").page
    draw_all(page)
    page.locator("#solution-part summary").click()
    unreachable = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((item) => item.checkVisibility()
            && ["auto", "scroll"].includes(getComputedStyle(item).overflowY)
            && item.tabIndex < 0 && !item.querySelector("[tabindex='0']"))
            .map((item) => item.outerHTML.slice(0, 100))"""
    )
    assert unreachable == []


def test_marks_and_pressed_names_differ_where_the_system_sets_all_colours(
    open_page: Open,
) -> None:
    page = open_page().page
    page.emulate_media(forced_colors="active")
    look = """item => {
        const style = getComputedStyle(item);
        return [style.backgroundColor, style.backgroundImage, style.borderStyle].join();
    }"""
    cells = [page.locator(f".legend .cell[data-state={name}]") for name in ("all", "some", "none")]
    assert len({cell.evaluate(look) for cell in cells}) == 3
    edge = "item => getComputedStyle(item).borderLeftWidth"
    rows = [page.locator("#problems button").nth(place) for place in (0, 1)]
    assert [row.evaluate(edge) for row in rows] == ["4px", "0px"]  # shown, and not
    draw_all(page)
    grpo, twin = (
        page.locator(".chart", has_text="pass@k").get_by_role("button", name=name)
        for name in ("grpo", "twin")
    )
    grpo.click()
    expect(grpo).to_have_attribute("aria-pressed", "true")
    page.mouse.move(0, 0)
    assert grpo.evaluate(look) != twin.evaluate(look)


def test_a_legend_wraps_and_its_names_are_buttons_that_bring_lines_forward(open_page: Open) -> None:
    opened = open_page(width=360)
    page = opened.page
    draw_all(page)
    outside = """() => [...document.querySelectorAll(".chart-legend li")].filter((entry) =>
        entry.getBoundingClientRect().right > entry.closest(".chart").getBoundingClientRect().right)
        .length"""
    assert page.evaluate(outside) == 0
    chart = page.locator(".chart", has_text="pass@k")
    faint = chart.locator("svg.marks .mark-line path[opacity='0.15']")
    grpo = chart.get_by_role("button", name="grpo")
    expect(faint).to_have_count(0)
    grpo.focus()
    page.keyboard.press("Enter")
    expect(grpo).to_have_attribute("aria-pressed", "true")
    expect(faint).to_have_count(3)
    chart.get_by_role("button", name="twin").click()
    expect(faint).to_have_count(2)
    page.select_option("#theme", "dark")  # drawn anew
    expect(chart.get_by_role("button", name="twin")).to_have_attribute("aria-pressed", "true")
    expect(faint).to_have_count(2)
    grpo.click()
    chart.get_by_role("button", name="twin").click()
    expect(faint).to_have_count(0)
    assert opened.said == []


def test_one_row_of_the_list_takes_part_in_the_tab_order(open_page: Open) -> None:
    page = open_page().page
    assert page.locator("#problems button[tabindex='0']").count() == 1
    page.select_option("#outcome", "a-wrong")
    assert page.locator("#problems button[tabindex='0']").count() == 1


def test_completions_stand_side_by_side_with_grades_and_marks(open_page: Open) -> None:
    page = open_page(fragment="#p/m1/test/test-20").page
    columns = page.locator(".column")
    expect(columns).to_have_count(4)
    expect(columns.nth(1).locator("h4")).to_contain_text("2 of 2 right")
    expect(columns.nth(0).locator("h4")).to_contain_text("0 of 2 right")
    expect(columns.nth(1).locator(".card").first).to_contain_text("✓ right")
    expect(columns.nth(0).locator(".card").first).to_contain_text("✗ wrong")
    expect(columns.nth(1).locator("mark").first).to_have_text("7")
    expect(columns.nth(0).locator("mark").first).to_have_text("8")
    page.locator("#key label", has_text="base").locator("input").uncheck()
    expect(columns).to_have_count(3)
    page.select_option("#decoding", "sampled")
    expect(columns.nth(1).locator(".card")).to_have_count(6)
    page.goto(page.url.removesuffix("test-20") + "test-19")  # not of pytest-20x above it
    expect(page.locator(".cut").first).to_have_text("cut off")


def test_the_methods_that_are_compared_stand_first_and_then_the_best(open_page: Open) -> None:
    page = open_page(fragment="#p/m1/test/test-20").page
    names = "() => [...document.querySelectorAll('.column')].map((one) => one.ariaLabel)"
    expect(page.locator(".column")).to_have_count(4)
    assert page.evaluate(names) == ["sft", "grpo", "twin", "base"]
    page.locator("#key label", has_text="twin").locator("input").uncheck()
    page.select_option("#outcome", "gained")
    page.select_option("#method-a", label="base")
    expect(page.locator(".column").first).to_have_attribute("aria-label", "base")
    assert page.evaluate(names) == ["base", "grpo", "sft"]
    marks = page.locator("#problems .cells").first.locator(".cell")
    titles = [mark.get_attribute("title") for mark in marks.all()]
    assert [str(title).partition(":")[0] for title in titles] == ["base", "grpo", "sft", "twin"]


def test_the_ranking_fits_a_desktop_and_what_does_not_fit_has_a_shadow(open_page: Open) -> None:
    page = open_page().page
    hidden = "table => table.parentElement.scrollWidth - table.parentElement.clientWidth"
    assert page.locator(".ranking").evaluate(hidden) <= 0
    for name in (".scroll", ".columns"):
        look = "box => getComputedStyle(box).backgroundImage"
        assert page.locator(name).first.evaluate(look).count("linear-gradient") == 4


def test_a_flag_is_a_link_to_what_it_means(open_page: Open) -> None:
    page = open_page().page
    flag = page.get_by_role("link", name="flagged: 2 seeds").first
    flag.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".flags li:target")).to_be_visible()
    expect(page.locator(".flags li:target")).to_contain_text("grpo: 2 seeds")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_completion_is_text_and_runs_nothing(open_page: Open, name: str) -> None:
    number = list(HOSTILE).index(name)
    opened = open_page(fragment=f"#p/m1/test/{quote(problem_id(number), safe='')}")
    page = opened.page
    expect(page.locator("#problem-id")).to_have_text(problem_id(number))
    text = page.locator(".column[aria-label=grpo] .card .text").first
    if name == "long":
        expect(text).to_contain_text("characters …")
        text.locator("button.more").click()
    expected = HOSTILE[name] or "(empty)"
    unseen = ("\u00ad", "\u180e", "\u3164", "\u2800", "\ufe01", "\U000e0041")
    for char in ("\x00", "\u202e", "\u202c", "\u2028", *unseen):
        expected = expected.replace(char, f"U+{ord(char):04X}")
    expected = expected.replace("\ud83d,", "U+D83D,").replace("\n" * 40, "40 line ends\n")
    assert text.evaluate("node => node.textContent") == expected
    if HOSTILE[name].endswith("#### 7"):
        expect(text.locator("mark")).to_have_text("7")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("main img, main iframe, main b").count() == 0
    assert opened.said == [] and len(opened.asked) == 1


def test_the_policy_stops_what_would_get_in_all_the_same(open_page: Open) -> None:
    opened = open_page()
    failures: list[str | None] = []
    opened.page.on("requestfailed", lambda request: failures.append(request.failure))
    opened.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src='http://127.0.0.1:9/x.png'>");
            document.body.insertAdjacentHTML("beforeend", "<p onclick='window.hacked = 1'>x</p>");
            document.body.lastElementChild.click();
        }"""
    )
    fetched = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    assert opened.page.evaluate(fetched) == "refused"
    assert opened.page.evaluate("typeof window.hacked") == "undefined"
    assert len([text for text in opened.said if "Content Security Policy" in text]) >= 3
    assert failures == ["csp"]  # the image: refused before it reached the network


def test_every_control_has_a_name(open_page: Open) -> None:
    page = open_page().page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, a, [role=region]")]
            .filter((item) => item.checkVisibility())
            .filter((item) => !(item.getAttribute("aria-label") || item.textContent.trim()
                && item.tagName !== "SELECT" || item.labels?.[0]?.textContent.trim()))
            .map((item) => item.outerHTML.slice(0, 100))"""
    )
    assert nameless == []


@pytest.fixture(scope="module")
def wide_report(
    tmp_path_factory: pytest.TempPathFactory, script: Callable[[str], ModuleType]
) -> Path:
    """A report of long names and wide charts."""
    names = tuple(f"deepseek-r1-distill-qwen-1.5b-with-a-long-name-{n}" for n in (1, 2))
    paths = make_study(tmp_path_factory.mktemp("wide"), script, num_samples=0, models=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "MAX_SQUEEZED", 2)  # as with more methods
        patch.setattr(charts, "PAIR_STEP", 400)
        assert script("report").main(report_arguments(paths)) == 0
    html = paths["output"].read_text(encoding="utf-8").replace("twin", "twin_of_a_method" * 3)
    html = html.replace(">demo</a>", f">{'a-study-with-a-long-name-' * 3}</a>")
    paths["output"].write_text(html, encoding="utf-8", newline="")
    return paths["output"]


@pytest.mark.parametrize("width", [360, 900, 1000, 1280])
def test_long_names_and_wide_charts_do_not_make_the_page_wider_than_its_window(
    chromium: Browser, wide_report: Path, width: int
) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800})
    page.goto(wide_report.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    links = page.locator("nav[aria-label=Sections]")
    assert links.evaluate("nav => nav.clientWidth") > min(width, 500) * 0.8  # not squeezed out
    for link in links.locator("a").all():
        box, frame = link.bounding_box(), links.bounding_box()
        assert box is not None and frame is not None
        assert frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
    wide = page.locator("#agreement .chart-box:visible").first
    assert wide.evaluate("box => box.scrollWidth - box.clientWidth") > 0
    assert wide.locator("svg.marks").evaluate("svg => svg.clientWidth") > 1600
    page.close()


def test_views_of_models_and_suites_can_be_changed_and_linked_to(
    chromium: Browser, report_of_two_models: Path
) -> None:
    page = chromium.new_page()
    page.goto(f"{report_of_two_models.as_uri()}#p/m2/test/test-7")
    page.wait_for_selector("html[data-ready]", state="attached")
    expect(page.locator("#view")).to_have_value("1")
    expect(page.locator("#problem-id")).to_have_text("test-7")
    expect(page.locator("#answer table:visible")).to_have_count(1)
    page.locator("[data-show-view='0']").click()
    expect(page.locator("#view")).to_have_value("0")
    heading = page.locator("#answer [data-view='0'] h2")
    expect(heading).to_be_focused()
    expect(heading).to_be_in_viewport()
    assert page.evaluate("location.hash") == "#v/m1/test"
    expect(page.locator("[aria-current][data-show-view]")).to_have_text("m1 on test")
    page.evaluate("location.hash = '#v/m2/test'")
    expect(page.locator("#answer [data-view='1'] h2")).to_be_focused()
    expect(page.locator("[aria-current][data-show-view]")).to_have_text("m2 on test")
    page.evaluate("location.hash = '#v/m3/test'")
    expect(page.locator("#missing")).to_have_text("This page holds no m3 on test.")
    page.locator("[data-show-view='0']").click()
    expect(page.locator("#answer [data-view='0'] svg").first).to_be_visible()
    page.close()


@pytest.mark.parametrize("way", ["link to a view", "link to this view", "select", "row", "key"])
def test_what_the_page_does_not_hold_is_forgotten_once_something_else_is_shown(
    chromium: Browser, report_of_two_models: Path, way: str
) -> None:
    page = chromium.new_page()
    page.goto(f"{report_of_two_models.as_uri()}#p/m1/test/test-999")
    expect(page.locator("#missing")).to_contain_text("holds no problem “test-999”")
    match way:
        case "link to a view":
            page.locator("[data-show-view='1']").click()
        case "link to this view":
            page.locator("[data-show-view='0']").click()
        case "select":
            page.select_option("#view", "1")
        case "row":
            page.locator("#problems button").nth(3).click()
        case "key":
            page.keyboard.press("j")
    expect(page.locator("#missing")).to_be_hidden()
    page.close()


@pytest.mark.parametrize("way", ["select", "button"])
def test_a_view_opens_its_own_first_problem_when_a_search_in_completions_ends(
    chromium: Browser, report_of_two_models: Path, tmp_path: Path, way: str
) -> None:
    html = report_of_two_models.read_text(encoding="utf-8")
    before, start, rest = html.partition('<script type="application/json" id="data">')
    text, end, after = rest.partition("</script>")
    data = json.loads(text)
    del data["views"][1]["browser"]["problems"][20:]  # a view of fewer problems
    changed = tmp_path / "report.html"
    changed.write_text(
        f"{before}{start}{json_for_script(data)}{end}{after}", encoding="utf-8", newline=""
    )
    page = chromium.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(changed.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.select_option("#outcome", "gained")
    page.select_option("#method-a", label="sft")
    page.select_option("#method-b", label="twin")
    page.check("#in-completions")
    page.fill("#search", "thinks of")
    expect(page.locator("#count")).to_have_text(f"1 of {NUM_PROBLEMS} problems")
    page.locator("#problems button").click()
    expect(page.locator("#problem-id")).to_have_text("test-30")
    # The other view compares sft with grpo at first, which gains 16 to 35.
    if way == "select":
        page.select_option("#view", "1")
    else:
        page.locator("[data-show-view='1']").click()
    expect(page.locator("#count")).to_have_text("4 of 20 problems")
    expect(page.locator("#problem-id")).to_have_text("test-16")
    expect(page.locator("#position")).to_have_text("1 of 4")
    expect(page.locator(".column")).to_have_count(4)
    shown = "#p/m2/test/test-16" if way == "select" else "#v/m2/test"
    assert page.evaluate("location.hash") == shown
    # A later search ends the one of the view, which has shown nothing yet, and then shows it.
    page.evaluate(
        """() => {
            const change = (id, value) => {
                document.getElementById(id).value = value;
                document.getElementById(id).dispatchEvent(new Event("change"));
            };
            change("view", "0");
            document.getElementById("search").value = "thinks of 20";
            change("order", "suite");
        }"""
    )
    expect(page.locator("#problem-id")).to_have_text("test-20")
    assert said == []
    # A view that somebody goes to while still typing has its first problem in the address.
    page.evaluate(
        """() => {
            const search = document.getElementById("search");
            search.value = "thinks of";
            search.dispatchEvent(new Event("input"));
            document.getElementById("view").value = "1";
            document.getElementById("view").dispatchEvent(new Event("change"));
            document.getElementById("order").dispatchEvent(new Event("change"));
        }"""
    )
    expect(page.locator("#problem-id")).to_have_text("test-16")
    assert page.evaluate("location.hash") == "#p/m2/test/test-16"
    page.close()
