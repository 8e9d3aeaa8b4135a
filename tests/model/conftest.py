"""Tiny networks with lively random weights, and one random bundle for the whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import model.random_bundle
from model.bottom_up.trunk import Trunk
from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.vocabulary import EOS


@pytest.fixture
def make_model() -> Callable[..., DeeCap]:
    """`make_model(exits, fusion, seed, **sizes)`: a float64 network in eval mode.

    No parameter is at its start value, so that a bias or a norm left out shows, and the head is sharp enough for
    entropies to spread from almost none to almost ln V.
    """

    def make(exits: str = "deecap", fusion: str = "concatenation", seed: int = 0, **sizes: int) -> DeeCap:
        kept = {"vocabulary_size": 19, "feature_width": 6, "width": 16, "heads": 2, "feed_forward": 24}
        kept |= {"encoder_layers": 1, "decoder_layers": 4, "max_words": 7}
        torch.manual_seed(seed)
        network = DeeCap(DeeCapConfig(**{**kept, **sizes}, dropout=0.0, exits=exits, fusion=fusion)).double().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.4 if parameter.ndim < 2 else 0.05))
            network.word_embedding.weight.mul_(2.0)
            network.head_bias[EOS] += 1.5
        return network

    return make


@dataclass(frozen=True)
class RandomBundle:
    """The folder, and the trunk that its extractor was exported from."""

    folder: Path
    trunk: Trunk


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> RandomBundle:
    """Written once: the export takes seconds. Tests that change files copy them first."""
    folder = tmp_path_factory.mktemp("bundles") / "random"
    folder.mkdir()
    trunks: list[Trunk] = []
    export = model.random_bundle.export_extractor

    def keep_and_export(trunk: Trunk, path: Path) -> None:
        """With He's scale for the weights: torch's own lets the signal die out over so many layers."""
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trunk.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.kaiming_normal_(parameter)
                else:
                    parameter.normal_(std=0.1)
        trunks.append(trunk)
        export(trunk, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.random_bundle, "export_extractor", keep_and_export)
        model.random_bundle.write_random_bundle(folder)
    return RandomBundle(folder, trunks[0])
