"""A growing ONNX graph: nodes, weights and small constants, with names made up as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

OPSET = 18
IR_VERSION = 9  # what ONNX Runtime 1.16 and later read


class Graph:
    """Methods give the name of what they computed."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """An operator with so many outputs."""
        names = [f"{kind}_{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def integers(self, *values: int) -> str:
        """int64 `(len(values),)`."""
        return self.constant(values, np.int64)

    def weight(self, name: str, value: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(value.detach().numpy()), name))
        return name

    def convolution(self, x: str, layer: nn.Conv2d, name: str) -> str:
        weights = [self.weight(f"{name}.{part}", getattr(layer, part)) for part in ("weight", "bias")]
        assert isinstance(layer.padding, tuple)
        pads = [*layer.padding, *layer.padding]
        return self.op("Conv", x, *weights, strides=layer.stride, pads=pads, dilations=layer.dilation)

    def linear(self, x: str, layer: nn.Linear, name: str) -> str:
        weights = [self.weight(f"{name}.{part}", getattr(layer, part)) for part in ("weight", "bias")]
        return self.op("Gemm", x, *weights, transB=1)

    def slice(self, x: str, axis: int, start: int, end: int) -> str:
        return self.op("Slice", x, self.integers(start), self.integers(end), self.integers(axis))

    def numbers(self, x: str) -> str:
        """Anything to float32."""
        return self.op("Cast", x, to=TensorProto.FLOAT)

    def whole(self, x: str) -> str:
        """Anything to int64."""
        return self.op("Cast", x, to=TensorProto.INT64)

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self, name: str, metadata: dict[str, str]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        helper.set_model_props(model, metadata)
        return model
