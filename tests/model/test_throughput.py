"""Floating-point operations are counted as by hand, and timed at their best."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from model.training import throughput
from model.training.throughput import TYPES, Machine, count_flops, machine


def test_products_are_counted_forward_and_backward() -> None:
    inputs, weights = torch.randn(6, 5), torch.randn(5, 3, requires_grad=True)

    def learn() -> float:
        loss = (inputs @ weights).square().sum()
        loss.backward()
        return loss.item()

    loss, flops = count_flops(learn)
    assert loss > 0
    assert weights.grad is not None
    assert flops == 2 * (2 * 6 * 5 * 3)  # the product, and the gradient of the weights; the inputs need none


def test_batches_convolutions_and_bfloat16_count_too() -> None:
    query, key, image, kernel = (
        torch.randn(2, 4, 8),
        torch.randn(2, 8, 7),
        torch.randn(1, 3, 6, 6),
        torch.randn(5, 3, 1, 1),
    )
    with torch.autocast("cpu", torch.bfloat16):
        _, flops = count_flops(lambda: (query @ key, torch.conv2d(image, kernel)))
    assert flops == 2 * (2 * 4 * 8 * 7) + 2 * (6 * 6 * 3 * 5)


def test_the_faster_type_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for fast in TYPES:
        monkeypatch.setattr(throughput, "_matmul_flops", lambda _, dtype, fast=fast: 2e9 if dtype == fast else 1e9)
        found = machine.__wrapped__(cpu)
        assert found == Machine(fast, 2e9)
        with found.autocast(cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == fast


def test_the_peak_is_the_best_product_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products, of 50, 10 and 40 milliseconds, and then the time is over."""
    ticks = iter([0.0, 0.0, 0.05, 0.05, 0.05, 0.06, 0.06, 0.06, 0.10, 0.11])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setitem(throughput.SIDES, "cpu", 8)
    assert throughput._matmul_flops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 8**3 / 0.01)
    assert next(ticks, None) is None
