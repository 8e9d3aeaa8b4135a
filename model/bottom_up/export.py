"""Writes the extractor as one ONNX graph: normalising, trunk and grid cells, weights kept in half precision."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from model.bottom_up.grid import cells, grid_boxes
from model.bottom_up.preprocess import INPUT_SIZE, PHOTO_SIZE, normalise
from model.bottom_up.trunk import STRIDE, Trunk

if TYPE_CHECKING:
    import onnx

OPSET = 18


class GridExtractor(nn.Module):
    """The embedded extractor in torch, the exported graph's reference: pixels to features and boxes of cells."""

    cell_boxes: Tensor

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("cell_boxes", torch.from_numpy(grid_boxes(INPUT_SIZE // STRIDE)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `(B, 224, 224, 3)` -> `(B, 81, 1280)`, `(B, 81, 4)`."""
        features = cells(self.trunk(normalise(pixels)))
        return features, self.cell_boxes.expand(features.shape[0], -1, -1)


def export_extractor(trunk: Trunk, path: Path) -> None:
    """Writes `path`, one self-contained ONNX file. Needs the `train` extra."""
    graph = traced(GridExtractor(trunk).eval(), ["features", "boxes"])
    tidy(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def traced(extractor: nn.Module, outputs: Sequence[str]) -> onnx.ModelProto:
    """A module from uint8 pixels `(B, 224, 224, 3)` to these outputs, as ONNX for any B, weights in half precision."""
    import onnx

    example = torch.zeros(2, PHOTO_SIZE, PHOTO_SIZE, 3, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "extractor.onnx"
        torch.onnx.export(
            extractor,
            (example,),
            whole,
            input_names=["pixels"],
            output_names=list(outputs),
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        graph = onnx.load(whole)
    graph.ClearField("metadata_props")
    halve_weights(graph)
    return graph


def tidy(graph: onnx.ModelProto) -> None:
    """Takes out the exporter's notes, which name source files of the machine that ran it; checks the graph."""
    import onnx

    for node in graph.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    graph.graph.ClearField("value_info")
    graph.graph.ClearField("metadata_props")
    onnx.checker.check_model(graph)


def halve_weights(graph: onnx.ModelProto) -> None:
    """Float32 weights of an `onnx.ModelProto` to float16 with a cast behind each, in place.

    The runtime folds the casts when it loads, so the file is half as long and the arithmetic stays float32: on CPUs,
    half-precision convolutions are not faster.
    """
    import onnx
    from onnx import helper, numpy_helper

    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < 64:
            continue
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}.half")
        casts.append(helper.make_node("Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT))
        tensor.CopyFrom(half)
    for index, cast in enumerate(casts):
        graph.graph.node.insert(index, cast)
