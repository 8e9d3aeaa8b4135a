"""API keys and quotas: who has one gets in, nobody learns another's, and what is open stays open."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from service.app import create_app
from service.broker.base import QueueFullError
from service.keys import Quota, read_keys
from service.settings import Settings, SettingsError
from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import FakeBroker, FakeCaptioner
from tests.service.running import running, until_ready

JPEG = pictures.jpeg()
B64 = base64.b64encode(JPEG).decode()
URL = "/v1/caption"
KEYS = "robot:correct-horse, battery-staple"


def with_keys(text: str, **more: object) -> Settings:
    return Settings(api_keys=SecretStr(text), **more)


def test_keys_have_names() -> None:
    keys = read_keys(with_keys(KEYS))
    assert keys.find("correct-horse") == "robot"
    assert keys.find("battery-staple") == f"key-{hashlib.sha256(b'battery-staple').hexdigest()[:8]}"
    for wrong in ("", "correct-hors", "correct-horse ", "CORRECT-HORSE", "robot:correct-horse", "é\udcff"):
        assert keys.find(wrong) is None, wrong
    assert not read_keys(Settings())


def test_a_key_keeps_its_name_when_one_before_it_is_taken_out() -> None:
    """Jobs belong to the name."""
    before, after = read_keys(with_keys("correct-horse,battery-staple")), read_keys(with_keys("battery-staple"))
    assert after.find("battery-staple") == before.find("battery-staple") != before.find("correct-horse")


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the lab\n\n  lab:key,with,commas:and:colons  \n")
    keys = read_keys(with_keys("robot:correct-horse", api_keys_file=file))
    assert keys.find("key,with,commas:and:colons") == "lab"
    assert keys.find("correct-horse") == "robot"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("short", "8 or more"),
        ("robot:short", "8 or more"),
        ("robot:with spaces in it", "plain ASCII"),
        ("two words:correct-horse", "a name is"),
        (":correct-horse", "a name is"),
        ("a:correct-horse,a:battery-staple", "twice"),
        ("a:correct-horse,b:correct-horse", "twice"),
    ],
)
def test_keys_that_are_none_are_refused_and_not_shown(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        read_keys(with_keys(text))
    assert "horse" not in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_is_empty_leaves_nobody_in(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="DEECAP_API_KEYS_FILE"):
        read_keys(Settings(api_keys_file=tmp_path / "none"))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(SettingsError, match="everybody"):
        read_keys(Settings(api_keys_file=tmp_path / "empty"))


def test_every_key_is_compared_in_constant_time_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr("service.keys.hmac.compare_digest", spy)
    keys = read_keys(with_keys("a:aaaaaaaa,b:bbbbbbbb,c:cccccccc"))
    for presented, name in (("aaaaaaaa", "a"), ("cccccccc", "c"), ("x", None), ("x" * 9999, None)):
        compared.clear()
        assert keys.find(presented) == name
        assert len(compared) == 3
        assert {len(side) for pair in compared for side in pair} == {32}  # digests: the length tells nothing either


def test_a_quota_refills_evenly_and_saves_up_a_minute() -> None:
    now = 0.0
    quota = Quota(6, clock=lambda: now)
    assert [quota.take("a") for _ in range(6)] == [0] * 6
    assert quota.take("a") == 10  # one in ten seconds
    assert quota.take("b") == 0  # has its own
    now = 4.0
    assert quota.take("a") == 6
    now = 10.0
    assert [quota.take("a"), quota.take("a")] == [0, 10]
    now = 10_000.0
    assert [quota.take("a") for _ in range(6)] == [0] * 6
    assert quota.take("a") == 10


def test_several_at_once_and_more_than_a_whole_minute() -> None:
    now = 0.0
    quota = Quota(6, clock=lambda: now)
    assert quota.take("a", 4) == 0
    assert quota.take("a", 4) == 20
    assert quota.take("a", 2) == 0
    now = 60.0
    assert quota.take("a", 12) == 0  # a full bucket pays for it, and is in debt
    now = 120.0
    assert quota.take("a") == 10


@pytest.mark.parametrize("per_minute", [1, 2, 3, 4, 59, 997])
def test_who_waits_as_long_as_it_was_told_is_served(per_minute: int) -> None:
    """Whatever is lost in adding fractions up."""
    now = 0.1
    quota = Quota(per_minute, clock=lambda: now)
    for count in [1] * 60 + [3, per_minute, 2 * per_minute, 2, per_minute + 1, 5]:
        if pause := quota.take("a", count):
            now += pause
            assert quota.take("a", count) == 0, (count, pause)


def test_what_is_given_back_can_be_taken_again_and_no_more() -> None:
    quota = Quota(6, clock=lambda: 0.0)
    assert quota.take("a", 4) == 0
    quota.give_back("a", 3)
    assert [quota.take("a", 5), quota.take("a")] == [0, 10]
    quota.give_back("a", 100)
    assert [quota.take("a", 6), quota.take("a")] == [0, 10]
    quota.give_back("b", 1)  # had taken none
    assert [quota.take("b", 6), quota.take("b")] == [0, 10]


def test_without_a_quota_there_is_no_end() -> None:
    quota = Quota(0)
    assert {quota.take("a") for _ in range(1000)} == {0}


@pytest.mark.anyio
class TestOverHttp:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Authorization": "Bearer correct-horse"},
            {"Authorization": "bearer  correct-horse"},
            {"X-API-Key": "battery-staple"},
            {"X-API-Key": "battery-staple", "Authorization": "Basic Zm9vOmJhcg=="},
        ],
    )
    async def test_who_has_a_key_gets_in(
        self, captioner: FakeCaptioner, quick_stop: None, headers: dict[str, str]
    ) -> None:
        async with running(create_app(with_keys(KEYS), load=lambda: captioner)) as client:
            await until_ready(client)
            assert (await client.post(URL, content=JPEG, headers=headers)).status_code == 200
            assert (await client.get("/v1/speeds", headers=headers)).status_code == 200

    async def test_who_has_none_does_not(self, captioner: FakeCaptioner, quick_stop: None) -> None:
        async with running(create_app(with_keys(KEYS), load=lambda: captioner)) as client:
            await until_ready(client)
            for url in (URL, "/caption", "/nowhere", "/v1/caption/../livez/x"):
                response = await client.post(url, content=JPEG)
                assert_problem(response, 401, "unauthorized", "none in this request")
                assert response.headers["www-authenticate"] == 'Bearer realm="deecap"'
            for headers in ({"Authorization": "Bearer wrong-horse"}, {"X-API-Key": "x"}, {"Authorization": "Bearer"}):
                response = await client.get("/v1/speeds", headers=headers)
                assert_problem(response, 401, "unauthorized", "not known")
                assert response.headers["www-authenticate"] == 'Bearer realm="deecap", error="invalid_token"'
            assert_problem(await client.get("/v1/model", headers={"Authorization": "Basic x"}), 401, "unauthorized")

    async def test_what_is_open(self, captioner: FakeCaptioner, quick_stop: None) -> None:
        pages = ("/", "/docs", "/openapi.json", "/problems/unauthorized")
        probes = ("/livez", "/readyz", "/startupz", "/metrics")
        async with running(create_app(with_keys(KEYS), load=lambda: captioner)) as client:
            await until_ready(client)
            for url in pages + probes:
                assert (await client.get(url)).status_code == 200, url
            document = (await client.get("/openapi.json")).json()
            assert document["security"] == [{"bearer": []}, {"header": []}]
            assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
        async with running(create_app(with_keys(KEYS, open_probes=False), load=FakeCaptioner)) as client:
            for url in pages:
                assert (await client.get(url)).status_code == 200, url
            for url in probes:
                assert_problem(await client.get(url), 401, "unauthorized")
            assert (await client.get("/livez", headers={"X-API-Key": "battery-staple"})).status_code == 200

    async def test_a_quota_is_each_keys_own(self, captioner: FakeCaptioner, quick_stop: None) -> None:
        settings = with_keys(KEYS, quota_per_minute=2)
        robot, other = {"X-API-Key": "correct-horse"}, {"X-API-Key": "battery-staple"}
        async with running(create_app(settings, load=lambda: captioner)) as client:
            await until_ready(client)
            for _ in range(2):
                assert (await client.post(URL, content=JPEG, headers=robot)).status_code == 200
            response = await client.post(URL, content=JPEG, headers=robot)
            assert_problem(response, 429, "quota_exceeded", "2 captions per minute")
            assert 25 <= int(response.headers["retry-after"]) <= 30
            assert (await client.get("/v1/speeds", headers=robot)).status_code == 200  # costs nothing
            assert (await client.post(URL, content=JPEG, headers=other)).status_code == 200
            text = (await client.get("/metrics")).text
            assert 'deecap_rejections_total{reason="quota_exceeded"} 1.0' in text

    @pytest.mark.parametrize("route", ["/v1/captions", "/v2/models/deecap/infer"])
    async def test_many_at_once_are_charged_together(
        self, captioner: FakeCaptioner, quick_stop: None, route: str
    ) -> None:
        """Also more than a minute's; and who is refused is charged for none of them."""
        app = create_app(with_keys(KEYS, quota_per_minute=4), load=lambda: captioner)
        now = 0.0
        app.state.context.quota._clock = lambda: now

        async def ask(client: httpx.AsyncClient, count: int) -> httpx.Response:
            if route == "/v1/captions":
                return await client.post(route, files=[("images", ("a.jpg", JPEG))] * count)
            image = {"name": "image", "datatype": "BYTES", "shape": [count], "data": [B64] * count}
            return await client.post(route, json={"inputs": [image]})

        async with running(app) as client:
            client.headers["X-API-Key"] = "correct-horse"
            await until_ready(client)
            assert (await ask(client, 6)).status_code == 200
            told = []
            while (response := await ask(client, 3)).status_code == 429:
                told.append(int(response.headers["retry-after"]))
                assert len(told) < 4, "it was told to come back for ever"
                now += told[-1]
            assert response.status_code == 200
            assert told == [45, 30], "until there is one of them, since it was two in debt; and then the others"
            now += 45
            assert [(await ask(client, 4)).status_code for _ in range(3)] == [429] * 3
            assert (await ask(client, 3)).status_code == 200, "what was refused is charged"

    async def test_what_the_service_could_not_do_costs_nothing(self, settings: Settings) -> None:
        """Refused by the queue, when the body was there already; and at the head, for several photos at once."""
        broker = FakeBroker()
        broker.refuses = QueueFullError(3)
        settings = with_keys(KEYS, quota_per_minute=2)
        robot = {"X-API-Key": "correct-horse"}
        async with running(create_app(settings, broker=broker)) as client:
            await until_ready(client)
            for _ in range(5):
                assert_problem(await client.post(URL, content=JPEG, headers=robot), 503, "overloaded")
            two = [("images", ("a.jpg", JPEG)), ("images", ("b.jpg", pictures.encode(pictures.photo())))]
            for _ in range(3):  # told 200, with a 503 for each
                response = await client.post("/v1/captions", files=two, headers=robot)
                assert [each["status"] for each in response.json()["results"]] == [503, 503]
            for _ in range(3):
                events = {**robot, "Accept": "text/event-stream"}
                assert (await client.post(URL, content=JPEG, headers=events)).status_code == 503
            infer = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": [B64, B64]}]}
            for _ in range(3):
                response = await client.post("/v2/models/fake/infer", json=infer, headers=robot)
                assert response.status_code == 503, response.text
            for _ in range(2):  # what the client did wrong costs as ever
                assert_problem(await client.post(URL, content=b"x", headers=robot), 415, "not_an_image")
            assert_problem(await client.post(URL, content=JPEG, headers=robot), 429, "quota_exceeded")
            assert_problem(await client.post("/v1/captions", files=two, headers=robot), 429, "quota_exceeded")

    async def test_without_keys_a_quota_holds_nobody_back(self, captioner: FakeCaptioner, quick_stop: None) -> None:
        async with running(create_app(Settings(quota_per_minute=1), load=lambda: captioner)) as client:
            await until_ready(client)
            for headers in ({}, {"X-API-Key": "whatever"}, {}):
                response: httpx.Response = await client.post(URL, content=JPEG, headers=headers)
                assert response.status_code == 200
