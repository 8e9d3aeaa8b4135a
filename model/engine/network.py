"""DeeCap's decoder prepared for speed: fused and folded products, in one precision, over the engine's cache.

The same function as `model.deecap`, which is what the tests hold it against; queries, keys and values of a layer are
one product, and what `model.engine.folding` puts together is together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from model.deecap import LARGEST_LOGIT, DeeCap
from model.engine.cache import Cache, Place
from model.engine.folding import deep_slices, folded, shallow_share
from model.engine.linear import Linear, MakeLinear
from model.layers import DecoderLayer
from model.vocabulary import NEVER_EMITTED


@dataclass(frozen=True)
class Decision:
    """The distribution over the next word at one exit, of M rows."""

    log_probabilities: Tensor  # (M, V), float32 or wider
    entropies: Tensor  # (M,), nats
    words: Tensor  # (M,), the likeliest
    best: Tensor  # (M,), that word's log-probability


class Layer:
    """One decoder layer over (G, T) words; all that it keeps is in the cache."""

    def __init__(self, layer: DecoderLayer, number: int, make: MakeLinear) -> None:
        self.number = number  # m, from 1
        self.heads = layer.words.heads
        words, regions, feed_forward = layer.words, layer.regions, layer.feed_forward
        query_key_value = torch.cat((words.query.weight, words.key_value.weight)).double()
        query_key_value_bias = torch.cat((words.query.bias, words.key_value.bias)).double()
        self.words_in = make(*folded(query_key_value, query_key_value_bias, layer.words_norm))
        self.words_out = _linear(words.output, make)
        self.regions_in = make(*folded(regions.query.weight, regions.query.bias, layer.regions_norm))
        self.regions_out = _linear(regions.output, make)
        self.up = make(*folded(feed_forward.up.weight, feed_forward.up.bias, layer.feed_forward_norm))
        self.down = _linear(feed_forward.down, make)

    def __call__(self, x: Tensor, cache: Cache, place: Place) -> Tensor:
        """`x (G * T, d)` -> the same; the words' keys and values are written to the cache on the way."""
        groups, width = len(place.slots), x.shape[-1]
        seen = self.words_in(_normalised(x)).view(groups, -1, 3, self.heads, width // self.heads)
        cache.write(self.number, seen[:, :, 1:], place)
        keys, values = cache.words_of(self.number, place)
        mixed = F.scaled_dot_product_attention(seen[:, :, 0].transpose(1, 2), keys, values, place.words_mask)
        x = x + self.words_out(mixed.transpose(1, 2).reshape(x.shape))
        query = self.regions_in(_normalised(x)).view(groups, -1, self.heads, width // self.heads)
        keys, values = cache.regions_of(self.number, place)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, place.regions_mask)
        x = x + self.regions_out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(_normalised(x))))


class CopyUp:
    """Keys and values of consecutive layers from the states that words left with: one product for all of them."""

    def __init__(self, layers: Sequence[DecoderLayer], make: MakeLinear) -> None:
        self.count = len(layers)
        self.heads = layers[0].words.heads
        parts = [folded(one.words.key_value.weight, one.words.key_value.bias, one.words_norm) for one in layers]
        self.product = make(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts]))

    def __call__(self, states: Tensor) -> Tensor:
        """`(M, d)` -> `(M, layers, 2, heads, d / heads)`."""
        return self.product(_normalised(states)).view(len(states), self.count, 2, self.heads, -1)


class DeepHalf:
    """Imitation, deep fusion and gate at exit m (equations 4 to 8)."""

    def __init__(self, model: DeeCap, m: int, make: MakeLinear, like: Tensor) -> None:
        imitation, width = model.imitation, model.config.width
        self.count = model.layers - m
        up = imitation.up[m - 1 :].double()  # (layers, d, inner)
        self.up = make(up.transpose(1, 2).reshape(-1, width), imitation.up_bias[m - 1 :].double().reshape(-1))
        self.down, self.down_bias = imitation.down[m - 1 :].to(like), imitation.down_bias[m - 1 :].to(like)
        self.fuse = make(*deep_slices(model, m))
        self.gate_deep = make(model.gate.hidden.weight[:, width:].double(), model.gate.hidden.bias.double())
        self.gate_scalar, self.gate_bias = model.gate.scalar.weight.to(like), model.gate.scalar.bias.to(like)

    def __call__(self, state: Tensor, shallow: Tensor) -> Tensor:
        """h_m `(M, d)` and the sum of the shallow shares `(M, 2d)` -> z_m `(M, d)`."""
        rows, width = state.shape
        hidden = F.gelu(self.up(state)).view(rows, self.count, -1).transpose(0, 1)  # (layers, M, inner)
        imitated = torch.baddbmm(self.down_bias, hidden, self.down)  # (layers, M, d)
        deep = self.fuse(_normalised(imitated).transpose(0, 1).reshape(rows, -1))
        gate = F.gelu(self.gate_deep(deep) + shallow[:, width:])
        alpha = torch.sigmoid(F.linear(gate, self.gate_scalar, self.gate_bias))
        return torch.lerp(deep, shallow[:, :width], alpha)


class Network:
    """The decoder of one model, ready to run."""

    def __init__(self, model: DeeCap, tested: Sequence[int], make: MakeLinear, like: Tensor) -> None:
        """`like`: a tensor of the type and on the device in which all but the products runs."""
        config = model.config
        gated = config.exits in ("deecap", "shallow") and bool(tested)
        self.model = model
        scale = math.sqrt(config.width)
        self.word_embedding = (model.word_embedding.weight.double() * scale).to(like)
        self.position_embedding = (model.position_embedding.weight.double() * scale).to(like)
        self.layers = [Layer(layer, m, make) for m, layer in enumerate(model.decoder_layers, start=1)]
        self.shallow = [make(*shallow_share(model, m)) for m in range(1, max(tested) + 1)] if gated else []
        self.shallow_width = (2 if config.exits == "deecap" else 1) * config.width if gated else 0
        self.averaged = gated and config.fusion == "average"
        self.deep = {m: DeepHalf(model, m, make, like) for m in tested} if config.exits == "deecap" else {}
        self.guess = (
            {m: (model.exit_head.weight[m - 1].to(like), model.exit_head.bias[m - 1].to(like)) for m in tested}
            if config.exit_head
            else {}
        )
        bias = model.head_bias.double().clone()
        bias[list(NEVER_EMITTED)] = -LARGEST_LOGIT
        self.head = make(*folded(model.word_embedding.weight, bias, model.head_norm))
        ends = [0, *tested, model.layers]
        copied = pairwise(ends[1:])
        self.copy_up = {a + 1: CopyUp(model.decoder_layers[a:b], make) for a, b in copied}
        regions = [layer.regions.key_value for layer in model.decoder_layers]
        self.regions = make(
            torch.cat([one.weight.double() for one in regions]), torch.cat([one.bias.double() for one in regions])
        )

    def region_keys_values(self, memory: Tensor) -> Tensor:
        """Memory `(M, d)` -> what every layer's attention to the regions reads, `(layers, 2, heads, M, d / heads)`."""
        heads = self.model.config.heads
        return self.regions(memory).view(len(memory), self.model.layers, 2, heads, -1).permute(1, 2, 3, 0, 4)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """h_0 of words `(M,)` at positions `(M,)` -> `(M, d)`."""
        return F.embedding(tokens, self.word_embedding) + F.embedding(positions, self.position_embedding)

    def grow(self, m: int, state: Tensor, shallow: Tensor | None) -> Tensor | None:
        """What exits from layer m on need of h_m `(M, d)`, added to what earlier layers gave."""
        if m > len(self.shallow):
            return shallow
        share = self.shallow[m - 1](_normalised(state))
        return share if shallow is None else shallow + share

    def guessed_entropy(self, m: int, state: Tensor) -> Tensor:
        """The exit head: h_m `(M, d)` -> nats `(M,)`."""
        weight, bias = self.guess[m]
        return _normalised(state) @ weight + bias

    def exit(self, m: int, state: Tensor, shallow: Tensor | None) -> Tensor:
        """z_m `(M, d)` of h_m and what `grow` gave up to layer m."""
        if shallow is None or m == len(self.layers):
            return state
        if self.averaged:
            shallow = shallow / m
        return self.deep[m](state, shallow) if self.deep else shallow

    def decide(self, z: Tensor) -> Decision:
        """What the vocabulary head says of z `(M, d)`."""
        logits = self.head(_normalised(z))
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        best, words = log_p.max(-1)
        return Decision(log_p, -torch.linalg.vecdot(log_p.exp(), log_p), words, best)


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _linear(linear: torch.nn.Linear, make: MakeLinear) -> Linear:
    return make(linear.weight.double(), linear.bias.double())
