"""Cached, batched decoding gives what running the whole network on the whole prefix for one image alone gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import FUSIONS
from model.decoding.search import Decoded, Step, beam_search, greedy_search
from model.decoding.state import DecoderState
from model.deecap import DeeCap
from model.exits import ExitPolicy
from model.vocabulary import BOS, EOS, PAD, UNKNOWN

MakeModel = Callable[..., DeeCap]
KINDS = [*(("deecap", fusion) for fusion in FUSIONS), ("shallow", "sequential"), ("plain", "average")]
every_kind = pytest.mark.parametrize(("exits", "fusion"), KINDS)


@dataclass(frozen=True)
class Images:
    """Photos with different numbers of regions, alone and as one padded batch."""

    alone: list[tuple[Tensor, Tensor]]  # features (1, R, F) and boxes (1, R, 4) of each
    features: Tensor
    boxes: Tensor
    mask: Tensor


def images(model: DeeCap, count: int, seed: int = 0) -> Images:
    torch.manual_seed(seed)
    regions = [3 + (5 * index + seed) % 4 for index in range(count)]
    alone = [
        (torch.randn(1, r, model.config.feature_width, dtype=torch.float64), torch.rand(1, r, 4, dtype=torch.float64))
        for r in regions
    ]
    most = max(regions)
    # What lies under the padding must not matter, so it is not zero.
    features = torch.randn(count, most, model.config.feature_width, dtype=torch.float64)
    boxes = torch.rand(count, most, 4, dtype=torch.float64)
    for row, (own, own_boxes) in enumerate(alone):
        features[row, : regions[row]], boxes[row, : regions[row]] = own[0], own_boxes[0]
    mask = torch.arange(most) < torch.tensor(regions)[:, None]
    return Images(alone, features, boxes, mask)


# The oracle: no cache, no batch ------------------------------------------------------------------------------------


@torch.no_grad()
def decide(
    model: DeeCap, memory: Tensor, prefix: Sequence[int], tau: float, tested: Sequence[int]
) -> tuple[np.ndarray, int, float]:
    """Log-probabilities of the next word, the layer it leaves at and the entropy there."""
    states = model.hidden_states(memory, torch.tensor([[BOS, *prefix]]))
    exits, _ = model.exit_states(states)
    for m in [*tested, model.layers]:
        logits = model.logits(exits[m - 1][0, -1]).numpy().copy()
        logits[[PAD, BOS, UNKNOWN]] = -np.inf
        p = np.exp(logits - logits.max())
        p /= p.sum()
        certainty = -sum(one * math.log(one) for one in p if one > 0)
        if m == model.layers or certainty < tau:
            with np.errstate(divide="ignore"):
                return np.log(p), m, certainty
    raise AssertionError("the last layer always decides")


def slow_greedy(model: DeeCap, image: tuple[Tensor, Tensor], tau: float, tested: Sequence[int]) -> list[Step]:
    with torch.no_grad():
        memory = model.encode(*image)
    steps: list[Step] = []
    while len(steps) < model.config.max_words and not (steps and steps[-1].token == EOS):
        log_p, layer, certainty = decide(model, memory, [step.token for step in steps], tau, tested)
        word = int(log_p.argmax())
        steps.append(Step(word, layer, certainty, float(log_p[word])))
    return steps


def slow_beam(model: DeeCap, image: tuple[Tensor, Tensor], tau: float, tested: Sequence[int], beam: int) -> list[Step]:
    """Every extension of every live hypothesis is a candidate; the best `beam` that go on live, and an EOS that is

    among the best `beam` candidates ends its hypothesis. Done with `beam` ended ones, or at the longest caption.
    """
    with torch.no_grad():
        memory = model.encode(*image)
    live: list[list[Step]] = [[]]
    ended: list[list[Step]] = []

    def total(steps: list[Step]) -> float:
        return sum(step.log_probability for step in steps)

    for _ in range(model.config.max_words):
        candidates = []
        for steps in live:
            log_p, layer, certainty = decide(model, memory, [step.token for step in steps], tau, tested)
            candidates += [
                [*steps, Step(word, layer, certainty, float(log_p[word]))]
                for word in range(len(log_p))
                if word not in (PAD, BOS, UNKNOWN)
            ]
        candidates.sort(key=total, reverse=True)
        ended += [steps for steps in candidates[:beam] if steps[-1].token == EOS]
        live = [steps for steps in candidates if steps[-1].token != EOS][:beam]
        if len(ended) >= beam:
            live = []
            break
    return max([*ended, *live], key=lambda steps: total(steps) / len(steps))


def rows_needed(exit_layers: Sequence[int], layers: int) -> int:
    """(layer, word) pairs of one caption: layer m runs for all words up to the last that went to m or deeper."""
    needed = 0
    for m in range(1, layers + 1):
        deep = [position for position, layer in enumerate(exit_layers) if layer >= m]
        needed += deep[-1] + 1 if deep else 0
    return needed


def thresholds(model: DeeCap, photos: Images, count: int, seed: int) -> list[float]:
    """Drawn from the entropies that the exits really have, so that words leave at all layers."""
    with torch.no_grad():
        found = []
        for image in photos.alone:
            memory = model.encode(*image)
            for prefix in ([], [5], [6, 7]):
                for m in range(1, model.layers):
                    found.append(decide(model, memory, prefix, math.inf, [m])[2])
    return [float(tau) for tau in np.quantile(found, np.random.default_rng(seed).uniform(0.1, 0.9, count))]


def same(found: Sequence[Step], expected: Sequence[Step]) -> None:
    assert [step.token for step in found] == [step.token for step in expected]
    assert [step.exit_layer for step in found] == [step.exit_layer for step in expected]
    assert [step.entropy for step in found] == pytest.approx([step.entropy for step in expected], rel=0, abs=1e-9)
    assert [step.log_probability for step in found] == pytest.approx(
        [step.log_probability for step in expected], rel=0, abs=1e-9
    )


@torch.no_grad()
def search(
    model: DeeCap, photos: Images, taus: Sequence[float], tested: Sequence[int], beam: int | None = None
) -> Decoded:
    memory = model.encode(photos.features, photos.boxes, photos.mask)
    policy = ExitPolicy(tuple(tested))
    if beam is None:
        return greedy_search(model, memory, taus, policy, photos.mask)
    return beam_search(model, memory, taus, policy, beam, photos.mask)


# Greedy ------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("count", [1, 2, 5])
def test_greedy_is_the_uncached_decoder_of_each_image_alone(
    make_model: MakeModel, exits: str, fusion: str, count: int
) -> None:
    model = make_model(exits, fusion, seed=count)
    photos = images(model, count, seed=count)
    tested = range(1, model.layers)
    taus = thresholds(model, photos, count, seed=count)
    decoded = search(model, photos, taus, tested)
    expected = [slow_greedy(model, image, tau, tested) for image, tau in zip(photos.alone, taus, strict=True)]
    for found, slow in zip(decoded.captions, expected, strict=True):
        same(found, slow)
    assert decoded.executed_rows == sum(
        rows_needed([step.exit_layer for step in steps], model.layers) for steps in expected
    )


def test_the_tests_above_see_all_exits_and_captions_of_all_lengths(make_model: MakeModel) -> None:
    """What they compare is varied: every layer is left at, some captions end early and some run to the end."""
    layers, lengths = set(), set()
    for fusion in FUSIONS:
        for count in (2, 5):
            model = make_model("deecap", fusion, seed=count)
            photos = images(model, count, seed=count)
            decoded = search(model, photos, thresholds(model, photos, count, seed=count), range(1, model.layers))
            layers |= {step.exit_layer for steps in decoded.captions for step in steps}
            lengths |= {(len(steps), steps[-1].token == EOS) for steps in decoded.captions}
    assert layers == {1, 2, 3, 4}
    assert len({length for length, _ in lengths}) >= 3
    assert {ended for _, ended in lengths} == {True, False}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tested", [(2,), (1, 3), (3,), ()])
def test_only_the_layers_of_the_policy_are_tested(make_model: MakeModel, tested: tuple[int, ...], seed: int) -> None:
    model = make_model(seed=seed)
    photos = images(model, 3, seed)
    taus = thresholds(model, photos, 3, seed)
    decoded = search(model, photos, taus, tested)
    for found, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
        same(found, slow_greedy(model, image, tau, tested))
        assert {step.exit_layer for step in found} <= {*tested, model.layers}


@every_kind
def test_a_batch_is_its_images_one_by_one(make_model: MakeModel, exits: str, fusion: str) -> None:
    model = make_model(exits, fusion)
    photos = images(model, 4)
    taus = [0.0, *thresholds(model, photos, 2, 1), math.inf]
    for beam in (None, 3):
        together = search(model, photos, taus, (1, 2, 3), beam)
        executed = 0
        for row, (image, tau) in enumerate(zip(photos.alone, taus, strict=True)):
            with torch.no_grad():
                memory = model.encode(*image)
            policy = ExitPolicy((1, 2, 3))
            if beam is None:
                alone = greedy_search(model, memory, [tau], policy)
            else:
                alone = beam_search(model, memory, [tau], policy, beam)
            same(together.captions[row], alone.captions[0])
            executed += alone.executed_rows
        assert together.executed_rows == executed


@every_kind
@pytest.mark.parametrize("beam", [None, 3])
def test_tau_0_gives_the_captions_of_the_full_depth_model(
    make_model: MakeModel, exits: str, fusion: str, beam: int | None
) -> None:
    model = make_model(exits, fusion)
    complete = make_model("final")
    complete.load_state_dict(model.state_dict(), strict=False)
    photos = images(model, 4)
    early = search(model, photos, [0.0] * 4, (1, 2, 3), beam)
    full = search(complete, photos, [0.0] * 4, (), beam)
    assert [[step.token for step in steps] for steps in early.captions] == [
        [step.token for step in steps] for steps in full.captions
    ]
    for found, expected in zip(early.captions, full.captions, strict=True):
        same(found, expected)
        assert {step.exit_layer for step in found} == {model.layers}
    assert early.executed_rows == full.executed_rows
    if beam is None:
        assert early.executed_rows == model.layers * sum(len(steps) for steps in early.captions)


@every_kind
@pytest.mark.parametrize("tested", [(1, 2, 3), (2, 3), (3,)])
def test_an_infinite_tau_leaves_at_the_first_tested_layer(
    make_model: MakeModel, exits: str, fusion: str, tested: tuple[int, ...]
) -> None:
    model = make_model(exits, fusion)
    photos = images(model, 3)
    for beam in (None, 2):
        decoded = search(model, photos, [math.inf] * 3, tested, beam)
        assert {step.exit_layer for steps in decoded.captions for step in steps} == {tested[0]}
        if beam is None:
            assert decoded.executed_rows == tested[0] * sum(len(steps) for steps in decoded.captions)


def test_a_word_that_goes_deep_late_catches_up_with_all_before(make_model: MakeModel) -> None:
    """By hand: words 1 and 2 through layer 1 only, word 3 through all four; every state is that of no cache."""
    model = make_model()
    photos = images(model, 2)
    words = [BOS, 6, 9]
    with torch.no_grad():
        memory = model.encode(photos.features, photos.boxes, photos.mask)
        state = DecoderState(model, memory, photos.mask)
        rows = torch.arange(2)
        for word, depth in zip(words, (1, 1, 4), strict=True):
            state.append(torch.tensor([word, word]))
            for m in range(1, depth + 1):
                state.run_layer(m, rows)
        expected = model.hidden_states(memory, torch.tensor([words, words]), photos.mask)
    for found, exact in zip(state.newest(4, rows), expected, strict=True):
        torch.testing.assert_close(found, exact[:, -1], rtol=0, atol=1e-12)
    assert state.executed_rows == 2 * 4 * 3


def test_a_reordered_row_knows_how_deep_its_words_went(make_model: MakeModel) -> None:
    """By hand: of two hypotheses of one image one went deep and one did not; both go on from the shallow one."""
    model = make_model()
    photos = images(model, 1)
    with torch.no_grad():
        memory = model.encode(photos.features, photos.boxes, photos.mask)
        state = DecoderState(model, memory, photos.mask, captions_per_image=2)
        both, deep = torch.arange(2), torch.tensor([0])
        state.append(torch.tensor([BOS, BOS]))
        for m in range(1, 5):
            state.run_layer(m, both)
        state.append(torch.tensor([6, 9]))
        state.run_layer(1, both)
        for m in range(2, 5):
            state.run_layer(m, deep)
        before = state.executed_rows
        state.reorder(torch.tensor([1, 1]))
        state.append(torch.tensor([7, 8]))
        for m in range(1, 5):
            state.run_layer(m, both)
        expected = model.hidden_states(memory, torch.tensor([[BOS, 9, 7], [BOS, 9, 8]]), photos.mask)
    for found, exact in zip(state.newest(4, both), expected, strict=True):
        torch.testing.assert_close(found, exact[:, -1], rtol=0, atol=1e-12)
    assert state.executed_rows - before == 2 * (1 + 3 * 2)  # layer 1 for the new word, the others for two words


def test_a_model_with_one_exit_cannot_be_asked_for_others(make_model: MakeModel) -> None:
    model = make_model("final")
    with pytest.raises(ValueError, match="no exit"):
        search(model, images(model, 1), [math.inf], (1,))


# Beam --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exits", "fusion"), [("deecap", "concatenation"), ("shallow", "attention"), ("plain", "average")]
)
@pytest.mark.parametrize("beam", [1, 2, 3, 4, 5])
def test_beam_is_the_uncached_beam_of_each_image_alone(
    make_model: MakeModel, exits: str, fusion: str, beam: int
) -> None:
    model = make_model(exits, fusion, seed=beam, max_words=5)
    photos = images(model, 3, seed=beam)
    taus = thresholds(model, photos, 3, seed=beam)
    decoded = search(model, photos, taus, (1, 2, 3), beam)
    for found, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
        same(found, slow_beam(model, image, tau, (1, 2, 3), beam))


@every_kind
def test_beam_1_is_greedy(make_model: MakeModel, exits: str, fusion: str) -> None:
    model = make_model(exits, fusion)
    photos = images(model, 4)
    taus = thresholds(model, photos, 4, 0)
    greedy, beam = search(model, photos, taus, (1, 2, 3)), search(model, photos, taus, (1, 2, 3), 1)
    for found, expected in zip(beam.captions, greedy.captions, strict=True):
        same(found, expected)
    assert beam.executed_rows == greedy.executed_rows


def test_a_wider_beam_finds_likelier_captions_than_greedy(make_model: MakeModel) -> None:
    """Not for each image, but over many: a beam that kept the wrong hypotheses would not."""

    def mean(steps: Sequence[Step]) -> float:
        return sum(step.log_probability for step in steps) / len(steps)

    gains, changed = [], 0
    for seed in range(3):
        model = make_model(seed=seed)
        photos = images(model, 5, seed)
        narrow, wide = search(model, photos, [0.0] * 5, ()), search(model, photos, [0.0] * 5, (), 5)
        gains += [mean(b) - mean(a) for a, b in zip(narrow.captions, wide.captions, strict=True)]
        changed += sum(a != b for a, b in zip(narrow.captions, wide.captions, strict=True))
    assert np.mean(gains) > 0
    assert changed > 0


@pytest.mark.parametrize("beam", [-1, 0, 6, 100])
def test_a_beam_outside_1_to_5_is_refused(make_model: MakeModel, beam: int) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="1 to 5"):
        search(model, images(model, 1), [0.0], (1,), beam)


@pytest.mark.parametrize("beam", [None, 2, 5])
def test_special_words_are_never_emitted(make_model: MakeModel, beam: int | None) -> None:
    """Even by a head that prefers them above all."""
    model = make_model()
    with torch.no_grad():
        model.head_bias[[PAD, BOS, UNKNOWN]] += 50.0
    photos = images(model, 4)
    taus = thresholds(model, photos, 4, 0)
    decoded = search(model, photos, taus, (1, 2, 3), beam)
    for steps, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
        assert not {step.token for step in steps} & {PAD, BOS, UNKNOWN}
        assert EOS not in [step.token for step in steps[:-1]]
        # Entropy and chances are those of the words that can be said.
        tested = (1, 2, 3)
        slow = slow_greedy(model, image, tau, tested) if beam is None else slow_beam(model, image, tau, tested, beam)
        same(steps, slow)


@pytest.mark.parametrize("vocabulary_size", [5, 6, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_wider_than_the_vocabulary_is_filled_with_words_only(
    make_model: MakeModel, vocabulary_size: int, seed: int
) -> None:
    model = make_model(seed=seed, vocabulary_size=vocabulary_size, max_words=6)
    with torch.no_grad():
        model.head_bias[EOS] -= 4.0  # so that the search goes on, and what fills the beam matters
    photos = images(model, 2, seed)
    decoded = search(model, photos, [0.0, math.inf], (1, 2, 3), 5)
    for found, image, tau in zip(decoded.captions, photos.alone, [0.0, math.inf], strict=True):
        same(found, slow_beam(model, image, tau, (1, 2, 3), 5))


@pytest.mark.parametrize("beam", [None, 1, 4])
@pytest.mark.parametrize("longest", [1, 2, 6])
def test_captions_are_at_most_as_long_as_they_may_be(make_model: MakeModel, beam: int | None, longest: int) -> None:
    model = make_model(max_words=longest)
    with torch.no_grad():
        model.head_bias[EOS] -= 60.0  # never wants to end
    photos = images(model, 3)
    decoded = search(model, photos, [0.0, 1.0, math.inf], (1, 2, 3), beam)
    assert [len(steps) for steps in decoded.captions] == [longest] * 3
    assert EOS not in {step.token for steps in decoded.captions for step in steps}


@pytest.mark.parametrize("beam", [None, 1, 3])
def test_a_caption_may_end_at_once(make_model: MakeModel, beam: int | None) -> None:
    model = make_model()
    with torch.no_grad():
        model.head_bias[EOS] += 60.0
    decoded = search(model, images(model, 2), [0.0, math.inf], (1, 2, 3), beam)
    assert [[step.token for step in steps] for steps in decoded.captions] == [[EOS], [EOS]]


def test_searching_leaves_no_gradients_and_no_trace(make_model: MakeModel) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    photos = images(model, 2)
    memory = model.encode(photos.features, photos.boxes, photos.mask)
    first = greedy_search(model, memory, [1.0, 1.0], ExitPolicy((1, 2, 3)), photos.mask)
    second = greedy_search(model, memory, [1.0, 1.0], ExitPolicy((1, 2, 3)), photos.mask)
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# The policy --------------------------------------------------------------------------------------------------------


def test_the_reference_policy_tests_every_layer_but_the_last() -> None:
    assert ExitPolicy.every_layer(6).tested == (1, 2, 3, 4, 5)
    assert ExitPolicy.every_layer(1).tested == ()


@pytest.mark.parametrize("tested", [(0,), (6,), (7,), (2, 1), (1, 1), (-1, 2)])
def test_a_policy_that_does_not_rise_within_the_layers_is_refused(tested: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tested layers"):
        ExitPolicy(tested).validate(6)
