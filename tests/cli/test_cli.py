"""The command line as a whole: quick to start, says its version, hands settings to the service."""

from __future__ import annotations

import subprocess
import sys

import service.serve


def test_help_lists_the_commands_and_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from service.cli import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "heavy = {'torch', 'numpy', 'PIL', 'onnxruntime', 'fastapi', 'uvicorn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert {"caption", "serve", "worker", "doctor", "check-data", "experiment", "extract", "convert-vg"} <= set(
        done.stdout.split()
    )


def test_version(command):
    result = command("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("deecap ")


def test_an_unknown_command_ends_with_code_2(command):
    assert command("paint").exit_code == 2


def test_serve_takes_options_before_the_environment(command, monkeypatch):
    served = []
    monkeypatch.setattr(service.serve, "serve", served.append)
    monkeypatch.setenv("DEECAP_PORT", "8111")
    monkeypatch.setenv("DEECAP_HOST", "127.0.0.2")
    result = command("serve", "--port", "0", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (settings,) = served
    assert (settings.host, settings.port, settings.device) == ("127.0.0.2", 0, "cpu")


def test_serve_names_a_bad_setting(command, monkeypatch):
    monkeypatch.setenv("DEECAP_PROT", "8111")
    result = command("serve")
    assert result.exit_code == 2
    assert "DEECAP_PROT is no setting" in result.stderr


def test_serve_refuses_two_onnx_runtimes(command, monkeypatch):
    monkeypatch.setattr("service.requirements_check.installed_version", lambda name: "1.20.0")
    result = command("serve")
    assert result.exit_code == 1
    assert "overwrite each other" in result.stderr


def test_a_front_alone_needs_no_onnx_runtime(command, monkeypatch):
    served = []
    monkeypatch.setattr(service.serve, "serve", served.append)
    monkeypatch.setattr("service.requirements_check.installed_version", lambda name: None)
    monkeypatch.setenv("DEECAP_BROKER", "redis://queue")
    assert command("serve").exit_code == 0
    (settings,) = served
    assert settings.broker == "redis://queue"


def test_serve_names_keys_that_are_none(command, monkeypatch):
    monkeypatch.setenv("DEECAP_API_KEYS", "robot:short")
    result = command("serve", "--port", "0")
    assert result.exit_code == 2
    assert "DEECAP_API_KEYS: key 1" in result.stderr
    assert "short" not in result.stderr
