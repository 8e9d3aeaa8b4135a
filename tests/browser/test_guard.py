"""What the other tests lean on: a page that asks elsewhere or complains is noticed, and the policy stops it."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.browsing import DESKTOP, open_page


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("fetch('http://127.0.0.2:9/').catch(() => {})", "Content Security Policy"),
        (
            "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.2:9/a.png'}))",
            "Content Security Policy",
        ),
        ("document.body.setAttribute('onclick', '1'), document.body.click()", "Content Security Policy"),
        ("console.error('made up')", "made up"),
        ("setTimeout(() => { throw new Error('made up') })", "made up"),
    ],
    ids=["fetch", "image", "inline", "console", "exception"],
)
def test_it_is_noticed(browser: Browser, service: str, script: str, fault: str) -> None:
    faults: list[str] = []
    with open_page(browser, service, DESKTOP, "light", faults) as page:
        expect(page.locator("#state")).to_contain_text("Ready")
        assert faults == []
        page.evaluate(f"() => {{ {script} }}")
        page.wait_for_timeout(200)
    assert any(fault in each for each in faults), faults
