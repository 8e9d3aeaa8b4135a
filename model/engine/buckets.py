"""The few sizes that passes are padded up to, so that few CUDA graphs serve every batch."""

from __future__ import annotations


def bucket(count: int, largest: int) -> int:
    """The smallest size that holds `count`, from 1 to `largest`: a power of two, or `largest`."""
    return min(1 << (count - 1).bit_length(), largest)


def buckets(largest: int) -> list[int]:
    """All sizes, rising."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]
