"""The engine held to the plain decoder: requests that come at different steps, and what each must get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from model.decoding.beam import Step
from model.decoding.search import greedy_search, ranked_search
from model.deecap import DeeCap
from model.engine.engine import Engine
from model.engine.precision import choose_precision
from model.exits import ExitPolicy

FLOAT64 = choose_precision("cpu", "float64")
KINDS = [
    ("deecap", "concatenation"),
    ("deecap", "average"),
    ("shallow", "concatenation"),
    ("shallow", "average"),
    ("plain", "concatenation"),
    ("final", "concatenation"),
]
POLICIES = [
    ExitPolicy((1,)),
    ExitPolicy((1, 2, 3)),
    ExitPolicy((2,)),
    ExitPolicy((1,), skipped="copied"),
    ExitPolicy((1, 3), skipped="copied"),
    ExitPolicy((1, 3), margin=0.1),
    ExitPolicy((1, 2), skipped="copied", margin=-0.2),
]


@dataclass(frozen=True)
class Asked:
    """One request and when it comes."""

    memory: Tensor
    tau: float
    beam: int
    arrival: int  # the step before which it is submitted


def expected(model: DeeCap, policy: ExitPolicy, asked: Asked) -> list[Step]:
    """What the plain decoder says of the request alone."""
    memory = asked.memory[None]
    if asked.beam == 1:
        return greedy_search(model, memory, [asked.tau], policy).captions[0]
    return ranked_search(model, memory, [asked.tau], policy, asked.beam)[0][0][0]


def run(engine: Engine, requests: Sequence[Asked]) -> list[list[Step]]:
    """Feeds the requests in as they come; their captions in the order of `requests`."""
    numbers: dict[int, int] = {}
    captions: dict[int, list[Step]] = {}
    step = 0
    while len(captions) < len(requests):
        for index, asked in enumerate(requests):
            if asked.arrival == step:
                numbers[engine.submit(asked.memory, asked.tau, asked.beam)] = index
        engine.step()
        step += 1
        for over in engine.finished():
            assert over.reason == "ended"
            captions[numbers[over.number]] = over.steps
    assert not engine.busy
    return [captions[index] for index in range(len(requests))]


def same(found: Sequence[Step], wanted: Sequence[Step], tolerance: float = 1e-9) -> None:
    assert [(step.token, step.exit_layer) for step in found] == [(step.token, step.exit_layer) for step in wanted]
    for name in ("entropy", "log_probability"):
        values = [getattr(step, name) for step in wanted]
        assert [getattr(step, name) for step in found] == pytest.approx(values, rel=0, abs=tolerance)


def entropies(model: DeeCap, memory: Tensor) -> list[float]:
    """Entropies that exits really have, to draw thresholds from."""
    if model.config.exits == "final":
        return [1.0]
    policy = ExitPolicy.every_layer(model.layers)
    found = [greedy_search(model, memory[None], [tau], policy).captions[0] for tau in (0.0, 1.0, math.inf)]
    return [step.entropy for steps in found for step in steps]


def draw(model: DeeCap, random: np.random.Generator, count: int) -> list[Asked]:
    """Requests of all sorts: thresholds near entropies that come up, beams, images of 1 to 6 regions, arrivals."""
    requests = []
    for _ in range(count):
        regions = int(random.integers(1, 7))
        memory = torch.from_numpy(random.normal(size=(regions, model.config.width)))
        tau = float(random.choice([0.0, math.inf, *random.choice(entropies(model, memory), 4)]) + 1e-6)
        beam = int(random.choice([1, 1, 1, 2, 3]))
        requests.append(Asked(memory, tau if random.random() > 0.1 else 0.0, beam, int(random.integers(0, 8))))
    return requests
