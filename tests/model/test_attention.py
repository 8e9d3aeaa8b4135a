"""Where words looked is what the decoder's layers used: against the weights that a forward pass really took."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image

from model.attention import attention_to_regions
from model.captioner import Captioner
from model.deecap import DeeCap
from model.vocabulary import BOS

WORDS, REGIONS = (5, 9, 7, 12, 6), 8


def used_weights(network: DeeCap, memory: torch.Tensor, left: torch.Tensor | None) -> list[torch.Tensor]:
    """Of each layer, the weights `(T, R)` that its attention to the regions took in a teacher-forced pass."""
    taken: list[torch.Tensor] = []
    for layer in network.decoder_layers:
        weights = layer.regions.weights

        def recording(*arguments: torch.Tensor, weights: Callable[..., torch.Tensor] = weights) -> torch.Tensor:
            taken.append(weights(*arguments))
            return taken[-1]

        layer.regions.weights = recording
    network.hidden_states(memory, torch.tensor([[BOS, *WORDS[:-1]]]), left=left)
    for layer in network.decoder_layers:
        del layer.regions.weights
    return [each[0].mean(0) for each in taken]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("exits", [(1, 1, 4, 1, 4), (4, 1, 1, 4, 1), (1, 1, 1, 1, 1), (4, 4, 4, 4, 4)])
@torch.inference_mode()
def test_it_is_what_the_layers_used(make_model: Callable[..., DeeCap], exits: tuple[int, ...], copied: bool) -> None:
    network = make_model()
    memory = torch.randn(1, REGIONS, 16, dtype=torch.float64)
    left = torch.tensor([[m == 1 for m in exits]]) if copied else None
    layers = used_weights(network, memory, left)
    wanted = torch.stack([layers[m - 1][i] for i, m in enumerate(exits)])
    found = attention_to_regions(network, memory, WORDS, exits, copied=copied)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones(len(WORDS), dtype=torch.float64))
    assert found.std() > 1e-3  # they do not look everywhere alike


@torch.inference_mode()
def test_a_word_that_left_between_is_copied_from_there(make_model: Callable[..., DeeCap]) -> None:
    network = make_model()
    memory = torch.randn(1, REGIONS, 16, dtype=torch.float64)
    at_two, at_one, computed = (
        attention_to_regions(network, memory, WORDS, (first, 4, 4, 4, 4), copied=copied)
        for first, copied in ((2, True), (1, True), (2, False))
    )
    assert not torch.allclose(at_two[1:], at_one[1:])
    assert not torch.allclose(at_two[1:], computed[1:])
    torch.testing.assert_close(at_two[0], computed[0])


@torch.inference_mode()
def test_later_words_change_nothing(make_model: Callable[..., DeeCap]) -> None:
    network = make_model()
    memory = torch.randn(1, REGIONS, 16, dtype=torch.float64)
    whole = attention_to_regions(network, memory, WORDS, (4, 1, 3, 2, 4), copied=False)
    begin = attention_to_regions(network, memory, WORDS[:3], (4, 1, 3), copied=False)
    torch.testing.assert_close(whole[:3], begin)


def test_a_captioner_tells_it_of_each_word_and_region(random_bundle) -> None:
    captioner = Captioner.load(random_bundle.folder, "cpu")
    regions = captioner.look(Image.linear_gradient("L"))
    caption = captioner.describe(regions, "turbo")
    found = captioner.attention(regions, caption)
    assert [len(row) for row in found] == [len(regions.boxes)] * len(caption.words)
    assert all(sum(row) == pytest.approx(1.0, abs=1e-5) for row in found)
    assert captioner.describe(regions, "turbo") == caption  # it leaves nothing behind
