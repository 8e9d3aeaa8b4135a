"""`deecap bench`: what it measures when asked for what, where it writes, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

import model.bench.bench
import service.commands.bench
from model.bench.breakdown import PARTS
from model.bench.peers import PEERS

PNG = b"\x89PNG\r\n\x1a\n"


def found(breakdown: bool) -> dict[str, Any]:
    """A result as `model.bench.bench.bench` gives it, with one row in each table."""
    spread = {"p50": 2.0, "p95": 3.0, "mean": 2.5}
    row = {
        "name": "full, no tests",
        "tau": 0.0,
        "random_weights": False,
        "steps": 11.0,
        "speedup": {"paper": 1.0, "executed": 1.0, "clock": 1.0, "clock_per_word": 1.0},
        "ms": spread,
        "captions_per_second": {"1": 400.0},
        "bytes_per_word": 7e6,
        "bound_ms": 1.25,
        "bound_reached": 0.5,
    }
    machine = {"device": "cpu", "processor": "some", "cores": 2, "threads": 2, "load_before": None, "python": "3.11"}
    result: dict[str, Any] = {
        "command": "deecap bench",
        "bundle": {"name": "fake", "revision": "01", "layers": 6, "exit_policy": {"tested": [1], "skipped": "copied"}},
        "precision": "int8",
        "machine": {**machine, "versions": {"torch": "2"}},
        "captions": 1,
        "photos": 1,
        "before_words": {"look": spread},
        "regions": {"1": spread, "8": spread},
        "decoder": {"forced_steps": 11, "rows": [row]},
        "bandwidth": {"memory_gb_s": 20.0, "weights_gb_s": 50.0, "weights_mb": 10.0},
        "end_to_end": [{"name": "full, no tests", "ms": spread}],
        "authors": {"captions": 1, "rows": [{"name": "theirs", "ms": 9.0, "steps": 11.0, "times_faster": 1.0}]},
    }
    if breakdown:
        result["breakdown"] = {"tiers": [{"name": "full", "ms": dict.fromkeys(PARTS, 1.0)}]}
    return result


@pytest.fixture
def asked(monkeypatch, captioner) -> list[tuple[int, Any, str]]:
    """How many photos were measured, with which options, by which command; nothing is measured."""
    calls: list[tuple[int, Any, str]] = []

    def measure(captioner, photos, options, command):
        calls.append((len(photos), options, command))
        return found(options.breakdown)

    monkeypatch.setattr(model.bench.bench, "bench", measure)
    return calls


def test_the_samples_are_the_default(command, asked):
    result = command("bench")
    assert result.exit_code == 0, result.output
    assert "Decoder alone" in result.stdout
    ((photos, options, line),) = asked
    assert photos == 4
    assert (options.count, options.peers, options.peers_repeats, options.breakdown) == (64, PEERS, 3, False)
    assert line == "deecap bench"


def test_options_reach_the_measurement_and_the_command_line_is_kept(command, asked, photos):
    folder = photos(30, 40)[0].parent
    result = command(
        "bench", "--photos", folder, "--count", 5, "--rounds", 2, "--no-peers", "--peers-repeats", 1, "--breakdown"
    )
    assert result.exit_code == 0, result.output
    assert "Where the milliseconds of a caption go" in result.stdout
    ((count, options, line),) = asked
    assert count == 2
    assert (options.count, options.rounds, options.peers, options.peers_repeats) == (5, 2, (), 1)
    assert options.breakdown
    assert line == f"deecap bench --photos {folder} --count 5 --rounds 2 --no-peers --peers-repeats 1 --breakdown"


@pytest.mark.parametrize("breakdown", [False, True])
def test_figures_and_pictures_go_to_a_folder(command, asked, tmp_path, breakdown):
    out = tmp_path / "deep" / "out"
    result = command("bench", "--out", out, *(["--breakdown"] if breakdown else []))
    assert result.exit_code == 0, result.output
    pictures = ["bench.png"] + ["breakdown.png"] * breakdown
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", *pictures]
    assert json.loads((out / "bench.json").read_text()) == found(breakdown)
    assert all((out / picture).read_bytes().startswith(PNG) for picture in pictures)
    assert str(tmp_path) not in asked[0][2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--photos", "missing"], "no such folder: missing"),
        (["--photos", "."], "no photo in"),
        (["--count", "0"], "--count"),
        (["--device", "tpu"], "DEECAP_DEVICE"),
        (["--out", "file"], "--out"),
    ],
)
def test_what_cannot_be_asked_is_said(command, asked, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = command("bench", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not asked


def test_a_gpu_that_is_not_there_is_said(command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = command("bench", "--device", "cuda", "--no-peers")
    assert result.exit_code == 2
    assert "device cuda was asked for, but torch sees no GPU" in result.stderr


def test_a_broken_photo_is_named(command, asked, photos):
    (photo,) = photos(30)
    photo.write_bytes(photo.read_bytes()[:40])
    result = command("bench", "--photos", photo.parent)
    assert result.exit_code == 2
    assert f"{photo} cannot be read as a photo" in result.stderr


def test_a_model_that_the_engine_cannot_run_is_said(command, captioner, monkeypatch):
    def refuse(*_: object) -> None:
        raise ValueError("the engine has no sequential fusion")

    monkeypatch.setattr(model.bench.bench, "bench", refuse)
    result = command("bench")
    assert (result.exit_code, result.stderr) == (2, "error: the engine has no sequential fusion\n")


@pytest.mark.parametrize(
    ("missing", "words", "refused"),
    [
        ("transformers", [], True),
        ("transformers", ["--no-peers"], False),
        ("matplotlib", [], False),
        ("matplotlib", ["--out", "out"], True),
    ],
)
def test_a_package_is_asked_for_where_it_is_needed(command, asked, tmp_path, monkeypatch, missing, words, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(service.commands.bench, "installed_version", lambda name: None if name == missing else "1")
    result = command("bench", *words)
    assert result.exit_code == (2 if refused else 0), result.output
    assert (f"this needs {missing}: pip install '.[bench]'" in result.stderr) == refused


def test_without_samples_photos_must_be_named(command, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(service.commands.bench, "SAMPLES", tmp_path / "missing")
    result = command("bench")
    assert result.exit_code == 2
    assert "name a folder with --photos" in result.stderr


def test_a_folder_that_cannot_be_written_is_said(command, asked, tmp_path):
    (tmp_path / "file").write_text("")
    result = command("bench", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "cannot write to" in result.stderr
