"""A file that is an extractor with a region head as far as anybody can see, and finds the same in every photo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model.bottom_up.extractor_kinds import CLASSES_KEY, KIND_KEY, REGIONS
from model.bottom_up.region_limits import MOST
from model.bundle import EXTRACTOR

CHANCES = [[0.1, 0.8, 0.9], [0.2, 0.1, 0.5]]  # of a cat, of a dog, and of anything
BOXES = [[0.25, 0.25, 0.75, 0.5], [0.0, 0.0, 0.5, 1.0]]


def write_detector(folder: Path) -> Path:
    """Finds a dog, and something that is hardly a cat, in every photo; and one cell."""
    folder.mkdir()
    features, boxes = np.zeros((1, MOST + 1, 3), np.float32), np.zeros((1, MOST + 1, 4), np.float32)
    features[0, :2], boxes[0, :2], boxes[0, MOST] = CHANCES, BOXES, (0, 0, 1, 1)
    constants = {"f": features, "b": boxes, "c": np.array([2], np.int64), "one": np.ones(2, np.int64)}
    nodes = [
        helper.make_node("Shape", ["pixels"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "one"], ["shape"], axis=0),
        helper.make_node("Expand", ["f", "shape"], ["features"]),
        helper.make_node("Expand", ["b", "shape"], ["boxes"]),
        helper.make_node("Expand", ["c", "batch"], ["counts"]),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", 224, 224, 3])
    outputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", MOST + 1, 3]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["B", MOST + 1, 4]),
        helper.make_tensor_value_info("counts", TensorProto.INT64, ["B"]),
    ]
    kept = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "detector", [pixels], outputs, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {KIND_KEY: REGIONS, CLASSES_KEY: json.dumps(["cat", "dog"])})
    onnx.save(model, folder / EXTRACTOR)
    return folder
