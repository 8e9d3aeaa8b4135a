"""Settings come from `DEECAP_...`, and a mistake in them is told in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, shipped_bundle
from service.settings_docs import settings_table

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_defaults() -> None:
    settings = Settings.load()
    assert settings.bundle == shipped_bundle()
    assert settings.bundle.parts[-3:] == ("model", "bundles", "deecap-flickr8k")
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "auto")


def test_the_environment_and_what_stands_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEECAP_PORT", "9000")
    monkeypatch.setenv("DEECAP_BUNDLE", "/some/where")
    monkeypatch.setenv("DEECAP_MAX_PIXELS", "4000")
    assert Settings.load() == Settings.load(port=None)
    assert Settings.load().port == 9000
    assert Settings.load().bundle == Path("/some/where")
    assert Settings.load(port=9001, host="::").port == 9001


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DEECAP_PROT", "9000", "DEECAP_PROT is no setting; the nearest is DEECAP_PORT"),
        ("DEECAP_MAX_PIXEL", "9000", "the nearest is DEECAP_MAX_PIXELS"),
        ("DEECAP_PORT", "many", "DEECAP_PORT: "),
        ("DEECAP_PORT", "70000", "DEECAP_PORT: "),
        ("DEECAP_PORT", "tcp://10.0.0.1:80", "enableServiceLinks"),
        ("DEECAP_DEVICE", "tpu", "DEECAP_DEVICE: "),
        ("DEECAP_QUEUE_DEPTH", "0", "DEECAP_QUEUE_DEPTH: "),
        ("DEECAP_BROKER", "rabbitmq://host", "DEECAP_BROKER: "),
        ("DEECAP_BROKER", "redis://host:many", "DEECAP_BROKER: is no address"),
        ("DEECAP_REDIS_CACHE", "localhost", "DEECAP_REDIS_CACHE: "),
        ("DEECAP_QUEUE", "a b", "DEECAP_QUEUE: "),
        ("DEECAP_WORKER_TIMEOUT_S", "0.9", "DEECAP_WORKER_TIMEOUT_S: "),
        ("DEECAP_TARGET_WAIT_MS", "0", "DEECAP_TARGET_WAIT_MS: "),
        ("DEECAP_LOG_LEVEL", "loud", "DEECAP_LOG_LEVEL: "),
        ("DEECAP_OPEN_PROBES", "perhaps", "DEECAP_OPEN_PROBES: "),
        ("DEECAP_CORS_ORIGINS", "https://a.org,b.org", "b.org is no origin"),
        ("DEECAP_CORS_ORIGINS", "https://a.org/", "https://a.org/ is no origin"),
        ("DEECAP_MAX_UPLOADS_BYTES", "19000000", "DEECAP_MAX_UPLOADS_BYTES: must be 64000000 at least"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert says in str(caught.value)


def test_all_mistakes_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEECAP_PROT", "DEECAP_WORKER", "DEECAP_MAX_PIXEL", "DEECAP_PORT", "DEECAP_QUEUE_DEPTH"):
        monkeypatch.setenv(name, "many")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    for says in ("DEECAP_PROT is no", "DEECAP_WORKER is no", "DEECAP_MAX_PIXEL is no", "DEECAP_PORT: ", "DEPTH: "):
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("broker", "cache"),
    [
        ("redis://queue:6379/0", "redis://queue:6379/0"),
        ("redis://queue", "redis://:secret@QUEUE:6379/1?max_connections=3"),
        ("rediss://user:secret@queue:6380/0", "rediss://queue:6380"),
        ("redis://localhost/0", "redis://127.0.0.1:6379/2"),
    ],
)
def test_the_cache_must_not_share_the_queues_memory(broker: str, cache: str) -> None:
    with pytest.raises(SettingsError, match="DEECAP_REDIS_CACHE: must not be the Redis of DEECAP_BROKER") as caught:
        Settings.load(broker=broker, redis_cache=cache)
    assert "secret" not in str(caught.value)


def test_another_instance_is_good_for_a_cache() -> None:
    for broker, cache in (
        ("redis://queue:6379/0", "redis://cache:6379/0"),
        ("redis://queue:6379/0", "redis://queue:6380/0"),
        ("memory", "redis://queue:6379/0"),
    ):
        assert Settings.load(broker=broker, redis_cache=cache).redis_cache == cache


def test_what_kubernetes_adds_for_a_service_is_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEECAP_SERVICE_HOST", "DEECAP_SERVICE_PORT_HTTP", "DEECAP_PORT_80_TCP_ADDR"):
        monkeypatch.setenv(name, "10.0.0.1")
    assert Settings.load().port == 8000


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_what_is_shown_of_the_settings_has_no_secret_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEECAP_API_KEYS", "robot:correct-horse")
    monkeypatch.setenv("DEECAP_BROKER", "redis://user:cor%40rect@queue:6380/1?password=correct&db=2")
    monkeypatch.setenv("DEECAP_REDIS_CACHE", "rediss://:correct@cache")
    settings = Settings.load()
    shown = settings.redacted()
    assert "correct" not in str(shown) + repr(settings.api_keys)
    assert "cor%40rect" not in str(shown)
    assert shown["DEECAP_BROKER"] == "redis://user:***@queue:6380/1?password=***&db=2"
    assert shown["DEECAP_REDIS_CACHE"] == "rediss://:***@cache"
    assert shown["DEECAP_API_KEYS_FILE"] == ""
    assert shown["DEECAP_PORT"] == "8000"
    assert set(shown) == {"DEECAP_" + name.upper() for name in Settings.model_fields}


def test_an_address_without_a_password_is_shown_as_it_is() -> None:
    assert Settings.load(broker="redis://queue:6379/0").redacted()["DEECAP_BROKER"] == "redis://queue:6379/0"


def test_empty_means_none_where_a_deployment_sets_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEECAP_API_KEYS", "DEECAP_API_KEYS_FILE", "DEECAP_REDIS_CACHE"):
        monkeypatch.setenv(name, "")
    assert Settings.load() == Settings()


def test_the_page_of_settings_is_the_one_that_is_generated() -> None:
    again = "run: python -m service.settings_docs > docs/settings.md"
    assert PAGE.read_text() == settings_table(), again


def test_the_page_names_every_setting_once_with_its_default() -> None:
    page = settings_table()
    for name in Settings.model_fields:
        assert page.count(f"| `DEECAP_{name.upper()}` |") == 1
    assert "| `DEECAP_QUEUE_DEPTH` | whole number | `64` |" in page
    assert "| `DEECAP_LOG_FORMAT` | `auto`, `json`, `text` | `auto` |" in page
    assert "| `DEECAP_API_KEYS` | secret |  |" in page
    assert "| `DEECAP_OPEN_PROBES` | true or false | `true` |" in page
