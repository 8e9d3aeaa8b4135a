"""Pages of other origins: none may ask, unless the operator names them."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from service.app import create_app
from service.settings import Settings
from tests.service import pictures
from tests.service.fakes import FakeCaptioner
from tests.service.running import running, until_ready

pytestmark = pytest.mark.anyio

URL = "/v1/caption"
OURS = {"Origin": "https://a.org"}
WISH = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key, content-type"}
KEY = {"X-API-Key": "correct-horse"}


@pytest.fixture
def app(settings: Settings, captioner: FakeCaptioner, quick_stop: None) -> FastAPI:
    more = {"cors_origins": "https://a.org, http://localhost:3000", "api_keys": SecretStr("robot:correct-horse")}
    return create_app(settings.model_copy(update=more), load=lambda: captioner)


async def test_a_page_that_may_asks_first_and_needs_no_key_for_that(client: httpx.AsyncClient) -> None:
    for origin in ("https://a.org", "http://localhost:3000"):
        response = await client.options(URL, headers={**WISH, "Origin": origin})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "X-API-Key" in response.headers["access-control-allow-headers"]
    response = await client.options(URL, headers={**WISH, "Origin": "https://b.org"})
    assert "access-control-allow-origin" not in response.headers


async def test_its_answers_can_be_read_problems_too(client: httpx.AsyncClient) -> None:
    good = await client.post(URL, content=pictures.jpeg(), headers={**OURS, **KEY})
    for response, status in ((good, 200), (await client.post(URL, content=b"", headers=OURS), 401)):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://a.org"
        assert "X-Request-ID" in response.headers["access-control-expose-headers"]
        assert response.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in response.headers
    other = await client.post(URL, content=pictures.jpeg(), headers={"Origin": "https://b.org", **KEY})
    assert "access-control-allow-origin" not in other.headers


async def test_every_page_may_where_that_is_said(settings: Settings, quick_stop: None) -> None:
    app = create_app(settings.model_copy(update={"cors_origins": "*"}), load=FakeCaptioner)
    async with running(app) as client:
        await until_ready(client)
        response = await client.post(URL, content=pictures.jpeg(), headers=OURS)
        assert response.headers["access-control-allow-origin"] == "*"


async def test_by_default_none_may(settings: Settings, quick_stop: None) -> None:
    async with running(create_app(settings, load=FakeCaptioner)) as client:
        await until_ready(client)
        response = await client.options(URL, headers={**OURS, **WISH})
        assert response.status_code == 405
        assert not [name for name in response.headers if name.startswith("access-control")]
        response = await client.post(URL, content=pictures.jpeg(), headers=OURS)
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("access-control")]
