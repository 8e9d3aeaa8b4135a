"""The engine decides exactly as the plain decoder does, whatever shares its steps, joins them or leaves them.

Exactly means float64, in PyTorch; ONNX Runtime's float32 graphs, and the int8 ones, are then held to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from model.decoding.beam import Step
from model.decoding.search import greedy_search
from model.deecap import DeeCap
from model.engine.engine import Engine
from model.engine.precision import choose_precision
from model.exits import ExitPolicy
from model.vocabulary import EOS
from tests.model.engine_checks import FLOAT64, KINDS, POLICIES, Asked, draw, expected, run, same

MakeModel = Callable[..., DeeCap]


@pytest.mark.parametrize(("exits", "fusion"), KINDS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.tested}-{policy.skipped}-{policy.margin}")
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 6), marks=pytest.mark.long)], ids=["one", "more"])
def test_any_mix_of_requests_gives_each_what_the_plain_decoder_gives_it_alone(
    make_model: MakeModel, exits: str, fusion: str, policy: ExitPolicy, seeds: range
) -> None:
    if exits == "final":
        policy = replace(policy, tested=(), margin=None)
    for seed in seeds:
        no_repeats = policy.skipped == "copied"
        model = make_model(exits, fusion, seed, exit_head=True, imitation_width=5, no_repeats=no_repeats)
        with torch.no_grad():
            if exits != "final":
                model.exit_head.weight.mul_(3).add_(0.01)
        random = np.random.default_rng(seed)
        requests = draw(model, random, 12)
        slots = int(random.integers(3, 9))
        wanted = [expected(model, policy, asked) for asked in requests]
        for precision, tolerance in ((FLOAT64, 1e-9), (choose_precision("cpu", "float32"), 1e-4)):
            for found, steps in zip(run(Engine(model, policy, precision, slots), requests), wanted, strict=True):
                same(found, steps, tolerance)


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_what_one_image_made_nan_leaves_nothing_to_the_next(make_model: MakeModel, precision: str) -> None:
    """Whatever a slot still holds is weighed by 0, and 0 times NaN is NaN."""
    engine = Engine(endless(make_model), ExitPolicy((1,), "copied"), choose_precision("cpu", precision), slots=1)
    good = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for tau in (0.0, 1.3):
        asked = Asked(good, tau, 1, 0)
        [before] = run(engine, [asked])
        run(engine, [Asked(torch.full((9, 16), torch.nan, dtype=torch.float64), 0.0, 1, 0)])
        same(run(engine, [asked])[0], before, 0.0)


# Requests that end otherwise -------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def memories(model: DeeCap, count: int, regions: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(regions, model.config.width, dtype=torch.float64) for _ in range(count)]


def endless(make_model: MakeModel) -> DeeCap:
    """A network that never says EOS, so that captions have their full length."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.head_bias[EOS] = -100.0
    return model


def test_a_cancelled_request_hands_out_what_there_was_and_leaves_the_others_alone(make_model: MakeModel) -> None:
    model, policy = endless(make_model), ExitPolicy((1, 2))
    images = memories(model, 4)
    engine = Engine(model, policy, FLOAT64, slots=3)
    numbers = [engine.submit(memory, 2.0) for memory in images]  # the fourth waits
    engine.step()
    engine.step()
    engine.cancel(numbers[0])
    engine.cancel(numbers[0])  # over already
    engine.cancel(999)  # never was
    (gone,) = engine.finished()
    assert (gone.number, gone.reason) == (numbers[0], "cancelled")
    whole = [greedy_search(model, memory[None], [2.0], policy).captions[0] for memory in images]
    same(gone.steps, whole[0][:2])
    while engine.busy:
        engine.step()
    over = {one.number: one for one in engine.finished()}
    assert set(over) == set(numbers[1:])
    for number, steps in zip(numbers[1:], whole[1:], strict=True):
        assert over[number].reason == "ended"
        same(over[number].steps, steps)


def test_a_waiting_request_can_be_cancelled(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, ExitPolicy((1,)), FLOAT64, slots=1)
    first, second = (engine.submit(memory, 1.0) for memory in memories(model, 2))
    engine.step()
    engine.cancel(second)
    while engine.busy:
        engine.step()
    over = {one.number: one for one in engine.finished()}
    assert (over[second].steps, over[second].reason) == ([], "cancelled")
    assert (set(over), over[first].reason) == ({first, second}, "ended")


def test_a_deadline_ends_a_request_between_steps_whether_it_runs_or_waits(make_model: MakeModel) -> None:
    model, clock = endless(make_model), Clock()
    engine = Engine(model, ExitPolicy((1,)), FLOAT64, slots=2, clock=clock)
    images = memories(model, 4)
    late = engine.submit(images[0], 1.0, deadline=5.0)
    patient = engine.submit(images[1], 1.0)
    waiting = engine.submit(images[2], 1.0, deadline=6.0)
    engine.step()
    assert engine.finished() == []
    clock.now = 5.0
    engine.step()  # the first one goes, and the waiting one takes its place
    (over,) = engine.finished()
    assert (over.number, over.reason, len(over.steps)) == (late, "deadline", 1)
    clock.now = 7.0
    queued = engine.submit(images[3], 1.0, deadline=7.0)  # too late before it began
    engine.step()
    assert {(one.number, one.reason, len(one.steps)) for one in engine.finished()} == {
        (waiting, "deadline", 1),
        (queued, "deadline", 0),
    }
    while engine.busy:
        engine.step()
    (last,) = engine.finished()
    assert (last.number, last.reason, len(last.steps)) == (patient, "ended", model.config.max_words)


def test_free_slots_count_hypotheses_and_what_waits(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, ExitPolicy((1,)), FLOAT64, slots=5)
    images = memories(model, 2)
    assert (engine.free, engine.busy) == (5, False)
    engine.submit(images[0], 1.0, beam=3)
    assert (engine.free, engine.busy) == (2, True)
    engine.step()
    engine.submit(images[1], 1.0)
    assert engine.free == 1


@pytest.mark.parametrize(
    ("memory", "tau", "beam", "said"),
    [
        (torch.zeros(3, 16), -0.1, 1, "tau"),
        (torch.zeros(3, 16), math.nan, 1, "tau"),
        (torch.zeros(3, 16), 1.0, 0, "beam"),
        (torch.zeros(3, 16), 1.0, 4, "beam"),
        (torch.zeros(0, 16), 1.0, 1, "memory"),
        (torch.zeros(3, 15), 1.0, 1, "memory"),
        (torch.zeros(1, 3, 16), 1.0, 1, "memory"),
    ],
)
def test_a_request_that_cannot_be_is_refused(
    make_model: MakeModel, memory: Tensor, tau: float, beam: int, said: str
) -> None:
    engine = Engine(make_model(), ExitPolicy((1,)), FLOAT64, slots=3)
    with pytest.raises(ValueError, match=said):
        engine.submit(memory, tau, beam)
    assert not engine.busy


def test_an_engine_that_cannot_be_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="slots"):
        Engine(make_model(), ExitPolicy((1,)), FLOAT64, slots=0)
    with pytest.raises(ValueError, match="sequential"):
        Engine(make_model("deecap", "sequential"), ExitPolicy((1,)), FLOAT64)
    with pytest.raises(ValueError, match="precision"):
        choose_precision("cpu", "float8")
    with pytest.raises(ValueError, match="int8"):
        choose_precision("cuda", "int8")


def test_images_with_more_regions_find_room_later(make_model: MakeModel) -> None:
    """The room for regions grows with the images, and those under way keep theirs."""
    model, policy = endless(make_model), ExitPolicy((1,), skipped="copied")
    small, large = memories(model, 1, regions=2)[0], memories(model, 1, regions=9)[0]
    for precision in (FLOAT64, choose_precision("cpu", "float32")):
        requests = [Asked(small, 2.0, 1, 0), Asked(large, 2.0, 1, 2), Asked(small, 2.0, 1, 3)]
        for found, asked in zip(run(Engine(model, policy, precision, slots=3), requests), requests, strict=True):
            wanted = expected(model, policy, asked)
            assert [(step.token, step.exit_layer) for step in found] == [
                (step.token, step.exit_layer) for step in wanted
            ]


@pytest.mark.parametrize("groups", [2, 8])
def test_int8_is_near_float32_and_a_row_does_not_depend_on_its_neighbours(make_model: MakeModel, groups: int) -> None:
    """One step at full depth: log-probabilities of the word chosen, alone and beside `groups` - 1 others."""
    model = make_model(seed=3, width=32, heads=4, feed_forward=64)
    first = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))

    def first_step(precision: str, others: Sequence[Tensor]) -> Step:
        engine = Engine(model, ExitPolicy(()), choose_precision("cpu", precision), slots=1 + len(others))
        number = engine.submit(first, 0.0)
        for other in others:
            engine.submit(other, 0.0)
        engine.step()
        engine.cancel(number)
        return engine.finished()[0].steps[0]

    quiet = first_step("int8", [torch.randn(5, 32)] * (groups - 1))
    loud = first_step("int8", [torch.randn(5, 32) * 1000] * (groups - 1))
    exact = first_step("float32", [])
    assert loud == quiet
    assert abs(quiet.log_probability - exact.log_probability) < 0.3
    assert abs(quiet.entropy - exact.entropy) < 0.3


@pytest.mark.parametrize("policy", [ExitPolicy((1,), "copied"), ExitPolicy((1, 3))], ids=lambda one: one.skipped)
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_a_prepared_engine_makes_no_graph_while_captions_wait(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, policy: ExitPolicy, precision: str
) -> None:
    model = make_model(seed=1)
    requests = draw(model, np.random.default_rng(0), 16)
    engine = Engine(model, policy, choose_precision("cpu", precision), 8)
    engine.prepare()
    made: list[object] = []
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **named: made.append(given) or make(*given))
    run(engine, requests)
    run(engine, requests[:1])
    assert not made
    run(Engine(model, policy, choose_precision("cpu", precision), 8), requests)
    assert made, "an engine that was not prepared makes them as it goes"
