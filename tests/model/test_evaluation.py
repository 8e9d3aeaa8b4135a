"""Evaluation and calibration of a whole bundle, against captions made one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from model.captioner import Captioner
from model.evaluation.calibrate import calibrate
from model.evaluation.data import EvaluationSet, look_at_split
from model.evaluation.evaluate import compare, describe_all, evaluate
from model.evaluation.metrics import per_image_cider
from model.exits import TIERS, paper_speedup
from service.cli import app

pytest.importorskip("pycocoevalcap.bleu.bleu")
CAPTIONS = (["a", "dog", "runs", "on", "grass"], ["the", "red", "cat", "sits"], ["two", "man", "on", "the", "grass"])


@pytest.fixture
def captioner(random_bundle: Any) -> Captioner:
    return Captioner.load(random_bundle.folder, "cpu", "float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six photos of noise with three captions each, five in the split val."""
    random = np.random.default_rng(0)
    images = []
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        sentences = [{"tokens": CAPTIONS[(number + shift) % 3]} for shift in range(3)]
        images.append({"filename": f"{number}.png", "split": "val" if number else "train", "sentences": sentences})
    (tmp_path / "captions.json").write_text(json.dumps({"images": images}))
    return tmp_path


@pytest.fixture
def photos(captioner: Captioner, data: Path) -> EvaluationSet:
    return look_at_split(captioner, data / "captions.json", data, "val")


@pytest.fixture
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes ten seconds each time that Java begins; `test_metrics.py` has it, and the command below."""
    monkeypatch.setattr("model.evaluation.metrics.shutil.which", lambda name: None)


def mixed_tau(captioner: Captioner, photos: EvaluationSet) -> float:
    """A threshold at which some words leave early and some do not."""
    steps = [step for regions in photos.regions for step in captioner.describe(regions, tau=1e9).steps]
    return float(np.median([step.entropy for step in steps]))


def test_a_split_is_looked_at_in_the_file_s_order(captioner: Captioner, data: Path, photos: EvaluationSet) -> None:
    assert photos.names == ("1.png", "2.png", "3.png", "4.png", "5.png")
    with Image.open(data / "2.png") as image:
        np.testing.assert_allclose(photos.regions[1].features, captioner.look(image).features, rtol=1e-4, atol=1e-4)
    assert look_at_split(captioner, data / "captions.json", data, "val", limit=2).names == photos.names[:2]
    with pytest.raises(ValueError, match="test"):
        look_at_split(captioner, data / "captions.json", data, "test")
    (data / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        look_at_split(captioner, data / "captions.json", data, "val")


@pytest.mark.usefixtures("no_meteor")
def test_figures_are_those_of_captions_made_one_by_one(captioner: Captioner, photos: EvaluationSet) -> None:
    speed = captioner.speeds.resolve(tau=mixed_tau(captioner, photos))
    captions = [captioner.describe(regions, tau=speed.tau) for regions in photos.regions]
    exits = [step.exit_layer for caption in captions for step in caption.steps]
    result = evaluate(captioner, photos, describe_all(captioner, photos, speed.tau), speed)
    assert result["exit_layers"] == [exits.count(layer) for layer in range(1, 7)]
    assert result["speedup"]["paper"] == pytest.approx(paper_speedup(exits, 6))
    assert 1.0 <= result["speedup"]["executed"] <= result["speedup"]["paper"]
    assert result["speedup"]["clock"] > 0
    words = [[word.text for word in caption.words] for caption in captions]
    assert result["scores"]["cider_d"] == pytest.approx(per_image_cider(words, photos.references).mean(), abs=1e-6)


@pytest.mark.usefixtures("no_meteor")
def test_full_depth_saves_nothing(captioner: Captioner, photos: EvaluationSet) -> None:
    speed = captioner.speeds.resolve("full")
    result = evaluate(captioner, photos, describe_all(captioner, photos, speed.tau), speed)
    assert (result["speedup"]["paper"], result["speedup"]["executed"]) == (1.0, 1.0)
    beam = evaluate(captioner, photos, describe_all(captioner, photos, speed.tau, 3), speed, 3)
    assert (beam["speedup"]["executed"], beam["describe_ms"]) == (None, None)


def test_a_bundle_is_no_better_than_itself(captioner: Captioner, photos: EvaluationSet) -> None:
    run = describe_all(captioner, photos, captioner.speeds.resolve("fast").tau)
    result = compare(run, captioner, photos, "fast")
    assert (result["cider_d_difference"], result["cider_d_difference_95"]) == (0.0, [0.0, 0.0])


def test_the_table_says_what_each_threshold_did(captioner: Captioner, photos: EvaluationSet) -> None:
    table = calibrate(captioner, photos, {"split": "made up"})
    rows = {row.tau: row for row in table.rows}
    assert rows[0.0].speedup == 1.0
    for name, target in TIERS.items():
        row = rows[table.tiers[name]]
        assert row.speedup >= target or row.speedup == max(one.speedup for one in table.rows)
    for tau, row in rows.items():
        steps = [step.exit_layer for caption in describe_all(captioner, photos, tau).captions for step in caption.steps]
        assert row.speedup == pytest.approx(paper_speedup(steps, 6), abs=1e-4)
        assert row.describe_ms > 0


def test_the_commands_write_what_they_measure(random_bundle: Any, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(random_bundle.folder, folder)
    where = ["--captions", str(data / "captions.json"), "--photos", str(data), "--bundle", str(folder)]
    told = CliRunner().invoke(app, ["calibrate", *where])
    assert told.exit_code == 0, told.output
    assert [line.split()[0] for line in told.stdout.splitlines()] == list(TIERS)
    measured = json.loads((folder / "speeds.json").read_text())["measured"]
    assert measured["split"] == "captions val, 5 photos"
    out = tmp_path / "figures.json"
    told = CliRunner().invoke(
        app, ["evaluate", *where, "--speed", "turbo", "--against-speed", "full", "--out", str(out)]
    )
    assert told.exit_code == 0, told.output
    found = json.loads(out.read_text())
    assert found["photos"] == 5
    assert found["against"]["speedup"] == 1.0
    lost = found["scores"]["cider_d"] - found["against"]["cider_d"]
    assert found["against"]["cider_d_difference"] == pytest.approx(lost, abs=1e-6)
    unknown = CliRunner().invoke(app, ["evaluate", *where, "--against-speed", "warp"])
    assert unknown.exit_code == 2
    assert "speed must be one of" in unknown.output
    assert "looking" not in unknown.output  # it is told of at once
    refused = CliRunner().invoke(app, ["evaluate", *where, "--tau", "1", "--against", str(folder)])
    assert refused.exit_code == 2
