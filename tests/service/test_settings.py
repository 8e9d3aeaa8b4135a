"""Settings come from `DEECAP_...`, and a mistake in them is told in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, shipped_bundle


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
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert says in str(caught.value)


def test_what_kubernetes_adds_for_a_service_is_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEECAP_SERVICE_HOST", "DEECAP_SERVICE_PORT_HTTP", "DEECAP_PORT_80_TCP_ADDR"):
        monkeypatch.setenv(name, "10.0.0.1")
    assert Settings.load().port == 8000


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
