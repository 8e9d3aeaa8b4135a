"""The Transformer's parts: attention over given keys and values, encoder and decoder layers, a cheap dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CheapDropout(nn.Module):
    """Dropout from random bytes: the chance is rounded to 1/256. `nn.Dropout`'s Bernoulli is slow on a CPU."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.dropped = round(chance * 256)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropped == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * (keep.to(x.dtype) * (256 / (256 - self.dropped)))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) whose keys and values the caller computes, keeps and hands in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, S, d)` -> keys and values, each `(B, heads, S, d / heads)`."""
        keys, values = self.key_value(x).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`x (B, T, d)`, keys and values `(B, heads, S, d / heads)` -> `(B, T, d)`; `mask` True where to look."""
        mixed = self.weights(x, keys, mask).to(values.dtype) @ values
        return self.output(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Where each word looks, `(B, heads, T, S)`, every row with the sum 1. Arguments as in `forward`."""
        query = self._split(self.query(x)) / math.sqrt(keys.shape[-1])
        scores = query @ keys.transpose(-1, -2)  # (B, heads, T, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1)

    def _split(self, x: Tensor) -> Tensor:  # (B, S, d) -> (B, heads, S, d / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear-GELU-Linear."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = CheapDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x))))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention over regions, then feed-forward."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, feed_forward, dropout)
        self.dropout = CheapDropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`x (B, R, d)`, `mask (B, 1, 1, R)` True where a region is -> `(B, R, d)`."""
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, *self.attention.keys_values(y), mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(nn.Module):
    """Pre-norm self-attention over words, attention to the regions, feed-forward."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.words_norm, self.regions_norm, self.feed_forward_norm = (nn.LayerNorm(width) for _ in range(3))
        self.words = Attention(width, heads)
        self.regions = Attention(width, heads)
        self.feed_forward = FeedForward(width, feed_forward, dropout)
        self.dropout = CheapDropout(dropout)

    def word_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(G, T, d)`, the layer's input -> keys and values for later words, each `(G, heads, T, d / heads)`."""
        return self.words.keys_values(self.words_norm(x))

    def forward(
        self,
        x: Tensor,
        words: tuple[Tensor, Tensor],
        words_mask: Tensor | None,
        regions: tuple[Tensor, Tensor],
        regions_mask: Tensor | None,
    ) -> Tensor:
        """`x (G, T, d)` against word keys and values `(G, heads, S, ...)` and region ones `(B, heads, R, ...)`.

        G is a multiple of B: the captions of one image stand side by side and share its regions.
        Masks are True where attention may go: `words_mask (T, S)` or broadcastable, `regions_mask (B, 1, 1, R)`.
        """
        x = x + self.dropout(self.words(self.words_norm(x), *words, words_mask))
        y = self.regions_norm(x)
        images = regions[0].shape[0]
        grouped = y.reshape(images, -1, y.shape[-1])  # (B, G/B * T, d)
        x = x + self.dropout(self.regions(grouped, *regions, regions_mask).reshape(y.shape))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
