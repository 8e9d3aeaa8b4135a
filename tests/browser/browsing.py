"""Chromium driven by Playwright: a browser, and pages that note what goes wrong in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from playwright.sync_api import Browser, Page, sync_playwright

DESKTOP, PHONE = (1280, 900), (390, 844)
# The browser's own line for any answer that is no 2xx; the page itself says it better, which the tests look at.
ANSWERED = "Failed to load resource: the server responded with a status of"


class Opener(Protocol):
    """The fixture `visit`."""

    def __call__(self, address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Page: ...


@contextmanager
def browser_of() -> Iterator[Browser]:
    """Debian's Chromium, which is Playwright's own neither in name nor in place."""
    with sync_playwright() as playwright:
        # Containers run as root, and Chromium's sandbox does not.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, address: str, size: tuple[int, int], scheme: str, faults: list[str]) -> Iterator[Page]:
    """The page at `address`. What it complains of, and what it asks of other hosts, is added to `faults`."""
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.set_default_timeout(15_000)
    own = address.split("/", 3)[:3]
    page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
    page.on(
        "console",
        lambda said: (
            faults.append(f"{said.type}: {said.text}")
            if said.type in ("error", "warning") and not said.text.startswith(ANSWERED)
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            faults.append(f"asked {request.url}")
            if not request.url.startswith(("blob:", "data:")) and request.url.split("/", 3)[:3] != own
            else None
        ),
    )
    page.goto(address)
    yield page
    context.close()


def choose(page: Page, content: bytes, name: str = "photo.jpg", kind: str = "image/jpeg") -> None:
    """Chooses this as the photo, as from the dialogue for files."""
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def words_of(page: Page) -> list[tuple[str, str]]:
    """Text and number of each word that the page shows."""
    shown = page.locator("#words .word").all()
    return [(word.locator("span").inner_text(), word.locator("small").inner_text()) for word in shown]


def has_focus(page: Page) -> str:
    """The id of the element that has the focus; "" where it has none or nothing has it."""
    found: str = page.evaluate("document.activeElement?.id ?? ''")
    return found


def drop(page: Page, content: bytes, name: str, selector: str = "#drop", event: str = "drop") -> None:
    """Drops (or, with the event `paste`, pastes) this file."""
    page.evaluate(
        """([content, name, selector, event]) => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(content)], name, { type: "image/jpeg" }));
            const made = event === "paste"
                ? new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true })
                : new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true });
            document.querySelector(selector).dispatchEvent(made);
        }""",
        [list(content), name, selector, event],
    )
