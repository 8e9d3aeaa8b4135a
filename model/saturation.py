"""Whether this processor's products of bytes can be trusted."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


@cache
def saturates() -> bool:
    """Whether products of bytes overflow on this processor: so without VNNI, where pairs are summed in 16 bits."""
    shape = (64, 64)
    constants = [
        numpy_helper.from_array(np.full(shape, 127, np.int8), "w"),
        numpy_helper.from_array(np.array(0, np.uint8), "zero"),
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, shape)],
        constants,
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full(shape, 255, dtype=np.uint8)})
    return bool((found != 64 * 255 * 127).any())
