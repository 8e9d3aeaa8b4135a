"""From a weights file to an extractor that a bundle has: written when it agrees with PyTorch, and then used."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from model.bottom_up.extractor import Extractor, revision_of_extractor
from model.bottom_up.visual_genome import convert as convert_module
from model.bottom_up.visual_genome.config import DetectorConfig
from model.bottom_up.visual_genome.convert import ConversionError, agreement, convert, halved
from model.bottom_up.visual_genome.detector import Detector
from model.bottom_up.visual_genome.tensors import WeightsError
from model.bundle import EXTRACTOR, BundleError, save_model
from model.captioner import Captioner
from model.deecap import DeeCap
from model.exits import ExitPolicy
from model.vocabulary import SPECIAL, Vocabulary
from tests.model.visual_genome.made_up import Blobs


def test_what_is_written_sees_what_the_detector_sees(
    tmp_path: Path, weights: Path, config: DetectorConfig, detector: Detector, photo: np.ndarray
) -> None:
    done = convert(weights, tmp_path / "deep" / "out", config=config)
    assert done.path == tmp_path / "deep" / "out" / EXTRACTOR
    assert [path.name for path in done.path.parent.iterdir()] == [EXTRACTOR]
    assert done.same == 1.0
    assert done.regions >= 10
    (found,) = Extractor(done.path, threads=1).look([Image.fromarray(photo)])
    expected = detector(torch.from_numpy(photo))
    assert found.features == pytest.approx(expected.features.numpy(), abs=1e-3 * float(expected.features.abs().max()))
    again = convert(weights, tmp_path / "again", config=config).path
    assert again.read_bytes() == done.path.read_bytes()  # so that revisions are the same


def test_half_precision_halves_the_file_and_rounds_the_weights(
    tmp_path: Path, weights: Path, config: DetectorConfig, detector: Detector, photo: np.ndarray
) -> None:
    whole = convert(weights, tmp_path / "whole", config=config).path
    half = convert(weights, tmp_path / "half", "float16", config).path
    kinds = {tensor.data_type for tensor in onnx.load(half).graph.initializer if np.prod(tensor.dims) >= 64}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert half.stat().st_size < 0.8 * whole.stat().st_size  # a narrow network is much graph and few weights
    assert revision_of_extractor(half) != revision_of_extractor(whole)
    (found,) = Extractor(half, threads=1).look([Image.fromarray(photo)])
    expected = halved(detector)(torch.from_numpy(photo))
    assert found.features == pytest.approx(expected.features.numpy(), abs=1e-3 * float(expected.features.abs().max()))


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path, config: DetectorConfig, blobs: Blobs) -> None:
    large = {**blobs, "cls_score": [blobs["cls_score"][0] * 1e7, blobs["cls_score"][1]]}
    (tmp_path / "large.pkl").write_bytes(pickle.dumps(large))
    with pytest.raises(ConversionError, match=r"class_score\.weight.*float32"):
        convert(tmp_path / "large.pkl", tmp_path / "out", "float16", config)
    with pytest.raises(ConversionError, match="precision"):
        convert(tmp_path / "large.pkl", tmp_path / "out", "int8", config)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_disagrees_is_not_written(
    tmp_path: Path, weights: Path, config: DetectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = convert_module.build_graph

    def build_wrongly(detector: Detector, metadata: dict[str, str]) -> onnx.ModelProto:
        graph = build(detector, metadata)
        (weight,) = (tensor for tensor in graph.graph.initializer if tensor.name == "res5.1.conv3.bias")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 1, weight.name))
        return graph

    monkeypatch.setattr(convert_module, "build_graph", build_wrongly)
    with pytest.raises(ConversionError, match="only 0%"):
        convert(weights, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def test_agreement_is_the_share_of_regions_with_their_like(detector: Detector, photo: np.ndarray) -> None:
    expected = detector(torch.from_numpy(photo))
    found = [part.numpy().copy() for part in expected[:3]]
    count = len(found[1])
    assert agreement(expected, [part[::-1] for part in found]) == 1.0  # in whatever order
    for part, off in enumerate((0.1 * np.abs(found[0]).max(), 0.01, 0.01)):
        moved = [each.copy() for each in found]
        moved[part][0] += off
        assert agreement(expected, moved) == pytest.approx(1 - 1 / count)
    assert agreement(expected, [part[1:] for part in found]) == pytest.approx(1 - 1 / count)
    twice = [np.concatenate((part, part)) for part in found]
    assert agreement(expected, twice) == 0.5


def test_nothing_is_written_for_a_wrong_file(tmp_path: Path, config: DetectorConfig) -> None:
    (tmp_path / "wrong.pkl").write_bytes(b"no pickle")
    with pytest.raises(WeightsError):
        convert(tmp_path / "wrong.pkl", tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


# In a bundle -------------------------------------------------------------------------------------------------------


def bundle_reading(folder: Path, shipped: Path, feature_width: int, make_model: Callable[..., DeeCap]) -> Path:
    vocabulary = Vocabulary([*SPECIAL, *(f"word{number}" for number in range(19 - len(SPECIAL)))])
    model = make_model(feature_width=feature_width).float()
    save_model(folder, "detected", model, vocabulary, ExitPolicy.every_layer(model.layers))
    shutil.copy(shipped / "speeds.json", folder)
    return folder


def test_a_bundle_with_the_detector_captions(
    tmp_path: Path, weights: Path, config: DetectorConfig, make_model: Callable[..., DeeCap], photo: np.ndarray
) -> None:
    shipped = Path(convert_module.__file__).parents[2] / "bundles" / "deecap-flickr8k"
    folder = bundle_reading(tmp_path / "bundle", shipped, config.feature_width, make_model)
    convert(weights, folder, config=config)
    captioner = Captioner.load(folder, "cpu", threads=1)
    image = Image.fromarray(photo)
    regions = captioner.look(image)
    assert 10 <= len(regions.boxes) <= config.most_regions
    assert captioner.describe(regions, "full").steps
    assert captioner.prepare(image).shape == (120, 150, 3)
    (at_pixels,) = captioner.look_at_pixels(captioner.prepare(image)[None])
    assert np.array_equal(at_pixels.features, regions.features)
    assert captioner.extractor_revision == revision_of_extractor(folder / EXTRACTOR)
    wrong = bundle_reading(tmp_path / "wrong", shipped, 99, make_model)
    shutil.copy(folder / EXTRACTOR, wrong)
    with pytest.raises(BundleError, match="128 numbers per region"):
        Captioner.load(wrong, "cpu", threads=1)
