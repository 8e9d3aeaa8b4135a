"""The pages as they are sent: light, closed to the outside, cached as they should be, whole in the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.app import create_app
from service.routes.home import page_files
from service.settings import Settings
from tests.service.fakes import FakeBroker

ROOT = Path(__file__).parents[2]
WEB = ROOT / "service" / "web"
NAMES = [path.relative_to(WEB).as_posix() for path in sorted(WEB.rglob("*")) if path.is_file()]
MOST_BYTES = 150_000


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(Settings(), broker=FakeBroker()))


@pytest.mark.parametrize("address", ["/", "/docs", *(f"/web/{name}" for name in NAMES)])
def test_a_file_is_sent_once_and_then_only_asked_after(client: TestClient, address: str) -> None:
    first = client.get(address)
    assert first.status_code == 200
    assert first.headers["content-length"] == str(len(first.content))
    assert first.headers["x-content-type-options"] == "nosniff"
    photo = address.endswith(".jpg")
    assert first.headers["cache-control"] == ("public, max-age=86400" if photo else "no-cache")
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = client.get(address, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert client.get(address, headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(address)
    assert (head.status_code, head.headers["etag"], head.content) == (200, first.headers["etag"], b"")


def test_the_pages_may_load_nothing_from_elsewhere_and_run_nothing_inline(client: TestClient) -> None:
    for address in ("/", "/docs"):
        policy = dict(part.split(" ", 1) for part in client.get(address).headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        text = client.get(address).text
        assert re.findall(r"<script(?![^>]* src=)|<style| on\w+=| style=", text) == []
    for name in NAMES:
        if name.endswith((".html", ".css", ".js")):
            links = re.findall(r"https?://(?!127\.0\.0\.1|www\.w3\.org/2000/svg)[^\s\"'`)]+", (WEB / name).read_text())
            assert links == [], name


def test_what_the_pages_name_is_there(client: TestClient) -> None:
    for name in NAMES:
        if name.endswith((".html", ".js")):
            text = (WEB / name).read_text()
            for link in re.findall(r'(?:src|href)="(web/[^"]+)"', text):
                assert client.get(f"/{link}").status_code == 200, link
            for link in re.findall(r'from "\./([^"]+)"', text):
                assert client.get(f"/web/{link}").status_code == 200, link


def test_a_page_weighs_little_without_its_photos() -> None:
    weight = sum(len(file.content) for name, file in page_files().items() if not name.startswith("samples/"))
    assert 10_000 < weight < MOST_BYTES


def test_nothing_but_the_pages_files_is_sent(client: TestClient) -> None:
    for address in ("/web/", "/web/none.js", "/web/../routes/home.py", "/web/%2e%2e/routes/home.py", "/web/samples"):
        assert client.get(address).status_code == 404, address


def test_no_key_is_needed_to_see_the_pages() -> None:
    client = TestClient(create_app(Settings(api_keys="correct-horse-battery"), broker=FakeBroker()))
    assert client.get("/v1/speeds").status_code == 401
    for address in ("/", "/docs", "/web/style.css", "/openapi.json"):
        assert client.get(address).status_code == 200


def test_the_package_has_them_all() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    packed = {path for pattern in data for path in (ROOT / "service").glob(pattern) if path.is_file()}
    assert {WEB / name for name in NAMES} <= packed


def test_the_samples_are_small_and_accounted_for() -> None:
    table = (WEB / "samples" / "README.md").read_text()
    photos = sorted((WEB / "samples").glob("*.jpg"))
    assert {path.name for path in photos} == {path.name for path in (ROOT / "samples").glob("*.jpg")}
    for path in photos:
        assert path.stat().st_size < 30_000
        with Image.open(path) as photo:
            assert max(photo.size) == 320
            assert not photo.getexif()
        assert f"| `{path.name}` |" in table
