"""The engine on the network that ships: in float64 it decides exactly as the plain decoder, over photos in pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.bottom_up.extractor import Extractor
from model.bundle import EXTRACTOR, Bundle, load_bundle
from model.engine.engine import Engine
from service.settings import shipped_bundle
from tests.model.engine_checks import FLOAT64, Asked, entropies, expected, run, same

SAMPLES = sorted((Path(__file__).parents[2] / "samples").glob("*.jpg"))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    loaded = load_bundle(shipped_bundle())
    loaded.model.double()
    return loaded


@pytest.fixture(scope="module")
def memories(bundle: Bundle) -> list[Tensor]:
    """What the encoder makes of random pieces of the sample photos: `(R, d)`, R from 5 to all."""
    extractor = Extractor(shipped_bundle() / EXTRACTOR, "cpu", 1)
    looked = extractor.look([Image.open(path) for path in SAMPLES])
    random = np.random.default_rng(0)
    found = []
    with torch.inference_mode():
        for _ in range(40):
            regions = looked[random.integers(len(looked))]
            kept = np.sort(random.permutation(len(regions.boxes))[: random.integers(5, len(regions.boxes) + 1)])
            features, boxes = (
                torch.from_numpy(each[kept]).double()[None] for each in (regions.features, regions.boxes)
            )
            found.append(bundle.model.encode(features, boxes, torch.ones(1, len(kept), dtype=torch.bool))[0])
    return found


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.long)])
def test_any_mix_of_requests_gives_each_what_the_plain_decoder_gives_it_alone(
    bundle: Bundle, memories: list[Tensor], count: int
) -> None:
    random = np.random.default_rng(count)
    taus = np.array(entropies(bundle.model, memories[0]))
    policies = [bundle.policy, replace(bundle.policy, skipped="computed"), replace(bundle.policy, tested=(1, 2, 4))]
    done = 0
    while done < count:
        policy = policies[random.integers(len(policies))]
        requests = [
            Asked(
                memories[random.integers(len(memories))],
                float(random.choice([0.0, random.choice(taus) + 1e-6, *bundle.speeds.tiers.values()])),
                int(random.choice([1, 1, 1, 1, 2, 3])),
                int(random.integers(0, 12)),
            )
            for _ in range(20)
        ]
        found = run(Engine(bundle.model, policy, FLOAT64, int(random.integers(3, 17))), requests)
        for steps, asked in zip(found, requests, strict=True):
            same(steps, expected(bundle.model, policy, asked))
        done += len(requests)
