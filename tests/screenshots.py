"""Takes the pictures of docs/explore: every view of `sail explore` over the demo run.

    make demo
    python -m tests.screenshots [runs/demo]

Call it where the run was made: the index of the demo has its shards relative to that folder.

Needs Chromium. The pictures are made smaller and of 256 colours, so that each stays below 150 kB.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.explored import CHROMIUM, served

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "explore"
WINDOW = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
WIDTHS = (1080, 1000, 940, 880, 820)  # the largest that is small enough in bytes
MOST_BYTES = 150_000
ALL_IN_SIGHT = """
() => [...document.images].every(
  (each) => each.complete || each.getBoundingClientRect().top > innerHeight
)
"""
QUESTION = "#/search?split=test&text=a+striped+red+heart"


def main() -> None:
    """Serve the run, and take all pictures in both themes, and some on a phone."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    FOLDER.mkdir(exist_ok=True)
    with served(run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            page = opened(browser, theme, WINDOW)
            for name, (place, act) in VIEWS.items():
                take(page, address + place, act, FOLDER / f"{name}-{theme}.png")
        page = opened(browser, "light", PHONE)
        for name in ("search", "results"):
            place, act = VIEWS[name]
            take(page, address + place, act, FOLDER / f"{name}-phone.png")
        browser.close()


def opened(browser: Browser, theme: str, window: dict[str, int]) -> Page:
    """Return a page of a size and a theme."""
    settings = {"color_scheme": theme, "viewport": window, "reduced_motion": "reduce"}
    return browser.new_context(**settings).new_page()  # type: ignore[arg-type]


def take(page: Page, address: str, act: Callable[[Page], None], path: Path) -> None:
    """Open a place, act there, and write a picture of it.

    Raises:
        SystemExit: It is too large.
    """
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_load_state("networkidle")
    act(page)
    page.wait_for_function(ALL_IN_SIGHT)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        whole = image.convert("RGB")
    for width in WIDTHS:
        content = as_png(whole, min(width, whole.width))
        if len(content) <= MOST_BYTES:
            path.write_bytes(content)
            print(f"{path.name}: {len(content):,} bytes")  # noqa: T201
            return
    raise SystemExit(f"{path} would have {len(content):,} bytes, more than {MOST_BYTES:,}")


def as_png(image: Image.Image, width: int) -> bytes:
    """Return a picture of a width in 256 colours that are chosen for it."""
    size = (width, round(image.height * width / image.width))
    small = image.resize(size, Image.Resampling.LANCZOS)
    reduced = small.quantize(256, kmeans=2, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    reduced.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def nothing(page: Page) -> None:
    """Leave the view as it opens."""


def open_a_row(page: Page) -> None:
    """Open the first result."""
    page.locator(".card").first.click()
    page.locator(".near .card").first.wait_for()


def point_at_a_caption(page: Page) -> None:
    """Have the map tell of a point."""
    page.locator("canvas").focus()
    page.keyboard.press("n")
    page.locator(".tip").wait_for()
    page.locator("canvas").blur()


def show_failures(page: Page) -> None:
    """Open the failures behind the first number."""
    page.locator(".mistakes button").first.click()
    page.locator(".failures .card").first.wait_for()


VIEWS: dict[str, tuple[str, Callable[[Page], None]]] = {
    "search": (QUESTION, nothing),
    "row": (QUESTION, open_a_row),
    "map": ("#/map?split=test", point_at_a_caption),
    "results": ("#/results", nothing),
    "failures": ("#/results", show_failures),
    "training": ("#/training", nothing),
    "store": ("#/store?split=test", nothing),
}


if __name__ == "__main__":
    main()
