"""Takes the pictures of the playground for the documentation: `python -m tests.browser.screenshots`."""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, expect

from service.app import create_app
from service.settings import Settings
from tests.browser.browsing import DESKTOP, PHONE, browser_of, open_page
from tests.service.over_sockets import serving

IMAGES = Path(__file__).parents[2] / "docs" / "images"
PICTURES = (("desktop", DESKTOP, "light"), ("phone", PHONE, "dark"))


def main() -> None:
    with serving(create_app(Settings(port=0))) as address, browser_of() as browser:
        for name, size, scheme in PICTURES:
            faults: list[str] = []
            with open_page(browser, address, size, scheme, faults) as page:
                take(page, IMAGES / f"playground-{name}.png", whole=size == DESKTOP)
            if faults:
                sys.exit("\n".join(faults))


def take(page: Page, path: Path, whole: bool) -> None:
    """One picture: a caption, a word under the pointer, and on a wide screen the comparison."""
    expect(page.locator("#state")).to_contain_text("Ready", timeout=60_000)
    page.get_by_label("Brighten where").check()
    page.get_by_role("button", name="A man with a camera").click()
    expect(page.locator("#facts div").first).to_be_visible()
    if whole:
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#speeds .ms")).to_have_count(4)
    else:
        page.get_by_role("heading", name="Caption", exact=True).scroll_into_view_if_needed()
        page.evaluate("document.querySelector('#caption-title').scrollIntoView()")
    page.locator("#words .word").nth(6).hover()
    if not whole:
        page.screenshot(path=path)
        return
    end = page.locator("#compared").evaluate("part => part.getBoundingClientRect().bottom + scrollY")
    width, _ = DESKTOP
    page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": end + 16})


if __name__ == "__main__":
    main()
