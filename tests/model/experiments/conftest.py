"""A tiny data set with region features, systems of the paper on it, and the rows that they measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.evaluation.result_rows import ResultRow
from model.experiments.measure import measure, read_split
from model.experiments.systems import System, from_run
from model.training.settings import read_settings
from model.vocabulary import EOS, Vocabulary

WORDS = ("red", "green", "blue", "dog", "cat", "runs")
PHOTOS = 24

CONFIG = """
name = "{name}"
seed = 0
least_count = 1
budget = "tiny"

[data]
captions = "captions.json"
photos = "photos"
region_features = "regions"

[model]
width = 16
heads = 2
feed_forward = 16
encoder_layers = 1
decoder_layers = {layers}
max_words = 6
dropout = 0.0
exits = "{exits}"
fusion = "{fusion}"

[[stage]]
name = "exits"
kind = "exits"
epochs = 1
learning_rate = 1e-3
batch_images = 4
captions_per_image = 2
"""
# Name, exits, layers, fusion
SYSTEMS = [
    ("tf-complete", "final", 4, "concatenation"),
    ("tf-2l", "final", 2, "concatenation"),
    ("tf-ee", "plain", 4, "concatenation"),
    ("deecap-concatenation", "deecap", 4, "concatenation"),
    ("deecap-average", "deecap", 4, "average"),
    ("deecap-shallow", "shallow", 4, "concatenation"),
]


@pytest.fixture(scope="session")
def config_text() -> Callable[..., str]:
    """`config_text(name=, exits=, layers=, fusion=)`: a configuration of the tiny data."""
    return CONFIG.format


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "regions").mkdir()
    random = np.random.default_rng(0)
    images = []
    for number in range(PHOTOS):
        texts = [[str(word) for word in random.choice(WORDS, random.integers(2, 7))] for _ in range(2 + number % 3)]
        texts[0][0] = "unheard" if number == 0 else texts[0][0]
        images.append({"filename": f"{number}.jpg", "split": "val", "sentences": [{"tokens": text} for text in texts]})
        count = 2 + number % 2
        boxes = np.tile([0.0, 0.0, 1.0, 1.0], (count, 1))
        np.savez(folder / "regions" / f"{number}.npz", features=random.normal(size=(count, 5)), boxes=boxes)
    images.append({"filename": "none.jpg", "split": "val", "sentences": []})
    (folder / "captions.json").write_text(json.dumps({"images": images}))
    return folder


@pytest.fixture(scope="session")
def make_system(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., System]:
    """`make_system(name, exits, layers, fusion)`: from a checkpoint with lively random weights."""
    work = tmp_path_factory.mktemp("work")

    def make(name: str, exits: str, layers: int, fusion: str = "concatenation") -> System:
        config = work / f"{name}.toml"
        config.write_text(CONFIG.format(name=name, exits=exits, layers=layers, fusion=fusion))
        settings = read_settings(config)
        vocabulary = Vocabulary.build([[word] for word in WORDS], 1)
        torch.manual_seed(len(name))
        model = DeeCap(DeeCapConfig(vocabulary_size=len(vocabulary), feature_width=5, **settings.model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            model.head_bias[EOS] += 1.0
        (work / name).mkdir(exist_ok=True)
        state = {"stage": "exits", "progress": {}, "vocabulary": list(vocabulary.words), "model": model.state_dict()}
        torch.save(state, work / name / "exits.pt")
        return from_run(settings, work / name, data)

    return make


@pytest.fixture(scope="session")
def rows(make_system: Callable[..., System], data: Path) -> list[ResultRow]:
    """One of each system."""
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    split = read_split(data / "captions.json", "captions.json", "val")
    return [measure(make_system(*told), split, None, "deecap experiment measure ...", meteor=False) for told in SYSTEMS]
