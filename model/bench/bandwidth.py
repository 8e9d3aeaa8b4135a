"""What the memory's bandwidth allows at best: the bytes that a caption must read, and how fast they can be had.

One caption at a time, every step has to read the weights of the layers it runs, the keys and values that these
attend to, and the vocabulary head, however clever the code. Arithmetic, and whatever the host does, comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.bench.clock import milliseconds
from model.bench.ours import taken_tests
from model.deecap import DeeCap
from model.engine.precision import Precision
from model.exits import ExitPolicy
from model.fusion import Concatenation

# Of a weight, and of a number of a state, key or value, by the precision's name.
WEIGHT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "int8": 1}
STATE_BYTES = {**WEIGHT_BYTES, "int8": 4}
# Far beyond the caches of the device.
MEMORY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
REPEATS = 10


def measure_bandwidth(device: str, size: int) -> float:
    """Bytes a second at which a buffer of `size` bytes is read, or read and copied: the best of several tries."""
    source = torch.ones(max(1, size // 4), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    held = source.numel() * 4
    times = [
        (milliseconds(source.sum, device), milliseconds(lambda: target.copy_(source), device)) for _ in range(REPEATS)
    ]
    read, copied = (min(column) / 1000 for column in zip(*times, strict=True))
    return max(held / read, 2 * held / copied)


class Traffic:
    """Bytes that a model's captions must read, one at a time, in a precision."""

    def __init__(self, model: DeeCap, policy: ExitPolicy, precision: Precision) -> None:
        self.model, self.policy = model, policy
        self.weight_bytes, self.state_bytes = WEIGHT_BYTES[precision.name], STATE_BYTES[precision.name]

    @property
    def weights(self) -> int:
        """All weights that a caption may need, in bytes."""
        tests = sum(self._test_weights(m) - self._head for m in self.policy.tested)
        layers = self.model.layers * self._layer_weights + self._region_weights
        return (layers + tests + self._head) * self.weight_bytes

    def caption(self, exits: Sequence[int], regions: int, tau: float) -> int:
        """Bytes for a caption whose steps left at `exits` at a threshold, in nats.

        Of the weights the products' alone, each once a step; of the catch-up nothing, since it shares its layers'
        weights with the newest word. Where the policy spares tests, those it may have spared are left out.
        """
        width, total = self.model.config.width, 0
        weights = self._region_weights
        for position, left in enumerate(exits, start=1):
            weights += left * self._layer_weights
            if left == self.model.layers:
                weights += self._head
            weights += sum(self._test_weights(m) for m in taken_tests(self.policy, left, tau))
            total += left * 2 * width * (position + regions) * self.state_bytes  # keys and values
        return total + weights * self.weight_bytes + regions * width * self.state_bytes

    @property
    def _head(self) -> int:
        return self.model.word_embedding.weight.numel()

    @property
    def _layer_weights(self) -> int:
        """Of one decoder layer, but for the keys and values of regions, which are computed once an image."""
        layer = self.model.decoder_layers[0]
        return _weights(layer) - layer.regions.key_value.weight.numel()

    @property
    def _region_weights(self) -> int:
        return sum(layer.regions.key_value.weight.numel() for layer in self.model.decoder_layers)

    def _test_weights(self, m: int) -> int:
        """Of the test at layer m, the head among them; the shallow share of earlier layers is counted at their test."""
        model, kind = self.model, self.model.config.exits
        count = self._head
        if kind in ("deecap", "shallow") and isinstance(model.shallow_fusion, Concatenation):
            before = max((earlier for earlier in self.policy.tested if earlier < m), default=0)
            count += model.shallow_fusion.slices[before:m].numel()
        if kind == "deecap":
            count += model.imitation.up[m - 1 :].numel() + model.imitation.down[m - 1 :].numel() + _weights(model.gate)
            if isinstance(model.deep_fusion, Concatenation):
                count += model.deep_fusion.slices[m:].numel()
        return count


def _weights(module: nn.Module) -> int:
    """Numbers in its products' weights; biases and norms are next to nothing."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
