"""The engine's passes are fit to be CUDA graphs: replayed from a tape on a CPU, and captured where there is a GPU.

`Tapes` does on a CPU what a capture does: it notes the operators of one run with the very tensors they had, and a
replay runs these alone. What a replay then reads from Python, or keeps where others write, shows as a wrong word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.deecap import DeeCap
from model.engine.backend import Backend, Span
from model.engine.buckets import bucket, buckets
from model.engine.engine import Engine
from model.engine.graphs import ATTENTION, Work, as_it_is
from model.engine.passes import Passes
from model.engine.precision import Precision, choose_precision
from model.engine.torch_backend import TorchBackend
from model.exits import ExitPolicy
from model.vocabulary import BOS, EOS
from tests.model.engine_checks import FLOAT64, KINDS, POLICIES, Asked, draw, expected, run, same

MakeModel = Callable[..., DeeCap]

# Operators with which a pass would ask the device for a number, or give results of a size that depends on numbers.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "item", "equal")


class Tape(TorchDispatchMode):
    """Operators in the order in which they ran, with what went in and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} inside a pass"
        given = func(*args, **(kwargs or {}))
        before = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        fresh = [
            (place, one)
            for place, one in enumerate(tree_leaves(given))
            if isinstance(one, Tensor) and _memory(one) not in before
        ]
        self.calls.append((func, args, kwargs or {}, fresh))
        return given

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for place, one in fresh:
                one.copy_(again[place])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spoil(tensors: list[Tensor]) -> None:
    """As memory is that something else has used since."""
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30) if tensor.dtype != torch.bool else None


class Tapes:
    """In the place of `Graphs`: warms up, records, and replays over memory that all of its passes share."""

    made = 0

    def __init__(self) -> None:
        Tapes.made += 1
        self.count = 0
        self._given: list[Tensor] = []  # of the last replay

    def __call__(self, work: Work) -> Work:
        work()
        tape = Tape()
        with tape:
            given = work()
        self.count += 1
        kept = {_memory(one) for one in given}
        between = [one for *_, fresh in tape.calls for _, one in fresh if _memory(one) not in kept]
        _spoil([*between, *given])

        def replay() -> tuple[Tensor, ...]:
            _spoil(self._given)
            tape.replay()
            _spoil(between)
            self._given = list(given)
            return given

        return replay


@dataclass(frozen=True)
class Taped(Precision):
    """float64 on a CPU, over tapes."""

    def backend(self, model: DeeCap, tested: Any, slots: int) -> Backend:
        return TorchBackend(model, tested, slots, torch.float64, "cpu", Tapes)


TAPED = Taped("float64", "cpu")


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 9, 32])
def test_a_bucket_is_the_smallest_size_that_holds_them(largest: int) -> None:
    sizes = buckets(largest)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= 2 + np.log2(largest)
    for count in range(1, largest + 1):
        assert bucket(count, largest) == min(size for size in sizes if size >= count)


@pytest.mark.parametrize(
    ("exits", "fusion"),
    [KINDS[0], KINDS[-1], *(pytest.param(*kind, marks=pytest.mark.long) for kind in KINDS[1:-1])],
)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.tested}-{policy.skipped}-{policy.margin}")
def test_replays_give_each_request_what_the_plain_decoder_gives_it_alone(
    make_model: MakeModel, exits: str, fusion: str, policy: ExitPolicy
) -> None:
    """Images of up to 40 regions, so that room for them is made anew in between."""
    if exits == "final":
        policy = replace(policy, tested=(), margin=None)
    seed = 7
    model = make_model(exits, fusion, seed, exit_head=True, imitation_width=5)
    random = np.random.default_rng(seed)
    large = torch.from_numpy(random.normal(size=(40, model.config.width)))
    requests = [*draw(model, random, 8), Asked(large, 1.0, 2, 5)]
    for found, asked in zip(run(Engine(model, policy, TAPED, slots=6), requests), requests, strict=True):
        same(found, expected(model, policy, asked))


def endless(make_model: MakeModel, **sizes: int) -> DeeCap:
    """A network that never says EOS, so that captions have their full length."""
    model = make_model(seed=1, **sizes)
    with torch.no_grad():
        model.head_bias[EOS] = -100.0
    return model


def test_passes_are_prepared_once_each_and_anew_only_for_more_regions(make_model: MakeModel) -> None:
    model = endless(make_model)
    made: list[list[Work]] = []

    def count() -> Callable[[Work], Work]:
        made.append([])
        return lambda work: made[-1].append(work) or work

    backend = TorchBackend(model, (1,), 5, torch.float64, "cpu", count)
    memory = torch.zeros(4, 16, dtype=torch.float64)
    backend.admit([0, 1, 2, 3, 4], memory)
    usual = 3 * len(buckets(5))  # layer 1, the rest, all at once
    assert [len(works) for works in made] == [0, usual]
    deeper, slots = Span(2, 4, False), np.arange(5)
    for missing in (0, 1, 1, 2, 3):
        for used in (1, 3, 4, 5):
            reached = backend.start(Span(1, 1, True), slots[:used], np.full(used, missing), np.full(used, BOS))
            words = np.tile(np.arange(missing + 1), (used, 1))
            backend.go_on(deeper, slots[:used], words, reached, slots[:used])
    assert len(made[-1]) == usual + 2 * 3  # catch-up of two words, or up to four, of 1, 4 and 5 rows
    backend.admit([0], torch.zeros(32, 16, dtype=torch.float64))
    assert len(made) == 2
    backend.admit([0], torch.zeros(33, 16, dtype=torch.float64))
    assert [len(works) for works in made[2:]] == [usual]


def test_rows_that_pad_a_batch_touch_no_slot(make_model: MakeModel) -> None:
    model = make_model(seed=2)
    passes = Passes(model, (1,), 4, torch.zeros((), dtype=torch.float64))
    cache = passes.cache
    cache.make_room(3)
    cache.admit([0, 1, 2, 3], torch.randn(4, 2, 2, 3, 8, dtype=torch.float64))
    random = torch.Generator().manual_seed(0)
    for kept in (cache.words, cache.states):
        kept.copy_(torch.randn(kept.shape, generator=random, dtype=torch.float64))
    states = cache.states.view(5, -1, 16)
    words_before, states_before = cache.words.clone(), states.clone()
    padding = [cache.scratch, 0, 0, 0]
    alone = torch.tensor([[2, 1, 3, 5]]).T
    padded = torch.tensor([[2, 1, 3, 5], padding, padding, padding]).T
    with torch.inference_mode():
        for span, many in ((Span(1, 1, True), 1), (Span(2, 4, False), 4)):
            given = []
            for rows in (alone, padded):
                cache.words.copy_(words_before)
                states.copy_(states_before)
                given.append([one[:1] for one in passes.run(span, many, rows)])
                for slot in (0, 1, 3):
                    assert torch.equal(cache.words[:, :, slot], words_before[:, :, slot])
                    assert torch.equal(states[slot], states_before[slot])
            assert not torch.equal(cache.words[:, :, 2], words_before[:, :, 2])
            for one, other in zip(*given, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        passes.copy_up(Span(2, 4, False), torch.tensor([[cache.scratch] * 3, [0] * 3]))
        for slot in (0, 1, 3):
            assert torch.equal(cache.words[:, :, slot], words_before[:, :, slot])


@pytest.mark.parametrize("skipped", ["computed", "copied"])
def test_what_one_image_made_nan_leaves_nothing_to_the_next(make_model: MakeModel, skipped: str) -> None:
    """Whatever a slot still holds is weighed by 0, and 0 times NaN is NaN."""
    model, policy = endless(make_model), ExitPolicy((1,), skipped=skipped)
    nan = torch.full((9, 16), torch.nan, dtype=torch.float64)
    good = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    engine = Engine(model, policy, FLOAT64, slots=1)
    for tau in (0.0, 1.3):  # all words go through all layers, then some
        run(engine, [Asked(nan, 0.0, 1, 0)])
        asked = Asked(good, tau, 1, 0)
        same(run(engine, [asked])[0], expected(model, policy, asked))


@pytest.mark.parametrize(("exits", "fusion"), KINDS)
def test_a_pass_needs_nothing_from_another_device(make_model: MakeModel, exits: str, fusion: str) -> None:
    """With weights and buffers on a device that is not the CPU, an operator that also reads from the CPU raises."""
    model = make_model(exits, fusion, exit_head=True)
    tested = () if exits == "final" else (1, 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                moved = fake.from_tensor(parameter.detach()).to("meta")
                module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        like = torch.zeros((), dtype=torch.bfloat16, device="meta")
        passes = Passes(model, tested, 8, like)
        assert passes.cache.make_room(5)
        passes.cache.admit([0, 1], passes.network.region_keys_values(like.new_zeros(5, 16)))
        rows = torch.zeros(4, 4, dtype=torch.int64, device="meta")
        spans = [(Span(1, 4, False), 1)]
        if tested:
            spans += [(Span(1, 1, True), 1), (Span(2, 3, True), 4), (Span(4, 4, False), 2)]
            passes.copy_up(Span(2, 3, True), rows[:2])
        for span, many in spans:
            decided, log_probabilities = passes.run(span, many, rows)
            assert (decided.device.type, decided.dtype) == ("meta", torch.float32)
            assert decided.shape == (4, 4 if tested and span.last < 4 else 3)
            assert (log_probabilities.shape, log_probabilities.dtype) == ((4, 19), torch.float32)


# On a GPU ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eager(Precision):
    """On the device as `Graphs` runs it, kernels of attention included, but without graphs."""

    def backend(self, model: DeeCap, tested: Any, slots: int) -> Backend:
        def with_kernels(work: Work) -> Work:
            def run_it() -> tuple[Tensor, ...]:
                with torch.nn.attention.sdpa_kernel(ATTENTION):
                    return as_it_is(work)()

            return run_it

        return TorchBackend(model, tested, slots, getattr(torch, self.name), self.device, lambda: with_kernels)


def on_gpu(model: DeeCap, requests: list[Asked]) -> tuple[DeeCap, list[Asked]]:
    return copy.deepcopy(model).cuda(), [replace(asked, memory=asked.memory.cuda()) for asked in requests]


@pytest.mark.gpu
@pytest.mark.parametrize(("exits", "fusion"), KINDS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.tested}-{policy.skipped}-{policy.margin}")
def test_graphs_in_float64_decide_as_the_plain_decoder(
    make_model: MakeModel, exits: str, fusion: str, policy: ExitPolicy
) -> None:
    if exits == "final":
        policy = replace(policy, tested=(), margin=None)
    model = make_model(exits, fusion, 3, exit_head=True, imitation_width=5)
    random = np.random.default_rng(3)
    large = torch.from_numpy(random.normal(size=(40, model.config.width)))
    requests = [*draw(model, random, 12), Asked(large, 1.0, 2, 5)]
    moved, there = on_gpu(model, requests)
    found = run(Engine(moved, policy, choose_precision("cuda", "float64"), slots=6), there)
    for steps, asked in zip(found, requests, strict=True):
        same(steps, expected(model, policy, asked))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_a_graph_gives_what_its_pass_gives_without_one(make_model: MakeModel, name: str) -> None:
    """To the bit: the kernels are the same."""
    model = make_model(seed=4, width=64, heads=2, feed_forward=128)
    policy = ExitPolicy((1, 3))
    moved, requests = on_gpu(model, draw(model, np.random.default_rng(4), 30))
    captured = run(Engine(moved, policy, choose_precision("cuda", name), slots=8), requests)
    assert captured == run(Engine(moved, policy, Eager(name, "cuda"), slots=8), requests)


@pytest.mark.gpu
def test_a_step_waits_for_the_device_in_no_other_way_than_for_its_decisions(make_model: MakeModel) -> None:
    model = endless(make_model).cuda()
    engine = Engine(model, ExitPolicy((1,), skipped="copied"), choose_precision("cuda"), slots=4)
    generator = torch.Generator().manual_seed(0)
    requests = [Asked(torch.randn(4, 16, generator=generator).cuda(), 1.3, 1, 0) for _ in range(4)]
    run(engine, requests)  # which captures all that is needed
    for asked in requests:
        engine.submit(asked.memory, asked.tau)
    engine.step()  # admits them
    torch.cuda.set_sync_debug_mode("error")  # about everything that waits, but for events
    try:
        for _ in range(model.config.max_words - 2):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.busy


@pytest.mark.gpu
def test_captions_of_a_trained_network_in_bfloat16_are_mostly_those_of_float32() -> None:
    """The shipped network over memories of its own encoder: the share of captions that are the same, word for word."""
    from model.bundle import load_bundle
    from service.settings import shipped_bundle

    bundle = load_bundle(shipped_bundle())
    model = bundle.model.cuda()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        features = torch.randn(64, 30, model.config.feature_width, generator=generator).cuda()
        corners = torch.rand(64, 30, 2, 2, generator=generator).sort(2).values.flatten(2).cuda()
        memories = list(model.encode(features, corners, torch.ones(64, 30, dtype=torch.bool, device="cuda")))
    for tau in (0.0, bundle.speeds.tiers["turbo"]):
        requests = [Asked(memory, tau, 1, 0) for memory in memories]
        said = {
            name: run(Engine(model, bundle.policy, choose_precision("cuda", name), slots=32), requests)
            for name in ("bfloat16", "float32")
        }
        pairs = zip(said["bfloat16"], said["float32"], strict=True)
        alike = sum([step.token for step in one] == [step.token for step in other] for one, other in pairs)
        print(f"tau {tau}: {alike} of {len(requests)} captions identical")
        assert alike >= len(requests) // 2
