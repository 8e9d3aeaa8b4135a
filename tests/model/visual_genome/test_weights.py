"""Weight files: read into the detector whatever they name their tensors, or refused with what is wrong."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.bottom_up.visual_genome.config import DetectorConfig
from model.bottom_up.visual_genome.detector import Detector
from model.bottom_up.visual_genome.naming import Names, Naming
from model.bottom_up.visual_genome.tensors import Tensors, WeightsError
from model.bottom_up.visual_genome.weights import _to_state, read_weights
from tests.model.visual_genome.made_up import Blobs, caffe_blobs, caffe_shapes, to_bua, to_detectron2

PORTS: dict[str, Callable[[Blobs], dict[str, np.ndarray]]] = {"bua": to_bua, "detectron2": to_detectron2}
BESIDE = {
    "backbone.stem.conv1.norm.num_batches_tracked": np.array(7),
    "pixel_mean": np.array([[[102.9801]], [[115.9465]], [[122.7717]]], np.float32),
    "pixel_std": np.ones((3, 1, 1), np.float32),
}


def save_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_torch(path: Path, content: Any, **how: Any) -> None:
    torch.save(
        {"model": {name: torch.from_numpy(np.array(value)) for name, value in content.items()}, "iteration": 3},
        path,
        **how,
    )


def test_caffes_layers_are_read(weights: Path, config: DetectorConfig, blobs: Blobs) -> None:
    read = read_weights(weights, config)
    assert read.naming == "caffe"
    assert read.tensors == sum(map(len, blobs.values()))
    assert read.unused == ("bbox_pred[0]", "bbox_pred[1]")
    detector = read.detector
    assert not detector.training
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    assert np.array_equal(detector.class_score.weight.numpy(), blobs["cls_score"][0])
    objectness = blobs["rpn_cls_score"][0]
    assert detector.objectness.weight.numpy() == pytest.approx(objectness[12:] - objectness[:12])


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("saved", ["pickle", "torch", "old torch"])
def test_the_ports_weights_make_the_same_detector(
    tmp_path: Path, config: DetectorConfig, blobs: Blobs, detector: Detector, port: str, saved: str
) -> None:
    content = PORTS[port](blobs) | BESIDE
    path = tmp_path / "port.weights"
    if saved == "pickle":
        save_pickle(path, {"model": content, "__author__": "somebody"})
    else:
        save_torch(path, content, _use_new_zipfile_serialization=saved == "torch")
    read = read_weights(path, config)
    assert read.naming == port
    assert set(BESIDE) - {"pixel_mean"} < set(read.unused)
    state = read.detector.state_dict()
    for name, value in detector.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_anchors_that_the_file_has_decide_their_order(
    tmp_path: Path, config: DetectorConfig, blobs: Blobs, detector: Detector
) -> None:
    """Here sizes come before ratios in Caffe's way of scoring, which no naming could tell."""
    sides = [(size * ratio**-0.5, size * ratio**0.5) for size in (64, 128, 256, 512) for ratio in (0.5, 1, 2)]
    content = to_bua(blobs)
    order = [4 * ratio + scale for scale in range(4) for ratio in range(3)]
    for part in ("weight", "bias"):
        logits, deltas = (
            f"proposal_generator.rpn_head.{name}.{part}" for name in ("objectness_logits", "anchor_deltas")
        )
        content[logits] = np.concatenate([content[logits][:12][order], content[logits][12:][order]])
        content[deltas] = (
            content[deltas].reshape(12, 4, *content[deltas].shape[1:])[order].reshape(content[deltas].shape)
        )
    anchors = np.array([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides], np.float32)
    content["proposal_generator.anchor_generator.cell_anchors.0"] = anchors
    save_pickle(tmp_path / "a.pkl", content)
    found = read_weights(tmp_path / "a.pkl", config).detector
    for name in ("objectness", "deltas"):
        torch.testing.assert_close(getattr(found, name).weight, getattr(detector, name).weight)
        torch.testing.assert_close(getattr(found, name).bias, getattr(detector, name).bias)
    content["proposal_generator.anchor_generator.cell_anchors.0"] = anchors / 2
    save_pickle(tmp_path / "b.pkl", content)
    with pytest.raises(WeightsError, match="another detector"):
        read_weights(tmp_path / "b.pkl", config)


def test_a_file_without_attributes_makes_a_detector_without(tmp_path: Path, config: DetectorConfig) -> None:
    bare = caffe_blobs(replace(config, attributes=0))
    for name, content in (("caffe", bare), ("detectron2", to_detectron2(bare))):
        save_pickle(tmp_path / name, content)
        read = read_weights(tmp_path / name, config)
        assert read.naming == name
        assert read.detector.attribute_head is None


def test_old_caffe_files_with_four_sides_are_read(tmp_path: Path, config: DetectorConfig, blobs: Blobs) -> None:
    old = {name: [blob.reshape((1,) * (4 - blob.ndim) + blob.shape) for blob in each] for name, each in blobs.items()}
    save_pickle(tmp_path / "old.pkl", old)
    assert torch.equal(
        read_weights(tmp_path / "old.pkl", config).detector.class_score.weight, torch.from_numpy(blobs["cls_score"][0])
    )


def test_the_published_network_is_accounted_for_in_full() -> None:
    """All names and shapes of the real detector, with numbers that take no memory."""
    config = DetectorConfig()
    shapes = dict(caffe_shapes(config))
    assert {"conv1", "res2a_branch1", "res3b3_branch2c", "res4b22_branch2c", "res5c_branch2b"} <= set(shapes)
    assert shapes["res4b22_branch2c"] == [(1024, 256, 1, 1)]
    assert shapes["fc_attr"] == [(512, 2304), (512,)]
    assert shapes["bbox_pred"][0] == (6404, 2048)
    one = np.ones((), np.float32)
    tensors = Tensors(
        "full",
        {f"{name}[{i}]": np.broadcast_to(one, shape) for name, each in shapes.items() for i, shape in enumerate(each)},
    )
    assert tensors.total == 104 * 6 + 15  # convolutions with their norms, and the heads
    state = _to_state(tensors, Names(Naming.CAFFE, config), config)
    assert tensors.finish() == ("bbox_pred[0]", "bbox_pred[1]")
    with torch.device("meta"):
        expected = Detector(config).state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in expected.items()
    }


# What is refused ---------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, config: DetectorConfig, content: Any) -> str:
    path = tmp_path / "wrong.pkl"
    save_pickle(path, content)
    with pytest.raises(WeightsError) as caught:
        read_weights(path, config)
    assert "wrong.pkl" in str(caught.value)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(
    tmp_path: Path, config: DetectorConfig, blobs: Blobs
) -> None:
    wrong: dict[str, Any] = {name: list(each) for name, each in blobs.items()}
    del wrong["res3a_branch2b"], wrong["bn4b2_branch2a"]
    wrong["fc7"] = [np.zeros((3, 3), np.float32)]
    wrong["cls_score"][0] = np.zeros((81, 128), np.float32)
    wrong["scale_conv1"][1] = np.full(4, np.nan, np.float32)
    message = refused(tmp_path, config, wrong)
    assert "4 missing: " in message
    for part in ("res3a_branch2b[0] (8, 8, 3, 3)", "bn4b2_branch2a[2] (1,)", "1 unexpected: fc7[0]", "2 wrong: "):
        assert part in message
    assert "cls_score[0] is (81, 128), not (14, 128)" in message
    assert "scale_conv1[1] has values that are no finite numbers" in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path, config: DetectorConfig, blobs: Blobs) -> None:
    some = {name: each for name, each in blobs.items() if not name.startswith(("res", "bn", "scale"))}
    message = refused(tmp_path, config, some)
    assert "and " in message
    assert len(message) < 500


def test_half_an_attribute_head_is_none(tmp_path: Path, config: DetectorConfig, blobs: Blobs) -> None:
    some = {name: each for name, each in blobs.items() if name != "attr_score"}
    assert "2 missing: attr_score[0]" in refused(tmp_path, config, some)


def test_a_port_with_a_tensor_too_many_is_refused(tmp_path: Path, config: DetectorConfig, blobs: Blobs) -> None:
    content = to_detectron2(blobs) | {"roi_heads.mask_head.weight": np.zeros(3, np.float32)}
    assert "1 unexpected: roi_heads.mask_head.weight" in refused(tmp_path, config, content)


def test_another_mean_colour_is_refused(tmp_path: Path, config: DetectorConfig, blobs: Blobs) -> None:
    content = to_bua(blobs) | {"pixel_mean": np.array([103.53, 116.28, 123.675], np.float32)}
    assert "trained on pixels less" in refused(tmp_path, config, content)


def test_negative_variances_are_refused(tmp_path: Path, config: DetectorConfig, blobs: Blobs) -> None:
    wrong = {**blobs, "bn_conv1": [blobs["bn_conv1"][0], -blobs["bn_conv1"][1], blobs["bn_conv1"][2]]}
    assert "bn_conv1[1] has variances below 0" in refused(tmp_path, config, wrong)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({}, "no known way"),
        ({"layer1.0.conv1.weight": np.zeros(3, np.float32)}, "layer1.0.conv1.weight"),
        ([1, 2], "no weights by name"),
        ({3: np.zeros(3)}, "no weights by name"),
        ({"conv1": ["text"]}, "not an array"),
    ],
)
def test_other_things_are_refused(tmp_path: Path, config: DetectorConfig, content: Any, why: str) -> None:
    assert why in refused(tmp_path, config, content)


def test_files_that_are_no_weights_are_named(tmp_path: Path, config: DetectorConfig, weights: Path) -> None:
    whole = weights.read_bytes()
    torch.save({"model": {"a": torch.zeros(30)}}, tmp_path / "whole.pth")
    for name, content in (
        ("empty", b""),
        ("truncated", whole[: len(whole) // 2]),
        ("torn.pth", (tmp_path / "whole.pth").read_bytes()[:400]),
        ("page.html", b"<!doctype html><title>404</title>"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name, config)
    with pytest.raises(WeightsError, match=r"nowhere.*No such file"):
        read_weights(tmp_path / "nowhere", config)
    with pytest.raises(WeightsError, match="directory"):
        read_weights(tmp_path, config)


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("saved", ["pickle", "torch", "old torch"])
def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, config: DetectorConfig, saved: str) -> None:
    made, path = tmp_path / "made", tmp_path / "evil.pth"
    content = {"model": {"rpn_conv/3x3": Runs(made)}}
    if saved == "pickle":
        save_pickle(path, content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=saved == "torch")
    with pytest.raises(WeightsError, match=r"evil\.pth is refused: it names \w+\.mkdir") as caught:
        read_weights(path, config)
    assert not made.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice how to run it all the same
