"""The Visual Genome detector as one ONNX graph, from the photo's bytes to its regions, for photos of any size.

Written operator by operator rather than traced: proposals and regions are of no fixed number. What each part does is in
`detector.py`, `boxes.py` and `selection.py`, which the graph must agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import onnx
from onnx import TensorProto
from torch import nn

from model.bottom_up.extractor_kinds import KIND_KEY, SIDE_KEY, VISUAL_GENOME
from model.bottom_up.graph import Graph
from model.bottom_up.visual_genome.boxes import LARGEST_GROWTH
from model.bottom_up.visual_genome.config import PIXEL_MEAN, DetectorConfig
from model.bottom_up.visual_genome.detector import AttributeHead, Bottleneck, Detector
from model.bottom_up.visual_genome.preprocess import SMALLEST_SIDE


class Scaled(NamedTuple):
    """Names of a photo's scaled pixels and of what later steps ask about it."""

    pixels: str  # (1, 3, h, w)
    scale: str  # scalar
    size: str  # float (2,): w, h


def build_graph(detector: Detector, metadata: dict[str, str] | None = None) -> onnx.ModelProto:
    """`pixels` uint8 `(1, H, W, 3)`, red first -> `features (R, 2048)`, `boxes (R, 4)` relative to the photo,
    `class_probabilities (R, 1601)` and, where the detector has the head, `attribute_probabilities (R, 401)`."""
    config, graph = detector.config, Graph()
    photo = graph.input("pixels", TensorProto.UINT8, [1, "height", "width", 3])
    scaled = _scale(graph, photo, config)
    grid = _grid(graph, detector, scaled.pixels)
    boxes = _propose(graph, detector, grid, scaled)
    features = _region_features(graph, detector, grid, boxes)
    scores = graph.linear(features, detector.class_score, "class_score")
    probabilities = graph.op("Softmax", scores, axis=1)
    rows = _select(graph, config, boxes, probabilities)
    size = graph.op("Concat", scaled.size, scaled.size, axis=0)  # (4,): w, h, w, h

    def chosen(name: str) -> str:
        return graph.op("Gather", name, rows, axis=0)

    graph.output("features", chosen(features), ["regions", config.feature_width])
    graph.output("boxes", graph.op("Div", chosen(boxes), size), ["regions", 4])
    graph.output("class_probabilities", chosen(probabilities), ["regions", config.classes])
    if detector.attribute_head:
        attributes = _attributes(graph, detector.attribute_head, chosen(features), chosen(scores))
        graph.output("attribute_probabilities", attributes, ["regions", config.attributes])
    known = {KIND_KEY: VISUAL_GENOME, SIDE_KEY: str(config.shorter_side), **(metadata or {})}
    return graph.model(VISUAL_GENOME, known)


def _scale(graph: Graph, photo: str, config: DetectorConfig) -> Scaled:
    shape = graph.op("Slice", graph.op("Shape", photo), graph.integers(1), graph.integers(3))  # (2,): H, W
    sides = graph.op("Cast", shape, to=TensorProto.DOUBLE)  # in which the halves come out as they do in Python
    shorter = graph.op("ReduceMin", sides, keepdims=0)
    longer = graph.op("ReduceMax", sides, keepdims=0)
    scale = graph.op("Div", graph.constant(config.shorter_side, np.float64), shorter)
    limit = graph.constant(config.longer_side, np.float64)
    too_long = graph.op("Greater", graph.op("Round", graph.op("Mul", scale, longer)), limit)
    scale = graph.op("Where", too_long, graph.op("Div", limit, longer), scale)
    wanted = graph.op("Round", graph.op("Mul", sides, scale))
    wanted = graph.op("Max", graph.whole(wanted), graph.integers(SMALLEST_SIDE))  # (2,): h, w
    x = graph.op("Transpose", graph.numbers(photo), perm=[0, 3, 1, 2])
    x = graph.op("Gather", x, graph.integers(2, 1, 0), axis=1)  # blue first
    x = graph.op("Sub", x, graph.constant(np.reshape(PIXEL_MEAN, (1, 3, 1, 1))))
    target = graph.op("Concat", graph.integers(1, 3), wanted, axis=0)  # 1, 3, h, w
    x = graph.op("Resize", x, "", "", target, mode="linear", coordinate_transformation_mode="half_pixel")
    size = graph.op("Gather", graph.numbers(wanted), graph.integers(1, 0), axis=0)
    return Scaled(x, graph.numbers(scale), size)


def _grid(graph: Graph, detector: Detector, x: str) -> str:
    x = graph.op("Relu", graph.convolution(x, detector.stem, "stem"))
    x = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    for number in (2, 3, 4):
        x = _stage(graph, getattr(detector, f"res{number}"), x, f"res{number}")
    return x


def _stage(graph: Graph, blocks: nn.Sequential, x: str, name: str) -> str:
    for index, block in enumerate(cast(Sequence[Bottleneck], blocks)):
        prefix = f"{name}.{index}"
        y = graph.op("Relu", graph.convolution(x, block.conv1, f"{prefix}.conv1"))
        y = graph.op("Relu", graph.convolution(y, block.conv2, f"{prefix}.conv2"))
        y = graph.convolution(y, block.conv3, f"{prefix}.conv3")
        skip = x if block.shortcut is None else graph.convolution(x, block.shortcut, f"{prefix}.shortcut")
        x = graph.op("Relu", graph.op("Add", y, skip))
    return x


def _propose(graph: Graph, detector: Detector, grid: str, scaled: Scaled) -> str:
    """-> `(N, 4)`, best first."""
    config = detector.config
    hidden = graph.op("Relu", graph.convolution(grid, detector.proposal, "proposal"))
    last = graph.integers(-1)

    def by_anchor(x: str, shape: str) -> str:  # (1, C, h, w) -> an anchor a row
        return graph.op("Reshape", graph.op("Transpose", x, perm=[0, 2, 3, 1]), shape)

    logits = by_anchor(graph.convolution(hidden, detector.objectness, "objectness"), last)  # (h * w * A,)
    deltas = by_anchor(graph.convolution(hidden, detector.deltas, "deltas"), graph.integers(-1, 4))
    boxes = _decode(graph, _anchors(graph, detector, grid), deltas)
    edge = graph.op("Sub", graph.op("Concat", scaled.size, scaled.size, axis=0), graph.constant(1))
    boxes = graph.op("Min", graph.op("Max", boxes, graph.constant(0)), edge)

    smallest = graph.op("Mul", scaled.scale, graph.constant(config.smallest_proposal))
    shorter = graph.op("ReduceMin", _sizes(graph, boxes), graph.integers(1), keepdims=0)
    large = graph.op("GreaterOrEqual", shorter, smallest)  # (h * w * A,)
    none = graph.op("Equal", graph.op("ReduceMax", graph.whole(large), keepdims=1), graph.integers(0))
    large = graph.op("Or", large, none)
    boxes = graph.op("Compress", boxes, large, axis=0)
    logits = graph.op("Compress", logits, large, axis=0)

    count = graph.op("Min", graph.op("Shape", logits), graph.integers(config.proposals_before_nms))
    logits, best = graph.ops("TopK", 2, logits, count)
    boxes = graph.op("Gather", boxes, best, axis=0)
    scores = graph.op("Unsqueeze", logits, graph.integers(0, 1))  # (1, 1, n)
    kept = _suppress(graph, boxes, scores, config.proposals, config.proposal_nms)
    return graph.op("Gather", boxes, graph.op("Gather", kept, graph.constant(2, np.int64), axis=1), axis=0)


def _anchors(graph: Graph, detector: Detector, grid: str) -> str:
    """-> `(h * w * A, 4)`."""
    shape = graph.op("Shape", grid)
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)

    def steps(axis: int, place: list[int]) -> str:  # 0, 16, 32, ... along one axis of (h, w, 1)
        count = graph.op("Gather", shape, graph.constant(axis, np.int64), axis=0)
        numbers = graph.op("Range", zero, count, one)
        steps = graph.op("Mul", graph.numbers(numbers), graph.constant(detector.config.stride))
        return graph.op("Unsqueeze", steps, graph.integers(*place))

    y, x = steps(2, [1, 2]), steps(3, [0, 2])
    sides = graph.op(
        "Concat", graph.op("Slice", shape, graph.integers(2), graph.integers(4)), graph.integers(1), axis=0
    )
    y, x = graph.op("Expand", y, sides), graph.op("Expand", x, sides)
    shifts = graph.op("Concat", x, y, x, y, axis=2)  # (h, w, 4)
    anchors = graph.op("Add", graph.op("Unsqueeze", shifts, graph.integers(2)), graph.constant(detector.anchors))
    return graph.op("Reshape", anchors, graph.integers(-1, 4))


def _sizes(graph: Graph, boxes: str) -> str:
    """`(N, 4)` -> widths and heights `(N, 2)`, both ends counted."""
    return graph.op("Add", graph.op("Sub", graph.slice(boxes, 1, 2, 4), graph.slice(boxes, 1, 0, 2)), graph.constant(1))


def _decode(graph: Graph, anchors: str, deltas: str) -> str:
    sizes, half = _sizes(graph, anchors), graph.constant(0.5)
    centres = graph.op("Add", graph.slice(anchors, 1, 0, 2), graph.op("Mul", sizes, half))
    centres = graph.op("Add", centres, graph.op("Mul", graph.slice(deltas, 1, 0, 2), sizes))
    growth = graph.op("Min", graph.slice(deltas, 1, 2, 4), graph.constant(LARGEST_GROWTH))
    halves = graph.op("Mul", graph.op("Mul", sizes, graph.op("Exp", growth)), half)
    return graph.op("Concat", graph.op("Sub", centres, halves), graph.op("Add", centres, halves), axis=1)


def _suppress(graph: Graph, boxes: str, scores: str, most: int, threshold: float) -> str:
    """Boxes `(N, 4)` and scores `(1, classes, N)` -> rows of (0, class, box), best first within a class.

    ONNX's operator takes the far end as not included: one pixel more gives the same areas as counting both ends.
    """
    closed = graph.op("Add", boxes, graph.constant([0, 0, 1, 1]))
    closed = graph.op("Unsqueeze", closed, graph.integers(0))
    limits = graph.integers(most), graph.constant([threshold])
    return graph.op("NonMaxSuppression", closed, scores, *limits)


def _region_features(graph: Graph, detector: Detector, grid: str, boxes: str) -> str:
    """-> `(N, 2048)`."""
    config = detector.config
    zeros = graph.op("Mul", graph.slice(boxes, 1, 0, 1), graph.constant(0))  # (N, 1): all in the first photo
    pooled = graph.op(
        "MaxRoiPool",
        grid,
        graph.op("Concat", zeros, boxes, axis=1),
        pooled_shape=[config.pooled, config.pooled],
        spatial_scale=1 / config.stride,
    )
    x = _stage(graph, detector.res5, pooled, "res5")
    return graph.op("Flatten", graph.op("GlobalAveragePool", x))


def _select(graph: Graph, config: DetectorConfig, boxes: str, probabilities: str) -> str:
    """-> rows `(R,)`, most confident first."""
    objects = graph.slice(probabilities, 1, 1, config.classes)
    objects = graph.op("Unsqueeze", graph.op("Transpose", objects, perm=[1, 0]), graph.integers(0))  # (1, C, N)
    kept = _suppress(graph, boxes, objects, config.proposals, config.class_nms)  # (K, 3)
    nothing = graph.op("Mul", objects, graph.constant(0))
    survived = graph.op("ScatterND", nothing, kept, graph.op("GatherND", objects, kept))
    confident = graph.op("ReduceMax", survived, graph.integers(0, 1), keepdims=0)  # (N,)
    enough = graph.op("GreaterOrEqual", confident, graph.constant(config.confidence))
    count = graph.op("ReduceSum", graph.whole(enough), keepdims=1)  # (1,)
    count = graph.op("Max", count, graph.integers(config.least_regions))
    count = graph.op("Min", count, graph.integers(config.most_regions), graph.op("Shape", confident))
    return graph.ops("TopK", 2, confident, count)[1]


def _attributes(graph: Graph, head: AttributeHead, features: str, scores: str) -> str:
    best = graph.op("ArgMax", scores, axis=1, keepdims=0)
    named = graph.op("Gather", graph.weight("attributes.embedding", head.embedding.weight), best, axis=0)
    hidden = graph.linear(graph.op("Concat", features, named, axis=1), head.hidden, "attributes.hidden")
    return graph.op("Softmax", graph.linear(graph.op("Relu", hidden), head.score, "attributes.score"), axis=1)
