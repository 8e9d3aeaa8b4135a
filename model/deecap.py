"""The DeeCap network: encoder, decoder, imitation, gate and exits (Fei et al., CVPR 2022, section 3).

N decoder layers; h_m is the output of layer m (m from 1), ĥ_k^m the imitation of layer k made from h_m, z_m what
the shared vocabulary head reads at exit m. Of `DeeCapConfig.exits`, every system of the paper is one setting.
This class is the model alone; searching for a caption with it is `model.decoding`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import DeeCapConfig
from model.fusion import make_fusion
from model.layers import CheapDropout, DecoderLayer, EncoderLayer

LARGEST_LOGIT = 1e30  # logits beyond are clamped, so that the entropy of any logits is finite


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, float32 or wider, of the softmax over the last axis: `(..., V)` -> `(...)`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = wide.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class Imitation(nn.Module):
    """MLP^k for k = 2..N: the states of layers not computed, from the last one that was (section 3.1).

    Each is Linear-GELU-Linear, shared by all m < k; the stack of k > m is one product.
    """

    def __init__(self, width: int, layers: int, inner: int) -> None:
        super().__init__()
        bound, inner_bound = 1 / math.sqrt(width), 1 / math.sqrt(inner)
        self.up = nn.Parameter(torch.empty(layers - 1, width, inner).uniform_(-bound, bound))
        self.up_bias = nn.Parameter(torch.zeros(layers - 1, 1, inner))
        self.down = nn.Parameter(torch.empty(layers - 1, inner, width).uniform_(-inner_bound, inner_bound))
        self.down_bias = nn.Parameter(torch.zeros(layers - 1, 1, width))

    def forward(self, state: Tensor, m: int) -> Tensor:
        """h_m `(..., d)` -> ĥ_{m+1}^m .. ĥ_N^m stacked, `(N - m, ..., d)`."""
        rows = state.reshape(1, -1, state.shape[-1])
        hidden = F.gelu(rows @ self.up[m - 1 :] + self.up_bias[m - 1 :])
        imitated = hidden @ self.down[m - 1 :] + self.down_bias[m - 1 :]
        return imitated.reshape(-1, *state.shape)


class Gate(nn.Module):
    """α = σ(MLP([h_shallow; h_deep])), one scalar per word (equation 7)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * width, width)
        self.scalar = nn.Linear(width, 1)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Both `(..., d)` -> α `(..., 1)`."""
        return torch.sigmoid(self.scalar(F.gelu(self.hidden(torch.cat((shallow, deep), -1)))))


class ExitHead(nn.Module):
    """A linear guess at each exit's entropy from the layer's state, far cheaper than the test it can spare.

    Learned as in BERxiT (Xin et al. 2021) and CALM (Schuster et al. 2022), but of the entropy itself, so that one
    head serves every τ.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers - 1, width))
        self.bias = nn.Parameter(torch.full((layers - 1,), 2.5))  # nats: near a usual entropy

    def forward(self, state: Tensor, m: int) -> Tensor:
        """h_m `(..., d)` -> the guess, in nats, `(...)`."""
        normalised = F.layer_norm(state, state.shape[-1:])
        return normalised @ self.weight[m - 1] + self.bias[m - 1]


class DeeCap(nn.Module):
    """Encoder over regions, decoder over words, and an exit after each decoder layer."""

    def __init__(self, config: DeeCapConfig) -> None:
        super().__init__()
        self.config = config
        width, layers = config.width, config.decoder_layers
        sizes = (width, config.heads, config.feed_forward, config.dropout)
        self.feature_norm = nn.LayerNorm(config.feature_width)
        self.feature_in = nn.Linear(config.feature_width, width)
        self.box_in = nn.Linear(5, width)  # x0, y0, x1, y1, area
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(config.encoder_layers))
        self.memory_norm = nn.LayerNorm(width)
        self.word_embedding = nn.Embedding(config.vocabulary_size, width)
        self.position_embedding = nn.Embedding(config.max_words + 1, width)  # BOS and every word but EOS are read
        nn.init.normal_(self.word_embedding.weight, std=width**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=width**-0.5)
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(layers))
        self.dropout = CheapDropout(config.dropout)
        self.head_norm = nn.LayerNorm(width)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        if config.exits in ("deecap", "shallow") and layers > 1:
            self.shallow_norm = nn.LayerNorm(width)
            self.shallow_fusion = make_fusion(config.fusion, width, layers)
        if config.exits == "deecap" and layers > 1:
            self.imitation = Imitation(width, layers, config.imitation_width or width)
            self.deep_norm = nn.LayerNorm(width)
            self.deep_fusion = make_fusion(config.fusion, width, layers)
            self.gate = Gate(width)
        if config.exit_head and layers > 1:
            self.exit_head = ExitHead(width, layers)

    @property
    def layers(self) -> int:
        """N."""
        return self.config.decoder_layers

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The decoder's layers, with their type."""
        return cast(list[DecoderLayer], list(self.decoder))

    def encode(self, features: Tensor, boxes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Regions `(B, R, F)` with boxes `(B, R, 4)` -> memory `(B, R, d)`; `mask (B, R)` True where a region is."""
        area = (boxes[..., 2:3] - boxes[..., 0:1]) * (boxes[..., 3:4] - boxes[..., 1:2])
        x = self.feature_in(self.dropout(self.feature_norm(features))) + self.box_in(torch.cat((boxes, area), -1))
        attention_mask = None if mask is None else mask[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, attention_mask)
        return self.memory_norm(x)

    def embed(self, tokens: Tensor, first_position: int = 0) -> Tensor:
        """h_0: word numbers `(G, T)` at positions from `first_position` -> `(G, T, d)`."""
        positions = torch.arange(first_position, first_position + tokens.shape[1], device=tokens.device)
        scale = math.sqrt(self.config.width)  # the tied embedding is small, as the head needs it
        return self.dropout((self.word_embedding(tokens) + self.position_embedding(positions)) * scale)

    def hidden_states(
        self, memory: Tensor, tokens: Tensor, mask: Tensor | None = None, left: Tensor | None = None
    ) -> list[Tensor]:
        """Teacher-forced h_1 .. h_N, each `(G, T, d)`, of captions `(G, T)` that start with BOS.

        G is a multiple of the images B, the captions of one image side by side. Padding at a caption's end needs
        no mask: attention is causal, and the loss leaves padding out. Where `left (G, T)` is true a word is treated
        as one that left at layer 1: what deeper layers see of it is h_1, copied up.
        """
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        regions_mask = None if mask is None else mask[:, None, None, :]
        x = self.embed(tokens)
        states: list[Tensor] = []
        for layer in self.decoder_layers:
            seen = x if left is None or not states else torch.where(left[..., None], states[0], x)
            regions = layer.regions.keys_values(memory)
            x = layer(x, layer.word_keys_values(seen), causal, regions, regions_mask)
            states.append(x)
        return states

    def exit_states(self, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """h_1..h_N -> z_1..z_N, and for each m < N the imitated stack `(N - m, ..., d)` (none without imitation).

        The slow and complete way, for training; `exit_state` gives one z_m.
        """
        if self.config.exits in ("plain", "final") or self.layers == 1:
            return list(states), []
        shallow = self.shallow_fusion.prefixes([self.shallow_norm(state) for state in states[:-1]])
        if self.config.exits == "shallow":
            return [*shallow, states[-1]], []
        exits, imitations = [], []
        for m, fused in enumerate(shallow, start=1):
            imitated = self.imitation(states[m - 1], m)
            imitations.append(imitated)
            exits.append(self._gated(fused, imitated, m))
        return [*exits, states[-1]], imitations

    def exit_state(self, states: Sequence[Tensor], m: int) -> Tensor:
        """z_m from h_1..h_m alone, `(..., d)`: all that a word leaving at layer m has."""
        if m == self.layers or self.config.exits == "plain":
            return states[m - 1]
        if self.config.exits == "final":
            raise ValueError("a model with exits='final' has no exit before its last layer")
        shallow = self.shallow_fusion([self.shallow_norm(state) for state in states[:m]], 1)
        if self.config.exits == "shallow":
            return shallow
        return self._gated(shallow, self.imitation(states[m - 1], m), m)

    def _gated(self, shallow: Tensor, imitated: Tensor, m: int) -> Tensor:
        """Equation 8; imitated `(N - m, ..., d)`."""
        deep = self.deep_fusion(list(self.deep_norm(imitated)), m + 1)
        alpha = self.gate(shallow, deep)
        return alpha * shallow + (1 - alpha) * deep

    def logits(self, z: Tensor) -> Tensor:
        """The shared, tied vocabulary head: `(..., d)` -> `(..., V)`."""
        return F.linear(self.head_norm(z), self.word_embedding.weight, self.head_bias)

    def forward(
        self, features: Tensor, boxes: Tensor, tokens: Tensor, mask: Tensor | None = None, left: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Teacher-forced logits of every exit `(G, T, V)`, with the hidden states and imitations they came from.

        `left` as in `hidden_states`.
        """
        states = self.hidden_states(self.encode(features, boxes, mask), tokens, mask, left)
        exits, imitations = self.exit_states(states)
        return [self.logits(z) for z in exits], states, imitations
