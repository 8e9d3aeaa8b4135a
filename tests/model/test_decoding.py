"""Cached, batched decoding gives what running the whole network on the whole prefix for one image alone gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import FUSIONS
from model.decoding.beam import Step
from model.decoding.search import Decoded, beam_search, greedy_search
from model.decoding.state import DecoderState
from model.deecap import DeeCap
from model.exits import SKIPPED, ExitPolicy
from model.vocabulary import BOS, EOS, PAD, UNKNOWN

MakeModel = Callable[..., DeeCap]
KINDS = [*(("deecap", fusion) for fusion in FUSIONS), ("shallow", "sequential"), ("plain", "average")]
every_kind = pytest.mark.parametrize(("exits", "fusion"), KINDS)

EVERY = ExitPolicy((1, 2, 3))
# What is copied up or spared, over tested layers that leave gaps before, between and after them.
POLICIES = [
    ExitPolicy((1,), "copied"),
    ExitPolicy((2,), "copied"),
    ExitPolicy((1, 3), "copied"),
    ExitPolicy((1, 3), margin=0.0),
    ExitPolicy((1,), "copied", margin=-0.1),
    ExitPolicy((1, 2, 3), "copied", margin=0.3),
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda one: f"{one.tested}-{one.skipped}-{one.margin}")


@dataclass(frozen=True)
class Images:
    """Photos with different numbers of regions, alone and as one padded batch."""

    alone: list[tuple[Tensor, Tensor]]  # features (1, R, F) and boxes (1, R, 4) of each
    features: Tensor
    boxes: Tensor
    mask: Tensor


def guessing_model(make_model: MakeModel, exits: str, fusion: str, seed: int, **sizes: int) -> DeeCap:
    """With an exit head that sometimes spares a test, and captions that are rarely over before words went deep."""
    model = make_model(exits, fusion, seed, exit_head=True, imitation_width=5, **sizes)
    with torch.no_grad():
        model.exit_head.weight.mul_(4)
        model.exit_head.bias.sub_(1.0)
        model.head_bias[EOS] -= 1.0
    return model


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
def states_of(model: DeeCap, memory: Tensor, steps: Sequence[Step], policy: ExitPolicy) -> list[Tensor]:
    """h_1..h_N, each `(1, T, d)`, of BOS and the words of `steps`, all from the start.

    The newest word goes to the end; each before it left where the step that it led to says.
    """
    tokens = torch.tensor([[BOS, *(step.token for step in steps)]])
    if policy.skipped == "computed":
        return model.hidden_states(memory, tokens)
    depths = [*(step.exit_layer for step in steps), model.layers]
    causal = torch.ones(len(depths), len(depths), dtype=torch.bool).tril()
    states = [model.embed(tokens)]
    for m, layer in enumerate(model.decoder_layers, start=1):
        # Seen of a word that left before: the state it left with. What it would be here is computed too, and unseen.
        seen = torch.stack([states[min(depth, m - 1)][:, t] for t, depth in enumerate(depths)], 1)
        regions = layer.regions.keys_values(memory)
        states.append(layer(states[-1], layer.word_keys_values(seen), causal, regions, None))
    return states[1:]


def distribution(model: DeeCap, z: Tensor) -> tuple[np.ndarray, float]:
    """Probabilities of the words at an exit, those never said ruled out, and their entropy in nats."""
    logits = model.logits(z).numpy().copy()
    logits[[PAD, BOS, UNKNOWN]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return p, -sum(one * math.log(one) for one in p if one > 0)


@torch.no_grad()
def decide(
    model: DeeCap, memory: Tensor, steps: Sequence[Step], tau: float, policy: ExitPolicy
) -> tuple[np.ndarray, int, float]:
    """Log-probabilities of the next word, the layer it leaves at and the entropy there."""
    states = states_of(model, memory, steps, policy)
    exits, _ = model.exit_states(states)
    for m in [*policy.tested, model.layers]:
        last = m == model.layers
        if not last and policy.margin is not None and model.exit_head(states[m - 1][0, -1], m) > tau + policy.margin:
            continue
        p, certainty = distribution(model, exits[m - 1][0, -1])
        if last or certainty < tau:
            with np.errstate(divide="ignore"):
                log_p = np.log(p)
            if model.config.no_repeats:
                said = [step.token for step in steps]
                log_p[[word for word in range(len(p)) if says_again([*said, word])]] = -np.inf
            return log_p, m, certainty
    raise AssertionError("the last layer always decides")


def says_again(words: Sequence[int]) -> bool:
    """Whether any word comes twice running, or any three words in a row come twice."""
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return any(one == next for one, next in pairwise(words)) or len(set(threes)) < len(threes)


def slow_greedy(model: DeeCap, image: tuple[Tensor, Tensor], tau: float, policy: ExitPolicy) -> list[Step]:
    with torch.no_grad():
        memory = model.encode(*image)
    steps: list[Step] = []
    while len(steps) < model.config.max_words and not (steps and steps[-1].token == EOS):
        log_p, layer, certainty = decide(model, memory, steps, tau, policy)
        word = int(log_p.argmax())
        steps.append(Step(word, layer, certainty, float(log_p[word])))
    return steps


def slow_beam(
    model: DeeCap, image: tuple[Tensor, Tensor], tau: float, policy: ExitPolicy, beam: int
) -> tuple[list[Step], int]:
    """Every extension of every live hypothesis is a candidate; the best `beam` that go on live, and an EOS that is

    among the best `beam` candidates ends its hypothesis. Done with `beam` ended ones, or at the longest caption.
    Beside the best caption, the sum of the layers that the words of all hypotheses left at.
    """
    with torch.no_grad():
        memory = model.encode(*image)
    live: list[list[Step]] = [[]]
    ended: list[list[Step]] = []
    ran = 0

    def total(steps: list[Step]) -> float:
        return sum(step.log_probability for step in steps)

    for _ in range(model.config.max_words):
        candidates = []
        for steps in live:
            log_p, layer, certainty = decide(model, memory, steps, tau, policy)
            ran += layer
            candidates += [
                [*steps, Step(word, layer, certainty, float(log_p[word]))]
                for word in range(len(log_p))
                if log_p[word] > -np.inf
            ]
        candidates.sort(key=total, reverse=True)
        ended += [steps for steps in candidates[:beam] if steps[-1].token == EOS]
        live = [steps for steps in candidates if steps[-1].token != EOS][:beam]
        if len(ended) >= beam:
            live = []
            break
    return max([*ended, *live], key=lambda steps: total(steps) / len(steps)), ran


def rows_needed(exit_layers: Sequence[int], layers: int) -> int:
    """(layer, word) pairs of one caption: layer m runs for all words up to the last that went to m or deeper."""
    needed = 0
    for m in range(1, layers + 1):
        deep = [position for position, layer in enumerate(exit_layers) if layer >= m]
        needed += deep[-1] + 1 if deep else 0
    return needed


@torch.no_grad()
def search(
    model: DeeCap, photos: Images, taus: Sequence[float], policy: ExitPolicy, beam: int | None = None
) -> Decoded:
    memory = model.encode(photos.features, photos.boxes, photos.mask)
    if beam is None:
        return greedy_search(model, memory, taus, policy, photos.mask)
    return beam_search(model, memory, taus, policy, beam, photos.mask)


@torch.no_grad()
def thresholds(model: DeeCap, photos: Images, count: int, seed: int) -> list[float]:
    """Of each of the first `count` photos, drawn from the entropies that the exits have along its caption at full

    depth, so that words of one caption leave at different layers.
    """
    random, taus = np.random.default_rng(seed), []
    captions = search(model, photos, [0.0] * len(photos.alone), EVERY).captions
    for image, steps in list(zip(photos.alone, captions, strict=True))[:count]:
        tokens = torch.tensor([[BOS, *(step.token for step in steps[:-1])]])
        exits, _ = model.exit_states(model.hidden_states(model.encode(*image), tokens))
        found = [distribution(model, z)[1] for states in exits[:-1] for z in states[0]]
        taus.append(float(np.quantile(found, random.uniform(0.25, 0.75))))
    return taus


def same(found: Sequence[Step], expected: Sequence[Step]) -> None:
    assert [step.token for step in found] == [step.token for step in expected]
    assert [step.exit_layer for step in found] == [step.exit_layer for step in expected]
    assert [step.entropy for step in found] == pytest.approx([step.entropy for step in expected], rel=0, abs=1e-9)
    assert [step.log_probability for step in found] == pytest.approx(
        [step.log_probability for step in expected], rel=0, abs=1e-9
    )


# Greedy ------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("count", [1, 2, 5])
def test_greedy_is_the_uncached_decoder_of_each_image_alone(
    make_model: MakeModel, exits: str, fusion: str, count: int
) -> None:
    model = make_model(exits, fusion, seed=count)
    photos = images(model, count, seed=count)
    taus = thresholds(model, photos, count, seed=count)
    decoded = search(model, photos, taus, EVERY)
    expected = [slow_greedy(model, image, tau, EVERY) for image, tau in zip(photos.alone, taus, strict=True)]
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
            decoded = search(model, photos, thresholds(model, photos, count, seed=count), EVERY)
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
    policy = ExitPolicy(tested)
    decoded = search(model, photos, taus, policy)
    for found, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
        same(found, slow_greedy(model, image, tau, policy))
        assert {step.exit_layer for step in found} <= {*tested, model.layers}


@pytest.mark.parametrize(
    ("exits", "fusion"),
    [("deecap", "concatenation"), ("deecap", "sequential"), ("shallow", "sequential"), ("plain", "average")],
)
@every_policy
def test_greedy_under_any_policy_is_the_uncached_decoder(
    make_model: MakeModel, exits: str, fusion: str, policy: ExitPolicy
) -> None:
    for seed in range(2):
        model = guessing_model(make_model, exits, fusion, seed)
        photos = images(model, 3, seed)
        taus = thresholds(model, photos, 3, seed)
        decoded = search(model, photos, taus, policy)
        expected = [slow_greedy(model, image, tau, policy) for image, tau in zip(photos.alone, taus, strict=True)]
        for found, slow in zip(decoded.captions, expected, strict=True):
            same(found, slow)
        ran = [[step.exit_layer for step in steps] for steps in expected]
        if policy.skipped == "copied":  # nothing is ever caught up with
            assert decoded.executed_rows == sum(sum(layers) for layers in ran)
        else:
            assert decoded.executed_rows == sum(rows_needed(layers, model.layers) for layers in ran)


@pytest.mark.parametrize("beam", [None, 2, 3])
@pytest.mark.parametrize("policy", [EVERY, ExitPolicy((1,), "copied")], ids=lambda one: one.skipped)
def test_captions_kept_from_repeating_are_those_of_the_uncached_decoder(
    make_model: MakeModel, policy: ExitPolicy, beam: int | None
) -> None:
    repeated = 0
    for seed in range(3):
        sizes = {"no_repeats": True, "max_words": 10, "vocabulary_size": 14}
        model = make_model("deecap", "concatenation", seed, **sizes)
        with torch.no_grad():
            model.head_bias[EOS] -= 2.0
        photos = images(model, 3, seed)
        taus = thresholds(model, photos, 3, seed)
        decoded = search(model, photos, taus, policy, beam)
        for found, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
            assert not says_again([step.token for step in found])
            if beam:
                same(found, slow_beam(model, image, tau, policy, beam)[0])
            else:
                same(found, slow_greedy(model, image, tau, policy))
        free = make_model("deecap", "concatenation", seed, **{**sizes, "no_repeats": False})
        free.load_state_dict(model.state_dict())
        repeated += sum(
            says_again([step.token for step in steps]) for steps in search(free, photos, taus, policy, beam).captions
        )
    assert repeated, "no caption was to be kept from anything"


def differ(one: Decoded, other: Decoded) -> int:
    """How many captions, exits included, are not the same."""

    def told(steps: Sequence[Step]) -> list[tuple[int, int, float]]:
        return [(step.token, step.exit_layer, round(step.entropy, 5)) for step in steps]

    return sum(told(a) != told(b) for a, b in zip(one.captions, other.captions, strict=True))


@pytest.mark.parametrize("beam", [None, 3])
@every_policy
def test_the_policies_compared_leave_at_every_layer_and_change_what_is_said(
    make_model: MakeModel, policy: ExitPolicy, beam: int | None
) -> None:
    """What these tests compare is varied: all layers that may be are left at, and copies and margins both matter."""
    left_at, by_copies, by_margin = set(), 0, 0
    for seed in range(2):
        model = guessing_model(make_model, "deecap", "sequential", seed)
        photos = images(model, 3, seed)
        taus = thresholds(model, photos, 3, seed)
        decoded = search(model, photos, taus, policy, beam)
        left_at |= {step.exit_layer for steps in decoded.captions for step in steps}
        if policy.skipped == "copied":
            by_copies += differ(decoded, search(model, photos, taus, replace(policy, skipped="computed"), beam))
        if policy.margin is not None:
            by_margin += differ(decoded, search(model, photos, taus, replace(policy, margin=None), beam))
    assert left_at == {*policy.tested, 4}
    assert by_copies > 0 or policy.skipped == "computed"
    assert by_margin > 0 or policy.margin is None


@every_kind
@pytest.mark.parametrize("beam", [None, 3])
def test_copies_change_nothing_where_no_word_is_deeper_than_one_before(
    make_model: MakeModel, exits: str, fusion: str, beam: int | None
) -> None:
    """At τ = 0 all go to the end, at an infinite τ none past the first test: nothing is copied that is looked at."""
    model = make_model(exits, fusion)
    photos = images(model, 4)
    taus = [0.0, math.inf, 0.0, math.inf]
    for tested in ((1,), (2, 3)):
        computed = search(model, photos, taus, ExitPolicy(tested), beam)
        copied = search(model, photos, taus, ExitPolicy(tested, "copied"), beam)
        for found, expected in zip(copied.captions, computed.captions, strict=True):
            same(found, expected)
        assert copied.executed_rows == computed.executed_rows


@pytest.mark.parametrize("beam", [None, 3])
@pytest.mark.parametrize("skipped", SKIPPED)
def test_a_margin_beyond_all_guesses_spares_none_and_one_below_all_spares_every_test(
    make_model: MakeModel, skipped: str, beam: int | None
) -> None:
    model = guessing_model(make_model, "deecap", "concatenation", 0)
    photos = images(model, 4)
    taus = [*thresholds(model, photos, 3, 0), math.inf]
    tested = ExitPolicy((1, 2, 3), skipped)
    plain = search(model, photos, taus, tested, beam)
    assert search(model, photos, taus, replace(tested, margin=1e3), beam) == plain
    spared = search(model, photos, taus, replace(tested, margin=-1e3), beam)
    assert {step.exit_layer for steps in spared.captions[:3] for step in steps} == {4}
    assert {step.exit_layer for step in spared.captions[3]} == {1}  # no guess is above an infinite τ
    assert {step.exit_layer for steps in plain.captions[:3] for step in steps} > {4}
    full = search(model, photos, [0.0] * 4, EVERY, beam)
    for found, expected in zip(spared.captions[:3], full.captions[:3], strict=True):
        same(found, expected)


@every_kind
@pytest.mark.parametrize("policy", [EVERY, POLICIES[-1]], ids=["computed", "copied, with a margin"])
def test_a_batch_is_its_images_one_by_one(make_model: MakeModel, exits: str, fusion: str, policy: ExitPolicy) -> None:
    model = guessing_model(make_model, exits, fusion, 0)
    photos = images(model, 4)
    taus = [0.0, *thresholds(model, photos, 2, 1), math.inf]
    for beam in (None, 3):
        together = search(model, photos, taus, policy, beam)
        executed = 0
        for row, (image, tau) in enumerate(zip(photos.alone, taus, strict=True)):
            with torch.no_grad():
                memory = model.encode(*image)
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
    early = search(model, photos, [0.0] * 4, EVERY, beam)
    full = search(complete, photos, [0.0] * 4, ExitPolicy(()), beam)
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
        decoded = search(model, photos, [math.inf] * 3, ExitPolicy(tested), beam)
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


@torch.no_grad()
def test_a_word_that_goes_deep_late_sees_copies_of_those_that_left(make_model: MakeModel) -> None:
    """By hand and a word at a time: row 0 leaves at 1, 4, 2, 3 and then goes to the end; row 1 at 3, 1, 1, 2, 4."""
    model = make_model()
    photos = images(model, 2)
    words, depths = [BOS, 6, 9, 5, 7], [[1, 4, 2, 3, 4], [3, 1, 1, 2, 4]]
    memory = model.encode(photos.features, photos.boxes, photos.mask)
    state = DecoderState(model, memory, photos.mask, copied=True)
    ran: list[list[list[Tensor]]] = [[], []]  # [row][word][m]: h_m, as deep as the word went
    for t, word in enumerate(words):
        state.append(torch.tensor([word, word]))
        for m in range(1, max(depths[0][t], depths[1][t]) + 1):
            state.run_layer(m, torch.tensor([row for row in (0, 1) if depths[row][t] >= m]))
        for row in (0, 1):
            ran[row].append([model.embed(torch.tensor([[word]]), t)[0, 0]])
            alone = model.encode(*photos.alone[row])
            for m in range(1, depths[row][t] + 1):
                layer = model.decoder_layers[m - 1]
                seen = torch.stack([h[min(m, len(h)) - 1] for h in ran[row]])[None]
                newest, regions = ran[row][t][-1], layer.regions.keys_values(alone)
                ran[row][t].append(layer(newest[None, None], layer.word_keys_values(seen), None, regions, None)[0, 0])
            found = state.newest(depths[row][t], torch.tensor([row]))
            for exact, h in zip(ran[row][t][1:], found, strict=True):
                torch.testing.assert_close(h[0], exact, rtol=0, atol=1e-12)
    assert state.executed_rows == sum(map(sum, depths))
    computed = model.hidden_states(memory, torch.tensor([words, words]), photos.mask)
    for row in (0, 1):  # and it is not what it would be had all been computed
        assert (computed[-1][row, -1] - ran[row][-1][-1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_copy_stays_a_copy_when_a_beam_reorders(make_model: MakeModel) -> None:
    """By hand: one hypothesis went deep and one did not; both go on, once from the one and once from the other."""
    model = make_model()
    photos = images(model, 1)
    memory = model.encode(*photos.alone[0])
    both = torch.arange(2)
    for parent, depth in [(0, 4), (1, 1)]:
        state = DecoderState(model, memory, None, captions_per_image=2, copied=True)
        state.append(torch.tensor([BOS, BOS]))
        for m in range(1, 5):
            state.run_layer(m, both)
        state.append(torch.tensor([6, 9]))
        state.run_layer(1, both)
        for m in range(2, 5):
            state.run_layer(m, torch.tensor([0]))
        state.reorder(torch.tensor([parent, parent]))
        state.append(torch.tensor([7, 8]))
        for m in range(1, 5):
            state.run_layer(m, both)
        assert state.executed_rows == 2 * 4 + (4 + 1) + 2 * 4
        for row, word in enumerate((7, 8)):
            steps = [Step((6, 9)[parent], 4, 0.0, 0.0), Step(word, depth, 0.0, 0.0)]
            expected = states_of(model, memory, steps, ExitPolicy((1,), "copied"))
            for h, exact in zip(state.newest(4, torch.tensor([row])), expected, strict=True):
                torch.testing.assert_close(h[0], exact[0, -1], rtol=0, atol=1e-12)


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
        search(model, images(model, 1), [math.inf], ExitPolicy((1,)))


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
    decoded = search(model, photos, taus, EVERY, beam)
    for found, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
        same(found, slow_beam(model, image, tau, EVERY, beam)[0])


@pytest.mark.parametrize(
    ("exits", "fusion", "beam"),
    [
        ("deecap", "concatenation", 3),
        ("deecap", "sequential", 1),
        ("shallow", "attention", 2),
        ("plain", "average", 4),
        ("plain", "average", 5),
    ],
)
@every_policy
def test_beam_under_any_policy_is_the_uncached_beam(
    make_model: MakeModel, exits: str, fusion: str, beam: int, policy: ExitPolicy
) -> None:
    model = guessing_model(make_model, exits, fusion, beam, max_words=5)
    photos = images(model, 3, beam)
    taus = thresholds(model, photos, 3, beam)
    decoded = search(model, photos, taus, policy, beam)
    ran = 0
    for found, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
        expected, layers = slow_beam(model, image, tau, policy, beam)
        same(found, expected)
        ran += layers
    if policy.skipped == "copied":
        assert decoded.executed_rows == ran
    else:  # catching up comes on top
        assert decoded.executed_rows >= ran


@every_kind
@pytest.mark.parametrize("policy", [EVERY, POLICIES[-1]], ids=["computed", "copied, with a margin"])
def test_beam_1_is_greedy(make_model: MakeModel, exits: str, fusion: str, policy: ExitPolicy) -> None:
    model = guessing_model(make_model, exits, fusion, 0)
    photos = images(model, 4)
    taus = thresholds(model, photos, 4, 0)
    greedy, beam = search(model, photos, taus, policy), search(model, photos, taus, policy, 1)
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
        narrow, wide = search(model, photos, [0.0] * 5, EVERY), search(model, photos, [0.0] * 5, EVERY, 5)
        gains += [mean(b) - mean(a) for a, b in zip(narrow.captions, wide.captions, strict=True)]
        changed += sum(a != b for a, b in zip(narrow.captions, wide.captions, strict=True))
    assert np.mean(gains) > 0
    assert changed > 0


@pytest.mark.parametrize("beam", [-1, 0, 6, 100])
def test_a_beam_outside_1_to_5_is_refused(make_model: MakeModel, beam: int) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="1 to 5"):
        search(model, images(model, 1), [0.0], EVERY, beam)


@pytest.mark.parametrize("beam", [None, 2, 5])
def test_special_words_are_never_emitted(make_model: MakeModel, beam: int | None) -> None:
    """Even by a head that prefers them above all."""
    model = make_model()
    with torch.no_grad():
        model.head_bias[[PAD, BOS, UNKNOWN]] += 50.0
    photos = images(model, 4)
    taus = thresholds(model, photos, 4, 0)
    decoded = search(model, photos, taus, EVERY, beam)
    for steps, image, tau in zip(decoded.captions, photos.alone, taus, strict=True):
        assert not {step.token for step in steps} & {PAD, BOS, UNKNOWN}
        assert EOS not in [step.token for step in steps[:-1]]
        # Entropy and chances are those of the words that can be said.
        if beam is None:
            same(steps, slow_greedy(model, image, tau, EVERY))
        else:
            same(steps, slow_beam(model, image, tau, EVERY, beam)[0])


@pytest.mark.parametrize("vocabulary_size", [5, 6, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_wider_than_the_vocabulary_is_filled_with_words_only(
    make_model: MakeModel, vocabulary_size: int, seed: int
) -> None:
    model = make_model(seed=seed, vocabulary_size=vocabulary_size, max_words=6)
    with torch.no_grad():
        model.head_bias[EOS] -= 4.0  # so that the search goes on, and what fills the beam matters
    photos = images(model, 2, seed)
    decoded = search(model, photos, [0.0, math.inf], EVERY, 5)
    for found, image, tau in zip(decoded.captions, photos.alone, [0.0, math.inf], strict=True):
        same(found, slow_beam(model, image, tau, EVERY, 5)[0])


@pytest.mark.parametrize("beam", [None, 1, 4])
@pytest.mark.parametrize("longest", [1, 2, 6])
def test_captions_are_at_most_as_long_as_they_may_be(make_model: MakeModel, beam: int | None, longest: int) -> None:
    model = make_model(max_words=longest)
    with torch.no_grad():
        model.head_bias[EOS] -= 60.0  # never wants to end
    photos = images(model, 3)
    decoded = search(model, photos, [0.0, 1.0, math.inf], EVERY, beam)
    assert [len(steps) for steps in decoded.captions] == [longest] * 3
    assert EOS not in {step.token for steps in decoded.captions for step in steps}


@pytest.mark.parametrize("beam", [None, 1, 3])
def test_a_caption_may_end_at_once(make_model: MakeModel, beam: int | None) -> None:
    model = make_model()
    with torch.no_grad():
        model.head_bias[EOS] += 60.0
    decoded = search(model, images(model, 2), [0.0, math.inf], EVERY, beam)
    assert [[step.token for step in steps] for steps in decoded.captions] == [[EOS], [EOS]]


def test_searching_leaves_no_gradients_and_no_trace(make_model: MakeModel) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    photos = images(model, 2)
    memory = model.encode(photos.features, photos.boxes, photos.mask)
    first = greedy_search(model, memory, [1.0, 1.0], EVERY, photos.mask)
    second = greedy_search(model, memory, [1.0, 1.0], EVERY, photos.mask)
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


@pytest.mark.parametrize("skipped", ["", "Copied", "guessed", None])
def test_a_policy_of_unknown_copies_is_refused(skipped: str) -> None:
    with pytest.raises(ValueError, match="skipped must be one of computed, copied"):
        ExitPolicy((1,), skipped).validate(6)


@pytest.mark.parametrize("margin", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_no_number_of_nats_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        ExitPolicy((1,), margin=margin).validate(6)


@every_policy
def test_a_policy_that_fits_is_let_through(policy: ExitPolicy) -> None:
    policy.validate(4)
