"""A run of DeeCap's decoder layers as an ONNX graph: what the engine runs on a CPU, where eager PyTorch's cost per

operation is several times that of the arithmetic. Built in memory from the network's weights when an engine starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from model.deecap import LARGEST_LOGIT, DeeCap
from model.engine.backend import Span
from model.engine.folding import deep_slices, folded, shallow_share
from model.layers import EncoderLayer, FeedForward
from model.vocabulary import NEVER_EMITTED

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128


@dataclass(frozen=True)
class Arithmetic:
    """How the products are made: in float32, or with int8 weights by one of two operators.

    For a `few` rows, where reading the weights is what takes the time, the one that quantises on the way; for more,
    the one that multiplies fastest, with activations quantised before it to -`levels`..`levels`.
    """

    kind: str  # float32, few or many
    levels: int = 127


@dataclass
class Graph:
    """Nodes and constants so far; names are made up as they come."""

    arithmetic: Arithmetic
    head_width: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def add(self, kind: str, inputs: list[str], count: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        names = [f"{kind}{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        return self.add(kind, list(inputs), 1, domain, **attributes)[0]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        array = np.asarray(value.detach().numpy() if isinstance(value, Tensor) else value, dtype=dtype)
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def numbers(self, *values: int) -> str:
        return self.constant(np.array(values), np.int64)

    def input(self, name: str, shape: list[int | str], integers: bool = False) -> str:
        kind = TensorProto.INT64 if integers else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, value: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def norm(self, x: str, norm: nn.LayerNorm | None, width: int) -> str:
        scale = np.ones(width) if norm is None else norm.weight
        shift = np.zeros(width) if norm is None else norm.bias
        return self.op("LayerNormalization", x, self.constant(scale), self.constant(shift), axis=-1, epsilon=1e-5)

    def linear(self, x: str, weight: Tensor, bias: Tensor) -> str:
        """x times weight (out, in), plus bias.

        An int8 weight has a scale per output, and an activation one per row, or per row and block of inputs: what a
        row gives does not depend on its neighbours.
        """
        if self.arithmetic.kind == "float32":
            return self.op("Add", self.op("MatMul", x, self.constant(weight.T)), self.constant(bias))
        matrix = weight.detach().double().numpy()
        scale = np.maximum(np.abs(matrix).max(1), 1e-12) / 127
        codes = np.round(matrix / scale[:, None])
        if self.arithmetic.kind == "many":
            return self._many_rows(x, codes, scale, bias)
        outputs, inputs = weight.shape
        block = SMALLEST_BLOCK
        while block < LARGEST_BLOCK and inputs % (2 * block) == 0:
            block *= 2
        blocks = -(-inputs // block)
        padded = np.full((outputs, blocks * block), 128)
        padded[:, :inputs] = codes + 128
        packed = self.constant(padded.reshape(outputs, blocks, block), np.uint8)
        scales = self.constant(np.repeat(scale, blocks))
        sizes = {"K": inputs, "N": outputs, "bits": 8, "block_size": block, "accuracy_level": 4}
        return self.op("MatMulNBits", x, packed, scales, "", "", self.constant(bias), domain=MICROSOFT, **sizes)

    def _many_rows(self, x: str, codes: np.ndarray, scale: np.ndarray, bias: Tensor) -> str:
        """A scale per row of x, so that its largest number becomes `levels`; then bytes times bytes."""
        levels, zero = self.arithmetic.levels, self.constant(np.array(self.arithmetic.levels + 1), np.uint8)
        peak = self.op("ReduceMax", self.op("Abs", x), self.numbers(-1), keepdims=1)
        peak = self.op("Max", peak, self.constant(np.array(1e-12)))
        rounded = self.op("QuantizeLinear", self.op("Div", x, peak), self.constant(np.array(1 / levels)), zero)
        scales = [self.constant(np.array(1.0)), self.constant(scale / levels)]
        product = self.op(
            "MatMulIntegerToFloat", rounded, self.constant(codes.T, np.int8), *scales, zero, domain=MICROSOFT
        )
        return self.op("Add", self.op("Mul", product, peak), self.constant(bias))

    def layer(self, x: str, layer: nn.Linear) -> str:
        return self.linear(x, layer.weight, layer.bias)

    def feed_forward(self, x: str, layer: FeedForward) -> str:
        return self.layer(self.op("Gelu", self.layer(x, layer.up)), layer.down)

    def heads(self, x: str, layers: list[nn.Linear], heads: int, scale: float = 1.0) -> list[str]:
        """`(G, T, d)` -> `scale` times each d of the layers' outputs, `(G, heads, T, d / heads)`, in one product."""
        weight = torch.cat([layer.weight.detach() for layer in layers]) * scale
        bias = torch.cat([layer.bias.detach() for layer in layers]) * scale
        width = weight.shape[1]
        parts = len(weight) // width
        shape = self.numbers(0, 0, parts * heads, width // heads)
        by_head = self.op("Transpose", self.op("Reshape", self.linear(x, weight, bias), shape), perm=[0, 2, 1, 3])
        return [by_head] if parts == 1 else self.add("Split", [by_head, self.numbers(*[heads] * parts)], parts, axis=1)

    def attend(self, query: str, keys: str, values: str, mask: str, width: int, keys_are_columns: bool = False) -> str:
        """Each `(G, heads, T or S, .)`, the mask added to the scores -> `(G, T, d)`.

        With `keys_are_columns` the keys are `(G, heads, ., S)`, which multiplies twice as fast, and the query has been
        scaled.
        """
        if keys_are_columns:
            scores = self.op("MatMul", query, keys)
        else:
            scores = self.op("FusedMatMul", query, keys, domain=MICROSOFT, transB=1, alpha=self.head_width**-0.5)
        chances = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", chances, values), perm=[0, 2, 1, 3])
        return self.op("Reshape", mixed, self.numbers(0, 0, width))

    def finish(self) -> bytes:
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
        content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return content


def decoder_graph(model: DeeCap, span: Span, arithmetic: Arithmetic, shallow_until: int) -> bytes:
    """Layers first..last over (G, T) words, then the exit if it is tested or the last.

    Inputs: from layer 1, `tokens` and `positions` (G,); else `state` (G, T, d), and `shallow` (G, k) where an earlier
    layer gave it; `words_mask` (G, 1, T, P + T) and `regions_mask` (G, 1, 1, R), added to attention scores; for each
    layer m its kept keys and values `words_keys_m`, `words_values_m` (G, heads, P, .), `regions_values_m`
    (G, heads, R, .) and `regions_keys_m` (G, heads, ., R).
    Outputs: `keys_values` (layers, 2, G, heads, T, .) of these words; `state` (G, T, d); `shallow` while m is at most
    `shallow_until`; at an exit `log_p` (G, V), `decided` (G, 3) and, where there is a head, `guesses` (G,).
    """
    graph, config = Graph(arithmetic, model.config.width // model.config.heads), model.config
    width, heads = config.width, config.heads
    head_width = width // heads
    if span.first == 1:
        scale = width**0.5
        tokens = graph.input("tokens", ["G"], True)
        what = graph.op("Gather", graph.constant(model.word_embedding.weight * scale), tokens)
        at = graph.input("positions", ["G"], True)
        where = graph.op("Gather", graph.constant(model.position_embedding.weight * scale), at)
        x = graph.op("Unsqueeze", graph.op("Add", what, where), graph.numbers(1))
    else:
        x = graph.input("state", ["G", "T", width])
    words_mask = graph.input("words_mask", ["G", 1, "T", "PT"])
    regions_mask = graph.input("regions_mask", ["G", 1, 1, "R"])
    shallow = graph.input("shallow", ["G", "k"]) if 1 < span.first <= shallow_until else None
    kept: list[str] = []

    newest = x
    for m in range(span.first, span.last + 1):
        layer = model.decoder_layers[m - 1]
        words_keys, words_values, regions_values = (
            graph.input(f"{name}_{m}", ["G", heads, length, head_width])
            for name, length in (("words_keys", "P"), ("words_values", "P"), ("regions_values", "R"))
        )
        regions_keys = graph.input(f"regions_keys_{m}", ["G", heads, head_width, "R"])
        words = layer.words
        query, keys, values = graph.heads(graph.norm(x, layer.words_norm, width), [words.query, words.key_value], heads)
        kept += [keys, values]
        all_keys, all_values = (
            graph.op("Concat", before, new, axis=2) for before, new in ((words_keys, keys), (words_values, values))
        )
        mixed = graph.attend(query, all_keys, all_values, words_mask, width)
        x = graph.op("Add", x, graph.layer(mixed, words.output))
        scale = head_width**-0.5
        (query,) = graph.heads(graph.norm(x, layer.regions_norm, width), [layer.regions.query], heads, scale)
        mixed = graph.attend(query, regions_keys, regions_values, regions_mask, width, keys_are_columns=True)
        x = graph.op("Add", x, graph.layer(mixed, layer.regions.output))
        x = graph.op("Add", x, graph.feed_forward(graph.norm(x, layer.feed_forward_norm, width), layer.feed_forward))
        newest = graph.op("Gather", x, graph.constant(np.array(-1), np.int64), axis=1)  # (G, d)
        if m <= shallow_until:
            share = graph.linear(graph.norm(newest, None, width), *shallow_share(model, m))
            shallow = share if shallow is None else graph.op("Add", shallow, share)
    stacked = [graph.op("Unsqueeze", one, graph.numbers(0)) for one in kept]
    both = graph.op("Concat", *stacked, axis=0)  # (layers * 2, G, heads, T, .)
    graph.output("keys_values", both)
    final = span.last == model.layers
    if not final:
        graph.output("new_state", x)
        if shallow is not None:
            graph.output("new_shallow", shallow)
    if final or span.tested:
        z = newest if final or shallow is None else _exit(graph, model, span.last, newest, shallow)
        _decide(graph, model, z)
        if not final and config.exit_head:
            weight, bias = model.exit_head.weight[span.last - 1], model.exit_head.bias[span.last - 1]
            product = graph.op("MatMul", graph.norm(newest, None, width), graph.constant(weight[:, None]))
            guess = graph.op("Add", graph.op("Squeeze", product, graph.numbers(1)), graph.constant(bias[None]))
            graph.output("guesses", guess)
    return graph.finish()


def _exit(graph: Graph, model: DeeCap, m: int, state: str, shallow: str) -> str:
    """z_m (equations 4 to 8) of h_m (G, d) and the sum of shallow shares; folded as in `model.engine.network`."""
    config, width, count = model.config, model.config.width, model.layers - m
    if config.fusion == "average":
        shallow = graph.op("Mul", shallow, graph.constant(np.array(1 / m)))
    if config.exits == "shallow":
        return shallow
    imitation = model.imitation
    inner = imitation.up.shape[-1]
    up = imitation.up[m - 1 :].transpose(1, 2).reshape(-1, width)
    hidden = graph.op("Gelu", graph.linear(state, up, imitation.up_bias[m - 1 :].reshape(-1)))
    parts = graph.add("Split", [hidden, graph.numbers(*[inner] * count)], count, axis=1)
    down, shift = imitation.down[m - 1 :], imitation.down_bias[m - 1 :, 0]
    imitated = [graph.linear(part, down[index].T, shift[index]) for index, part in enumerate(parts)]
    by_layer = graph.op("Reshape", graph.op("Concat", *imitated, axis=1), graph.numbers(0, count, width))
    flat = graph.op("Reshape", graph.norm(by_layer, None, width), graph.numbers(0, count * width))
    deep = graph.linear(flat, *deep_slices(model, m))
    fused, from_shallow = graph.add("Split", [shallow, graph.numbers(width, width)], 2, axis=1)
    gate = model.gate
    from_deep = graph.linear(deep, gate.hidden.weight[:, width:], gate.hidden.bias)
    hidden = graph.op("Gelu", graph.op("Add", from_deep, from_shallow))
    product = graph.op("MatMul", hidden, graph.constant(gate.scalar.weight.T))
    alpha = graph.op("Sigmoid", graph.op("Add", product, graph.constant(gate.scalar.bias)))
    return graph.op("Add", deep, graph.op("Mul", alpha, graph.op("Sub", fused, deep)))


def _decide(graph: Graph, model: DeeCap, z: str) -> None:
    """What the vocabulary head says of z (G, d)."""
    bias = model.head_bias.detach().clone()
    bias[list(NEVER_EMITTED)] = -LARGEST_LOGIT
    logits = graph.linear(graph.norm(z, model.head_norm, model.config.width), model.word_embedding.weight, bias)
    log_p = graph.op("LogSoftmax", logits, axis=-1)
    surprise = graph.op("Mul", graph.op("Exp", log_p), log_p)
    graph.output("log_p", log_p)
    entropy = graph.op("Neg", graph.op("ReduceSum", surprise, graph.numbers(1), keepdims=1))
    word = graph.op("Cast", graph.op("ArgMax", log_p, axis=-1, keepdims=1), to=TensorProto.FLOAT)  # exact to 2^24
    best = graph.op("ReduceMax", log_p, graph.numbers(1), keepdims=1)
    graph.output("decided", graph.op("Concat", word, entropy, best, axis=1))


def copy_up_graph(model: DeeCap, span: Span, arithmetic: Arithmetic) -> bytes:
    """`state` (M, d), of words that left before the span -> `keys_values` (M, layers * 2 * heads, d / heads) there."""
    width, heads = model.config.width, model.config.heads
    graph = Graph(arithmetic, width // heads)
    normalised = graph.norm(graph.input("state", ["M", width]), None, width)
    layers = model.decoder_layers[span.first - 1 : span.last]
    parts = [folded(one.words.key_value.weight, one.words.key_value.bias, one.words_norm) for one in layers]
    weight, bias = (np.concatenate([part[index].detach().numpy() for part in parts]) for index in (0, 1))
    product = graph.linear(normalised, Tensor(weight), Tensor(bias))
    graph.output("keys_values", graph.op("Reshape", product, graph.numbers(0, 2 * len(layers) * heads, width // heads)))
    return graph.finish()


def encoder_graph(model: DeeCap, arithmetic: Arithmetic) -> bytes:
    """`features` (B, R, F), `boxes` (B, R, 5) with their area, `mask` (B, 1, 1, R) added to scores.

    Output: `memory` (B, R, d).
    """
    config, width = model.config, model.config.width
    graph = Graph(arithmetic, width // config.heads)
    features = graph.input("features", ["B", "R", config.feature_width])
    product = graph.op("MatMul", graph.input("boxes", ["B", "R", 5]), graph.constant(model.box_in.weight.T))
    boxes = graph.op("Add", product, graph.constant(model.box_in.bias))
    mask = graph.input("mask", ["B", 1, 1, "R"])
    x = graph.layer(graph.norm(features, model.feature_norm, config.feature_width), model.feature_in)
    x = graph.op("Add", x, boxes)
    for layer in cast(list[EncoderLayer], list(model.encoder)):
        attention = layer.attention
        normalised = graph.norm(x, layer.attention_norm, width)
        query, keys, values = graph.heads(normalised, [attention.query, attention.key_value], config.heads)
        x = graph.op("Add", x, graph.layer(graph.attend(query, keys, values, mask, width), attention.output))
        x = graph.op("Add", x, graph.feed_forward(graph.norm(x, layer.feed_forward_norm, width), layer.feed_forward))
    graph.output("memory", graph.norm(x, model.memory_norm, width))
    return graph.finish()


def regions_graph(model: DeeCap, span: Span, arithmetic: Arithmetic) -> bytes:
    """`memory` (R, d) -> what the span's attention to the regions reads: `keys` (layers, heads, d / heads, R) and
    `values` (layers, heads, R, d / heads).
    """
    width, heads = model.config.width, model.config.heads
    graph = Graph(arithmetic, width // heads)
    layers = [layer.regions.key_value for layer in model.decoder_layers[span.first - 1 : span.last]]
    weight = Tensor(np.concatenate([one.weight.detach().numpy() for one in layers]))
    bias = Tensor(np.concatenate([one.bias.detach().numpy() for one in layers]))
    product = graph.linear(graph.input("memory", ["R", width]), weight, bias)
    shape = graph.numbers(0, len(layers), 2 * heads, width // heads)
    keys, values = graph.add("Split", [graph.op("Reshape", product, shape), graph.numbers(heads, heads)], 2, axis=2)
    graph.output("keys", graph.op("Transpose", keys, perm=[1, 2, 3, 0]))
    graph.output("values", graph.op("Transpose", values, perm=[1, 2, 0, 3]))
    return graph.finish()
