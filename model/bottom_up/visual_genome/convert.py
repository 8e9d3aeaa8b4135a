"""From a weights file to an extractor that a bundle can have: read, exported, compared with PyTorch on one image."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from model.bottom_up.export import halve_weights
from model.bottom_up.visual_genome.config import DetectorConfig
from model.bottom_up.visual_genome.detector import Detector, Found
from model.bottom_up.visual_genome.onnx_graph import build_graph
from model.bottom_up.visual_genome.weights import ReadWeights, read_weights
from model.bundle import EXTRACTOR

PRECISIONS = ("float32", "float16")
LARGEST_HALF = float(np.finfo(np.float16).max)
SMALLEST_HALVED = 64  # numbers of a weight that `halve_weights` keeps in half precision
# What a graph may differ by: other orders of summing. A proposal may go the other way where two score the same to the
# last digit, so a few regions may have no counterpart.
FEATURE_TOLERANCE, BOX_TOLERANCE, SAME_REGIONS = 2e-3, 1e-3, 0.9


class ConversionError(ValueError):
    """The weights were read, and what they make cannot be used; the message says why."""


@dataclass(frozen=True)
class Converted:
    """What was written, and what is to be told of it."""

    path: Path
    read: ReadWeights
    regions: int  # on the image of the check
    same: float  # share of them that the graph finds as PyTorch does


def convert(weights: Path, folder: Path, precision: str = "float32", config: DetectorConfig | None = None) -> Converted:
    """Reads `weights` and writes `folder/extractor.onnx`; nothing is written where anything is wrong.

    In float16 the weights are kept in half precision and the arithmetic stays float32. Raises `WeightsError` for the
    file, `ConversionError` for what it makes, `OSError` where the folder cannot be written.
    """
    if precision not in PRECISIONS:
        raise ConversionError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    read = read_weights(weights, config)
    with weights.open("rb") as file:
        source = hashlib.file_digest(file, "sha256").hexdigest()
    detector = read.detector
    graph = build_graph(detector, {"deecap.source_sha256": source, "deecap.weights": precision})
    if precision == "float16":
        detector = halved(detector)
        halve_weights(graph)
    onnx.checker.check_model(graph)
    content = graph.SerializeToString(deterministic=True)
    regions, same = check(content, detector)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EXTRACTOR
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return Converted(path, read, regions, same)


def halved(detector: Detector) -> Detector:
    """The detector with weights as `halve_weights` rounds them. Raises `ConversionError` for too large ones."""
    rounded = copy.deepcopy(detector)
    for name, value in rounded.state_dict().items():
        if value.abs().max() > LARGEST_HALF:
            raise ConversionError(f"{name} has values that half precision cannot hold: convert to float32")
        if value.numel() >= SMALLEST_HALVED:
            value.copy_(value.half().float())
    return rounded


def check(content: bytes, detector: Detector) -> tuple[int, float]:
    """Runs graph and detector on one image: how many regions PyTorch finds, and which share of them the graph does.

    Raises `ConversionError` where the two do not agree, or the numbers are not finite.
    """
    pixels = _image(detector.config)
    expected = detector(torch.from_numpy(pixels))
    if not expected.features.isfinite().all():
        raise ConversionError("these weights give features that are not finite")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = session.run(["features", "boxes", "class_probabilities"], {"pixels": pixels[None]})
    same = agreement(expected, found)
    if same < SAME_REGIONS:
        raise ConversionError(f"the exported graph finds only {same:.0%} of the regions that PyTorch finds")
    return len(expected.boxes), same


def agreement(expected: Found, found: list[Any]) -> float:
    """The share of regions, of the larger side, that have their like in the other: same box, features and classes."""
    features, boxes, probabilities = expected.features.numpy(), expected.boxes.numpy(), expected.class_probabilities
    scale = float(np.abs(features).max()) or 1.0
    same = 0
    for row, box in enumerate(boxes):
        distances = np.abs(found[1] - box).max(1)
        like = int(distances.argmin())
        close = np.abs(found[0][like] - features[row]).max() <= FEATURE_TOLERANCE * scale
        close &= np.abs(found[2][like] - probabilities[row].numpy()).max() <= FEATURE_TOLERANCE
        same += bool(close and distances[like] <= BOX_TOLERANCE)
    return same / max(len(boxes), len(found[1]))


def _image(config: DetectorConfig) -> np.ndarray:
    """uint8 `(H, W, 3)`: rectangles of all sizes and colours, the same ones each time; wider than high."""
    random = np.random.default_rng(0)
    height = config.shorter_side * 2 // 3  # scaled up, as most photos are
    width = height * 4 // 3
    pixels = np.full((height, width, 3), 128, np.uint8)
    for _ in range(30):
        (y0, y1), (x0, x1) = (np.sort(random.integers(0, side, 2)) for side in (height, width))
        pixels[y0 : y1 + 1, x0 : x1 + 1] = random.integers(0, 256, 3)
    return pixels
