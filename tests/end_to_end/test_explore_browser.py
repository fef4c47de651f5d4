"""The page in a real, headless Chromium: every view, by mouse, by keyboard, and as it is heard."""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from features.store import FeatureStore
from tests import tiny
from tests.explored import BROKEN, CHROMIUM, HOSTILE, make_run, needs_chromium, served

pytestmark = [needs_chromium, pytest.mark.slow]
HEADINGS = {
    "Search": "A look into test",
    "Map": "Map of the shared space",
    "Results": "Zero-shot classification",
    "Training": "Held-out recall",
    "Store": "image/vit",
}
MILLISECONDS = 20_000
expect.set_options(timeout=MILLISECONDS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with served(run) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def expected() -> list[str]:
    """What a test says that the page will write as an error, in order."""
    return []


@pytest.fixture(params=[{}], ids=[""])
def page(
    browser: Browser, address: str, expected: list[str], request: pytest.FixtureRequest
) -> Iterator[Page]:
    """A page that fails the test where it writes an error or asks for anything elsewhere."""
    settings: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}} | request.param
    context = browser.new_context(reduced_motion="reduce", **settings)
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    errors, asked = list[str](), list[str]()

    def note(message: ConsoleMessage) -> None:
        damaged = message.location["url"].split("?")[0].endswith(f"/image/test/{BROKEN}")
        if message.type == "error" and not damaged:
            errors.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    for error, words in zip_longest(errors, expected, fillvalue=""):
        assert words, error
        assert words in error
    assert [url for url in asked if not url.startswith((address, "blob:"))] == []


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


@pytest.mark.parametrize(
    "page", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"], indirect=True
)
def test_every_view_opens_fits_the_window_and_has_words_for_everything(page: Page) -> None:
    for name, heading in HEADINGS.items():
        tab = page.get_by_role("navigation", name="Views").get_by_role("link", name=name)
        tab.click()
        expect(page.get_by_role("heading", name=heading).first).to_be_visible()
        expect(tab).to_have_attribute("aria-current", "page")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert page.evaluate(CUT_OFF) == [], name
        assert page.evaluate(WITHOUT_WORDS) == [], name
    for landmark in ("banner", "main"):
        expect(page.get_by_role(landmark)).to_be_visible()


CUT_OFF = """
() => [...document.querySelectorAll(".scroll")].filter((each) =>
  each.scrollWidth > each.clientWidth).map((each) => each.textContent.slice(0, 200))
"""
WITHOUT_WORDS = """
() => [
  ...[...document.querySelectorAll("button, a[href], input, select, summary")].filter((each) =>
    !(each.ariaLabel || each.innerText?.trim() || each.textContent?.trim() || each.labels?.length)),
  ...document.querySelectorAll("img:not([alt]), svg[role=img]:not([aria-label])"),
  ...document.querySelectorAll("canvas:not([aria-label])"),
].map((each) => each.outerHTML.slice(0, 200))
"""


def test_words_find_the_image_and_the_way_back_leads_back(page: Page, run: Path) -> None:
    store = FeatureStore.open(run / "features" / "test.zarr")
    words = str(store.captions("long", 5, 6)[0])
    page.get_by_label("What to search for").fill(words)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("heading", name=words)).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("15 results of 15 images.")
    expect(page.locator(".card")).to_have_count(15)
    page.get_by_text("Captions", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("24 results of 32 captions.")
    first = page.locator(".card").first
    expect(first.locator(".words")).to_have_text(words)
    expect(first).to_contain_text("1.000")
    page.go_back()
    expect(page.get_by_role("status")).to_have_text("15 results of 15 images.")
    page.go_back()
    expect(page.get_by_role("heading", name="A look into test")).to_be_visible()


def test_an_image_finds_itself_and_what_is_no_image_is_said(
    page: Page, expected: list[str], tmp_path: Path
) -> None:
    photo, text = tmp_path / "photo.jpg", tmp_path / "text.jpg"
    photo.write_bytes(tiny.encoded(tiny.picture(1005)))
    page.locator("#file").set_input_files(photo)
    expect(page.get_by_role("heading", name="Like photo.jpg")).to_be_visible()
    page.locator(".card").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("test · row 5 of 16")
    page.get_by_role("link", name="Find its captions").click()
    expect(page.get_by_role("heading", name="Like row 5 of test")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("24 results of 32 captions.")
    text.write_bytes(b"no image")
    expected.append("409")  # Chromium notes each answer that is a refusal
    page.locator("#file").set_input_files(text)
    expect(page.get_by_role("alert")).to_contain_text("it is no image that can be read")


def test_a_hostile_caption_is_only_text(page: Page, address: str, expected: list[str]) -> None:
    page.goto(f"{address}#/search?split=test&row={BROKEN + 1}")
    expect(page.locator(".card .words").first).to_have_text(HOSTILE)
    page.locator(".card").first.click()
    expect(page.get_by_role("dialog").get_by_role("heading", name="bold")).to_have_text(HOSTILE)
    assert page.locator("main b, .row-dialog h2 > *").count() == 0
    assert page.title() == "Search · tiny · SAIL explore"
    expected.append("Content Security Policy")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'x = 1'}))"
    )
    assert page.evaluate("typeof x") == "undefined"


def test_everything_can_be_done_with_the_keyboard_alone(page: Page) -> None:
    keys = page.keyboard
    expect(page.locator(".card").first).to_be_visible()
    keys.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    keys.press("Enter")
    keys.press("Tab")
    expect(page.get_by_label("What to search for")).to_be_focused()
    keys.type("a red circle")
    keys.press("Enter")
    expect(page.get_by_role("status")).to_have_text("15 results of 15 images.")
    expect(page.get_by_label("What to search for")).to_be_focused()
    cards = page.locator(".card")
    for _ in range(6):  # an image, the button, the kind, the split, the score, and then
        keys.press("Tab")
    expect(cards.first).to_be_focused()
    keys.press("ArrowRight")
    expect(cards.nth(1)).to_be_focused()
    keys.press("ArrowDown")
    expect(cards.nth(7)).to_be_focused()
    keys.press("End")
    expect(cards.last).to_be_focused()
    keys.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.get_by_role("button", name="Close")).to_be_focused()
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(cards.last).to_be_focused()


def test_the_tab_that_is_entered_keeps_the_focus(page: Page) -> None:
    tab = page.get_by_role("link", name="Store")
    tab.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Store")).to_be_visible()
    expect(tab).to_be_focused()


PAINTED = """async (canvas) => {  // pixels, when what was asked for is drawn
  for (const _ of [1, 2]) await new Promise(requestAnimationFrame);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.reduce((sum, value, i) => sum + (i % 4 === 3 && value > 0), 0);
}"""


def test_the_map_is_drawn_and_looked_into_by_keys(page: Page, address: str) -> None:
    page.goto(f"{address}#/map")
    canvas = page.get_by_role("application", name="Map of 15 images and 16 captions")
    expect(canvas).to_be_visible()
    all_points = canvas.evaluate(PAINTED)
    assert all_points > 31
    page.get_by_role("checkbox", name="captions").uncheck()
    assert 0 < canvas.evaluate(PAINTED) < all_points
    canvas.focus()
    page.keyboard.press("n")
    expect(page.locator(".tip")).to_contain_text("image row")
    expect(page.get_by_role("status")).to_contain_text("image row")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Nearest of 15 images")
    page.keyboard.press("Escape")
    expect(canvas).to_be_focused()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")  # until nothing is left in sight
    for _ in range(12):
        page.keyboard.press("+")
    assert canvas.evaluate(PAINTED) == 0
    page.keyboard.press("0")
    assert canvas.evaluate(PAINTED) > 0


def test_the_map_tells_of_the_point_under_the_pointer(page: Page, address: str) -> None:
    page.goto(f"{address}#/map")
    canvas, told = page.locator("canvas"), page.locator(".tip")
    said = told.locator("div")
    canvas.focus()
    page.keyboard.press("n")
    expect(told).to_be_visible()
    words, place = said.inner_text(), "tip => [+tip.dataset.x, +tip.dataset.y]"
    x, y = told.evaluate(place)
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    expect(told).to_be_hidden()
    page.mouse.move(box["x"] + x, box["y"] + y)
    expect(said).to_have_text(words, use_inner_text=True)
    page.mouse.wheel(0, -600)
    page.mouse.move(box["x"] + x + 1, box["y"] + y)
    expect(said).to_have_text(words, use_inner_text=True)  # it stays under the pointer
    page.mouse.click(box["x"] + x, box["y"] + y)
    expect(page.get_by_role("dialog")).to_be_visible()


def test_the_rows_behind_a_number_are_as_many_as_went_wrong(page: Page, address: str) -> None:
    page.goto(f"{address}#/results")
    button = page.get_by_role("button", name="Rows that went wrong: top1")
    score = page.get_by_role("row", name="top1 test").first.get_by_role("cell").first.inner_text()
    wrong = round(15 * (1 - float(score.split()[0]) / 100))
    button.click()
    rows = page.get_by_role("region", name="Rows that went wrong")
    expect(rows).to_contain_text(f"{wrong} of 15 went wrong")
    expect(rows.locator(".card")).to_have_count(wrong)
    expect(rows).to_contain_text("taken for")
    page.locator(".mistakes button").first.click()
    expect(rows.get_by_role("heading")).to_contain_text("taken for")


def test_curves_grow_while_training_goes_on(page: Page, address: str, run: Path) -> None:
    page.goto(f"{address}#/training")
    expect(page.get_by_role("img", name="Loss. loss, at step")).to_be_visible()
    with (run / "align" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4321, "epoch": 9.0, "loss": 0.125}) + "\n")
    expect(page.get_by_role("img", name="at step 4321, is 0.125")).to_be_visible()
    expect(page.get_by_role("main")).to_contain_text("step 4,321")
    expect(page.get_by_role("status")).to_have_text("Training is under way.")


def test_quarantined_rows_are_listed_with_reason_and_key(page: Page, address: str) -> None:
    page.goto(f"{address}#/store?split=test")
    panel = page.get_by_role("region", name="image/vit")
    expect(panel).to_contain_text("1 truncated image")
    panel.get_by_text("Show the 1 quarantined row").click()
    row = panel.get_by_role("row", name="truncated image")
    expect(row).to_contain_text(f"test-0/{1000 + BROKEN:05d}")
    row.get_by_role("button").click()
    expect(page.get_by_role("dialog")).to_contain_text("The image cannot be shown: ")
    expect(page.get_by_role("link", name="Search by this image")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator(".pair").first).to_be_visible()
    page.get_by_label("split").select_option("train")
    expect(page.get_by_role("main")).to_contain_text("48 rows")


@pytest.mark.parametrize(
    ("made", "view", "heading", "command"),
    [
        ([], "search", "Nothing is encoded yet", "extract"),
        ([], "map", "Nothing is encoded yet", "extract"),
        ([], "store", "Nothing is encoded yet", "extract"),
        (["features"], "search", "There is no trained head yet", "align"),
        (["features"], "search?text=a+star", "There is no trained head yet", "align"),
        (["features"], "map", "There is no trained head yet", "align"),
        (["features"], "training", "Training has made no step yet", "align"),
        (["features", "align"], "results", "This run is not evaluated yet", "eval"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "nothing",
)
def test_a_stage_that_was_not_run_is_no_error_and_its_command_is_there(
    browser: Browser,
    run: Path,
    tmp_path: Path,
    made: list[str],
    view: str,
    heading: str,
    command: str,
) -> None:
    for name in ("config.toml", "index", *made):
        (tmp_path / name).symlink_to(run / name)
    with served(tmp_path) as address:
        page = browser.new_context().new_page()
        page.goto(f"{address}#/{view}")
        note = page.locator(".note")
        expect(note.get_by_role("heading")).to_have_text(heading)
        expect(note.locator("code")).to_have_text(f"sail {command} {tmp_path / 'config.toml'}")
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
        expect(page.get_by_role("alert")).to_have_count(0)
        page.context.close()


def test_the_theme_is_the_systems_until_another_is_chosen(page: Page) -> None:
    shade = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(shade)
    page.get_by_role("button", name="Change between light and dark").click()
    dark = page.evaluate(shade)
    assert dark != light
    page.reload()
    assert page.evaluate(shade) == dark
    page.get_by_role("button", name="Change between light and dark").click()
    assert page.evaluate(shade) == light


def test_the_token_of_the_address_opens_the_page_and_leaves_the_address(
    browser: Browser, run: Path
) -> None:
    with served(run, host="0.0.0.0") as address:
        visitor = browser.new_context().new_page()
        visitor.goto(address)
        expect(visitor.get_by_role("heading", name="A look into test")).to_be_visible()
        assert visitor.url == address.partition("?")[0]
        stranger = browser.new_context().new_page()
        stranger.goto(visitor.url)
        expect(stranger.locator("body")).to_contain_text("The token is missing or wrong")
        for page in (visitor, stranger):
            page.context.close()
