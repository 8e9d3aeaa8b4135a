"""A small bundle with random weights, whole in every part: for tests, and to try the service without a trained one."""

from __future__ import annotations

from pathlib import Path

import torch

from model.bottom_up.export import export_extractor
from model.bottom_up.trunk import HEAD_WIDTH, Trunk
from model.bundle import EXTRACTOR, SPEEDS, save_model, write_json
from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.exits import TIERS, ExitPolicy, SpeedRow, SpeedTable
from model.vocabulary import SPECIAL, Vocabulary

WORDS = ("a", "dog", "cat", "man", "woman", "runs", "sits", "on", "the", "grass", "red", "two")


def write_random_bundle(folder: Path, seed: int = 0) -> None:
    """Writes the bundle. Needs the `train` extra, for the export; no downloaded weights."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary([*SPECIAL, *WORDS])
    config = DeeCapConfig(
        vocabulary_size=len(vocabulary),
        feature_width=HEAD_WIDTH,
        width=16,
        heads=2,
        feed_forward=32,
        encoder_layers=1,
        decoder_layers=6,
        dropout=0.0,
    )
    save_model(folder, folder.name, DeeCap(config), vocabulary, ExitPolicy.every_layer(config.decoder_layers))
    export_extractor(Trunk(), folder / EXTRACTOR)
    # Not measured, as nothing of a random model is worth measuring; rising, as every table is.
    rows = tuple(SpeedRow(tau, speed, speed, 0.0, 1.0) for tau, speed in ((0.0, 1.0), (1.0, 2.0), (2.0, 6.0)))
    tiers = {name: (target - 1.0) if target <= 2 else 1.0 + (target - 2.0) / 4 for name, target in TIERS.items()}
    write_json(folder / SPEEDS, SpeedTable(rows, tiers, {"split": "none: random weights"}).to_json())
