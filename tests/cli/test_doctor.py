"""`deecap doctor`: each check in plain words, and exit code 1 exactly when something must be mended."""

from __future__ import annotations

import socket

import pytest

from service.commands import doctor


@pytest.fixture
def sound(monkeypatch, captioner):
    """An installation where every check is good."""
    monkeypatch.setattr(doctor, "onnx_runtime", lambda: "onnxruntime 1.20.0")
    monkeypatch.setattr(doctor, "check_torch", lambda: doctor.Finding("OK", "2.13.0"))
    monkeypatch.setattr(doctor, "check_providers", lambda device: doctor.Finding("OK", "CPU"))


def findings(result):
    """Name of each check -> its status and words."""
    return {
        name: (line[:4].strip(), words)
        for line in result.stdout.splitlines()
        for name, words in [line[6:].split(": ", 1)]
    }


def test_a_sound_installation_passes(command, sound):
    result = command("doctor")
    found = findings(result)
    assert result.exit_code == 0
    assert list(found) == [
        "Python", "PyTorch", "ONNX Runtime", "broker", "settings", "providers", "bundle", "caption",
    ]  # fmt: skip
    assert {status for status, _ in found.values()} == {"OK"}
    assert "fake 0123456789ab" in found["bundle"][1]
    assert "full 1.00x, balanced 2.00x, fast 3.00x, turbo 4.00x" in found["bundle"][1]
    assert found["caption"][1].startswith('"width 512" for cameraman.jpg; look ')


def test_without_the_samples_the_canary_is_a_gradient(command, sound, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SAMPLE", tmp_path / "none.jpg")
    assert findings(command("doctor"))["caption"][1].startswith('"width 256" for a colour gradient')


def test_an_empty_caption_is_a_warning(command, sound, captioner, monkeypatch):
    describe = captioner.describe

    def silent(regions):
        caption = describe(regions)
        return type(caption)(caption.steps[-1:], caption.speed, caption.layers)

    monkeypatch.setattr(captioner, "describe", silent)
    result = command("doctor")
    assert findings(result)["caption"][0] == "WARN"
    assert result.exit_code == 0


def test_both_onnx_runtimes_fail_and_the_round_goes_on(command, sound, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("service.requirements_check.installed_version", lambda name: "1.20.0")
    result = command("doctor")
    assert result.exit_code == 1
    assert findings(result)["ONNX Runtime"][0] == "FAIL"
    assert "settings" in findings(result)


def test_a_bundle_that_does_not_load_fails(command, sound, monkeypatch):
    from model.captioner import Captioner

    def load(cls, bundle, device="auto"):
        raise ValueError("config.json is missing")

    monkeypatch.setattr(Captioner, "load", classmethod(load))
    result = command("doctor")
    assert result.exit_code == 1
    assert findings(result)["bundle"] == ("FAIL", "config.json is missing")
    assert "caption" not in findings(result)


def test_a_bad_setting_fails(command, sound):
    result = command("doctor", "--device", "abacus")
    assert result.exit_code == 1
    assert findings(result)["settings"][0] == "FAIL"


def test_keys_are_counted_and_those_that_are_none_fail(command, sound, monkeypatch):
    monkeypatch.setenv("DEECAP_API_KEYS", "a:correct-horse,b:battery-staple")
    status, words = findings(command("doctor"))["settings"]
    assert status == "OK"
    assert words.endswith("2 API keys")
    monkeypatch.setenv("DEECAP_API_KEYS", "a:short")
    result = command("doctor")
    assert result.exit_code == 1
    assert findings(result)["settings"][0] == "FAIL"
    assert "short" not in result.stdout


def test_a_cache_that_does_not_answer_fails(command, sound, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("DEECAP_REDIS_CACHE", f"redis://127.0.0.1:{taken.getsockname()[1]}")
        result = command("doctor")
    assert result.exit_code == 1
    assert findings(result)["cache"][0] == "FAIL"


def test_more_threads_than_cores_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 0)
    finding = doctor.check_torch()
    assert finding.status == "WARN"
    assert "threads for 0 cores" in finding.words


def test_cuda_without_its_provider_fails(monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert doctor.check_providers("auto") == doctor.Finding("OK", "CPU")
    assert doctor.check_providers("cuda").status == "FAIL"


def test_no_redis_is_asked_for_without_one():
    assert doctor.check_broker("").status == "OK"
    assert doctor.check_broker("memory").status == "OK"


def test_a_redis_that_does_not_answer_fails_and_its_password_is_not_shown():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = taken.getsockname()[1]
        finding = doctor.check_broker(f"redis://user:secret@127.0.0.1:{port}/0")
    assert finding.status == "FAIL"
    assert f"127.0.0.1:{port}" in finding.words
    assert "secret" not in finding.words


def test_a_redis_that_answers_is_named(monkeypatch):
    import redis

    monkeypatch.setattr(redis.Redis, "info", lambda self, section: {"redis_version": "7.2.0"})
    assert doctor.check_broker("redis://queue").words == "Redis 7.2.0 at queue:6379"
