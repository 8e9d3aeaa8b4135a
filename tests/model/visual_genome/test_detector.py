"""The whole detector: its network against the published layers, proposals against the slow ones, ONNX against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from model.bottom_up.detections import Detections
from model.bottom_up.extractor import PROVIDERS, Extractor, ExtractorError
from model.bottom_up.visual_genome.boxes import cell_anchors
from model.bottom_up.visual_genome.config import DetectorConfig
from model.bottom_up.visual_genome.detector import Detector
from model.bottom_up.visual_genome.onnx_graph import build_graph
from model.bottom_up.visual_genome.preprocess import scale_photo
from tests.model.visual_genome import oracles
from tests.model.visual_genome.made_up import Blobs, letters


def seen(detector: Detector, photo: np.ndarray) -> tuple[torch.Tensor, float, torch.Tensor, torch.Tensor]:
    """Pixels, scale, grid and proposals."""
    with torch.inference_mode():
        x, scale = scale_photo(torch.from_numpy(photo), detector.config)
        grid = detector.grid(x)
        return x, scale, grid, detector.propose(grid, x.shape[3], x.shape[2], scale)


def test_the_network_is_that_of_the_published_layers(detector: Detector, blobs: Blobs, photo: np.ndarray) -> None:
    config, net = detector.config, oracles.CaffeNet(blobs, letters)
    x, _, grid, boxes = seen(detector, photo)
    with torch.inference_mode():
        expected = net.grid(x.double(), config.blocks)
        assert grid.shape == expected.shape == (1, config.grid_width, 10, 13)
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(grid.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        pooled = torch.stack(
            [torch.from_numpy(oracles.pooled(grid[0].numpy(), box, config.pooled)) for box in boxes[:5].tolist()]
        )
        features = net.stage(pooled.double(), 5, config.blocks[3]).mean((2, 3))
        found = detector.region_features(grid[0], boxes)[:5].double()
        torch.testing.assert_close(found, features, rtol=1e-3, atol=1e-3 * float(features.abs().max()))


def test_proposals_are_those_of_the_slow_way(detector: Detector, photo: np.ndarray) -> None:
    x, scale, grid, boxes = seen(detector, photo)
    with torch.inference_mode():
        hidden = F.relu(detector.proposal(grid))
        logits, deltas = (layer(hidden)[0].double().numpy() for layer in (detector.objectness, detector.deltas))
    anchors = cell_anchors(16, (4, 8, 16, 32), (0.5, 1.0, 2.0)).tolist()
    expected = oracles.proposals(logits, deltas, (x.shape[3], x.shape[2]), scale, anchors, detector.config)
    assert len(expected) > 30
    assert boxes.numpy() == pytest.approx(expected, abs=1e-2)


def test_a_photo_without_a_large_enough_proposal_still_has_regions(detector: Detector) -> None:
    grid = torch.randn(1, detector.config.grid_width, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert len(detector.propose(grid, 32, 32, scale=50.0)) >= 1


def test_what_is_found_follows_from_the_steps(detector: Detector, blobs: Blobs, photo: np.ndarray) -> None:
    config = detector.config
    found = detector(torch.from_numpy(photo))
    x, _, grid, boxes = seen(detector, photo)
    with torch.inference_mode():
        features = detector.region_features(grid[0], boxes).double().numpy()
    scores = features @ blobs["cls_score"][0].T.astype(float) + blobs["cls_score"][1]
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    rows = oracles.selected(boxes.numpy(), probabilities, config)
    size = np.array([x.shape[3], x.shape[2]] * 2)
    left = set(rows)
    assert config.least_regions <= len(found.boxes) == len(rows) <= config.most_regions
    assert found.attribute_probabilities is not None
    for index, box in enumerate(found.boxes.numpy()):
        row = min(left, key=lambda row: np.abs(boxes[row].numpy() / size - box).max())
        left.remove(row)
        assert box == pytest.approx(boxes[row].numpy() / size, abs=1e-5)
        assert found.features[index].numpy() == pytest.approx(features[row], rel=1e-3, abs=1e-3)
        assert found.class_probabilities[index].numpy() == pytest.approx(probabilities[row], abs=1e-3)
        named = blobs["cls_embedding"][0][probabilities[row].argmax()]
        hidden = blobs["fc_attr"][0] @ np.concatenate((features[row], named)) + blobs["fc_attr"][1]
        attributes = np.exp(blobs["attr_score"][0] @ np.maximum(hidden, 0) + blobs["attr_score"][1])
        expected = attributes / attributes.sum()
        assert found.attribute_probabilities[index].numpy() == pytest.approx(expected, abs=1e-3)
    assert not left


# ONNX --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory, detector: Detector) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "extractor.onnx"
    graph = build_graph(detector)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    return path


@pytest.fixture(scope="module")
def extractor(graph_file: Path) -> Extractor:
    return Extractor(graph_file, threads=1)


def test_regions_are_made_by_onnx_operators(graph_file: Path) -> None:
    nodes = onnx.load(graph_file).graph.node
    assert {node.domain for node in nodes} == {""}
    kinds = [node.op_type for node in nodes]
    assert kinds.count("NonMaxSuppression") == 2
    assert kinds.count("MaxRoiPool") == 1


@pytest.mark.parametrize("size", [(120, 150), (150, 113), (31, 140), (40, 40), (280, 310)])
def test_the_graph_is_the_detector_for_photos_of_any_size(
    detector: Detector, extractor: Extractor, photo: np.ndarray, size: tuple[int, int]
) -> None:
    image = Image.fromarray(photo).resize((size[1], size[0]))
    expected = detector(torch.from_numpy(np.asarray(image).copy()))
    (found,) = extractor.look([image])
    assert isinstance(found, Detections)
    assert len(found.boxes) >= 10
    assert found.boxes == pytest.approx(expected.boxes.numpy(), abs=1e-4)
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= 1
    scale = float(expected.features.abs().max())
    assert found.features == pytest.approx(expected.features.numpy(), abs=1e-3 * scale)
    assert found.class_probabilities == pytest.approx(expected.class_probabilities.numpy(), abs=1e-3)
    assert found.attribute_probabilities == pytest.approx(expected.attribute_probabilities.numpy(), abs=1e-3)
    assert found.features.dtype == found.boxes.dtype == np.float32
    assert np.array_equal(found.classes, expected.class_probabilities[:, 1:].argmax(1).numpy())
    assert found.scores == pytest.approx(expected.class_probabilities[:, 1:].amax(1).numpy(), abs=1e-3)


def test_the_extractor_reads_photos_in_their_own_proportions(extractor: Extractor, photo: np.ndarray) -> None:
    assert extractor.kind == "visual-genome"
    assert extractor.feature_width == 128
    image = Image.fromarray(photo)
    pixels = extractor.prepare(image)
    assert np.array_equal(pixels, photo)
    one, other = extractor.look_at_pixels(np.stack([pixels, pixels[:, ::-1]]))
    assert np.array_equal(one.features, extractor.look([image])[0].features)
    assert not np.array_equal(one.boxes, other.boxes)


def test_a_photo_of_which_nothing_is_large_enough_has_the_same_regions_in_the_graph(
    tmp_path: Path, detector: Detector, photo: np.ndarray
) -> None:
    strict = Detector(replace(detector.config, smallest_proposal=10_000)).eval()
    strict.load_state_dict(detector.state_dict())
    onnx.save(build_graph(strict), tmp_path / "strict.onnx")
    (found,) = Extractor(tmp_path / "strict.onnx", threads=1).look([Image.fromarray(photo)])
    expected = strict(torch.from_numpy(photo))
    assert len(expected.boxes) >= 10
    assert found.boxes == pytest.approx(expected.boxes.numpy(), abs=1e-4)


@pytest.mark.parametrize("confidence", [1e-3, 1e-30])
def test_the_graph_selects_as_the_detector_does(
    tmp_path: Path, detector: Detector, photo: np.ndarray, confidence: float
) -> None:
    """With a number of confident regions between the least and the most, and with too many."""
    other = Detector(replace(detector.config, confidence=confidence, most_regions=12, least_regions=2)).eval()
    other.load_state_dict(detector.state_dict())
    onnx.save(build_graph(other), tmp_path / "other.onnx")
    (found,) = Extractor(tmp_path / "other.onnx", threads=1).look([Image.fromarray(photo)])
    expected = other(torch.from_numpy(photo))
    assert (2 < len(expected.boxes) < 12) if confidence == 1e-3 else len(expected.boxes) == 12
    assert found.boxes == pytest.approx(expected.boxes.numpy(), abs=1e-4)


def test_attributes_depend_on_the_class(detector: Detector, photo: np.ndarray) -> None:
    head = detector.attribute_head
    assert head is not None
    features = detector(torch.from_numpy(photo)).features
    named = [head(features, F.one_hot(torch.full((len(features),), number), 14).float()) for number in range(3)]
    assert float((named[0] - named[1]).abs().max()) > 0.05
    assert float((named[1] - named[2]).abs().max()) > 0.05


def test_a_detector_without_attributes_has_no_such_output(tmp_path: Path, config: DetectorConfig) -> None:
    torch.manual_seed(0)
    bare = Detector(replace(config, attributes=0)).eval()
    onnx.save(build_graph(bare), tmp_path / "bare.onnx")
    (found,) = Extractor(tmp_path / "bare.onnx", threads=1).look([Image.new("RGB", (50, 40), "red")])
    assert isinstance(found, Detections)
    assert found.attribute_probabilities is None
    assert found.class_probabilities.shape == (len(found.boxes), 14)


def test_an_extractor_of_another_kind_is_refused(tmp_path: Path, detector: Detector) -> None:
    graph = build_graph(detector, {"deecap.extractor": "of tomorrow"})
    onnx.save(graph, tmp_path / "tomorrow.onnx")
    with pytest.raises(ExtractorError, match="of tomorrow"):
        Extractor(tmp_path / "tomorrow.onnx")


@pytest.mark.skipif(
    PROVIDERS["cuda"] in onnxruntime.get_available_providers(), reason="ONNX Runtime has a CUDA provider here"
)
def test_the_detector_does_not_fall_back_to_the_cpu(graph_file: Path) -> None:
    with pytest.raises(ExtractorError, match=r"'\.\[gpu\]'"):
        Extractor(graph_file, "cuda")
