"""axe-core finds nothing serious on the pages, in light and dark, on a phone and on a desk."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.browsing import DESKTOP, PHONE, Opener, choose
from tests.service import pictures


def findings(page: Page) -> list[str]:
    """What axe-core finds of impact serious or critical, and where."""
    violations = Axe().run(page).response["violations"]
    return [
        f"{each['id']} ({each['impact']}): {each['help']}: {[node['html'][:120] for node in each['nodes']][:3]}"
        for each in violations
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_playground(service: str, visit: Opener, size: tuple[int, int], scheme: str) -> None:
    page = visit(service, size, scheme)
    expect(page.locator("#state")).to_contain_text("Ready")
    assert findings(page) == []
    choose(page, pictures.jpeg())
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#speeds .ms")).to_have_count(4)
    page.get_by_label("Draw the regions").check()
    assert findings(page) == []
    choose(page, b"no photo")
    expect(page.get_by_role("alert")).to_be_visible()
    assert findings(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_apis_page(service: str, visit: Opener, scheme: str) -> None:
    page = visit(f"{service}/docs", PHONE, scheme)
    page.locator(".operation > summary").first.click()
    page.locator(".operation[open] details > summary").first.click()
    assert findings(page) == []


def test_it_does_find_what_is_wrong(service: str, visit: Opener) -> None:
    page = visit(service)
    expect(page.locator("#state")).to_contain_text("Ready")
    page.evaluate("document.querySelector('#compare').textContent = ''")
    page.evaluate("document.documentElement.lang = ''")
    assert len(findings(page)) == 2
