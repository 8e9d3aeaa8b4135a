"""The site of the documentation: built strictly, every link and picture there, nothing loaded from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import markdown
import pytest

from service.api_reference import api_reference
from tests.docs.blocks import PAGES, ROOT

DOCS = ROOT / "docs"


class Page(HTMLParser):
    """What a page links to (`links`), loads (`loads`), and its anchors (`ids`)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site_and_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    written = {path.relative_to(site).with_suffix(".md").as_posix() for path in pages}
    assert written == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link not in page.loads, f"{path.name} loads {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {"__skip"}, f"{path.name}: {link}"


@cache
def anchors(path: Path) -> set[str]:
    """The anchors that the site gives the headings of a page."""
    return Page(markdown.markdown(path.read_text(), extensions=["fenced_code", "tables", "toc"])).ids


def test_the_links_of_readme_and_pages_lead_somewhere() -> None:
    fragments = 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = page.parent / parts.path if parts.path else page
            assert target.exists(), f"{page.name}: {link}"
            if parts.fragment and target.suffix == ".md":
                fragments += 1
                assert parts.fragment in anchors(target), f"{page.name}: {link}"
    assert fragments > 5


def test_every_picture_says_what_it_shows() -> None:
    for page in PAGES:
        assert re.findall(r"!\[\]\(", page.read_text()) == [], page.name


def test_the_reference_is_that_of_the_code() -> None:
    told = (DOCS / "api-reference.md").read_text()
    assert told == api_reference().rstrip() + "\n", "run: python -m service.api_reference > docs/api-reference.md"
