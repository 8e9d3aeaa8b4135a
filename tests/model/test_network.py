"""The network and its losses are those of the paper's section 3, checked against the slow way of writing each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import EXITS, FUSIONS, DeeCapConfig
from model.deecap import DeeCap, ExitHead, Imitation, entropy
from model.fusion import Concatenation, make_fusion
from model.layers import CheapDropout
from model.training.data import pad_captions
from model.training.losses import cross_entropy, distillation, exit_head_loss, exit_weights, imitation_loss
from model.training.objectives import (
    EXIT_HEAD_WEIGHT,
    Batch,
    backbone_loss,
    exits_loss,
    sample_shallow_exit,
    words_that_left,
)
from model.training.self_critical import self_critical_loss
from model.training.settings import StageSettings
from model.vocabulary import BOS, EOS, PAD, SPECIAL, UNKNOWN

MakeModel = Callable[..., DeeCap]
KINDS = [*(("deecap", fusion) for fusion in FUSIONS), *(("shallow", fusion) for fusion in FUSIONS)]
KINDS += [("plain", "average"), ("final", "average")]
EXIT_STAGE = StageSettings(name="exits", kind="exits", epochs=1, learning_rate=1e-3, distillation=0.5)
BACKBONE_STAGE = StageSettings(
    name="backbone", kind="backbone", epochs=1, learning_rate=1e-3, shallow_exit_weight=0.4, label_smoothing=0.1
)

every_kind = pytest.mark.parametrize(("exits", "fusion"), KINDS)


def random_batch(model: DeeCap, images: int = 2, each: int = 2, length: int = 6, regions: int = 5) -> Batch:
    """Captions of different lengths, EOS and padding included."""
    config = model.config
    torch.manual_seed(1)
    features = torch.randn(images, regions, config.feature_width, dtype=torch.float64)
    corners = torch.rand(images, regions, 2, 2, dtype=torch.float64).sort(dim=2).values
    captions = [
        torch.randint(len(SPECIAL), config.vocabulary_size, (length - row % 3,)).tolist()
        for row in range(images * each)
    ]
    return Batch(features, corners.flatten(2), None, *pad_captions(captions, config.max_words))


def single(batch: Batch) -> Batch:
    """In float32, in which models train."""
    return replace(batch, features=batch.features.float(), boxes=batch.boxes.float())


def gradients(model: DeeCap, loss: Tensor) -> set[str]:
    """Names of the parameters that the loss moves."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad.abs() > 1e-12).any())}


def part(name: str) -> str:
    return name.split(".")[0]


# The loss ----------------------------------------------------------------------------------------------------------


def trained_on_noise(exits: str, fusion: str, shifted: bool) -> tuple[list[float], float]:
    """Held-out nats per word of every exit after some steps on fresh uniform words, and the ln V they cannot beat.

    With `shifted` false the network is fed the very words it is to say, as a control of the test's power.
    """
    torch.manual_seed(0)
    config = DeeCapConfig(
        vocabulary_size=16, feature_width=4, width=32, heads=2, feed_forward=32, encoder_layers=1, decoder_layers=3,
        max_words=6, dropout=0.0, exits=exits, fusion=fusion,
    )  # fmt: skip
    model = DeeCap(config)
    random = np.random.default_rng(0)
    words = config.vocabulary_size - len(SPECIAL)

    def batch(size: int) -> Batch:
        # Longer than the longest, so that no EOS, which could be foreseen, is among the targets.
        captions = random.integers(len(SPECIAL), config.vocabulary_size, (size, config.max_words + 2)).tolist()
        inputs, targets = pad_captions(captions, config.max_words)
        features, boxes = torch.randn(size, 2, 4), torch.rand(size, 2, 4)
        return Batch(features, boxes, None, inputs if shifted else targets, targets)

    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        optimiser.zero_grad()
        now = batch(24)
        loss = exits_loss(model, now, EXIT_STAGE, random)
        if exits == "deecap":  # a backbone learns too
            loss = loss + backbone_loss(model, now, BACKBONE_STAGE, random)
        loss.backward()
        optimiser.step()
    held_out = batch(400)
    with torch.no_grad():
        logits, _, _ = model(held_out.features, held_out.boxes, held_out.inputs)
    return [float(cross_entropy(one, held_out.targets)) for one in logits], math.log(words)


@pytest.mark.parametrize(("exits", "fusion"), [*(("deecap", f) for f in FUSIONS), *((e, "average") for e in EXITS[1:])])
def test_loss_on_random_words_stays_above_ln_v(exits: str, fusion: str) -> None:
    losses, bound = trained_on_noise(exits, fusion, shifted=True)
    assert min(losses) >= bound - 0.02


@pytest.mark.parametrize("exits", EXITS)
def test_a_network_that_sees_its_label_falls_far_below_ln_v(exits: str) -> None:
    losses, bound = trained_on_noise(exits, "average", shifted=False)
    assert losses[-1] < bound - 0.5


@every_kind
def test_no_exit_sees_later_words(make_model: MakeModel, exits: str, fusion: str) -> None:
    model = make_model(exits, fusion)
    batch = random_batch(model, each=1)
    before, _, _ = model(batch.features, batch.boxes, batch.inputs)
    for t in range(1, batch.inputs.shape[1]):
        changed = batch.inputs.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocabulary_size
        after, _, _ = model(batch.features, batch.boxes, changed)
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new[:, :t], old[:, :t], rtol=0, atol=1e-12)
            assert (new[:, t:] - old[:, t:]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_cross_entropy_is_minus_log_p_of_each_next_word() -> None:
    torch.manual_seed(0)
    captions = [[5, 6, 7], [8, UNKNOWN, 9, 10], [4]]
    inputs, targets = pad_captions(captions, max_words=9)
    logits = torch.randn(*inputs.shape, 12, dtype=torch.float64)
    losses = []
    for row, caption in enumerate(captions):
        for t, word in enumerate([*caption, EOS]):
            assert inputs[row, t] == [BOS, *caption][t]
            if word != UNKNOWN:
                losses.append(-math.log(logits[row, t].exp()[word] / logits[row, t].exp().sum()))
    assert float(cross_entropy(logits, targets)) == pytest.approx(np.mean(losses), rel=1e-6)


@every_kind
@pytest.mark.parametrize("kind", ["backbone", "exits", "self-critical"])
def test_padding_changes_no_loss(make_model: MakeModel, exits: str, fusion: str, kind: str) -> None:
    model = make_model(exits, fusion)
    batch = random_batch(model)
    padding = batch.targets == PAD
    assert padding.any()

    def loss(inputs: Tensor, targets: Tensor) -> float:
        now = Batch(batch.features, batch.boxes, None, inputs, targets)
        random = np.random.default_rng(3)
        if kind == "backbone":
            return backbone_loss(model, now, BACKBONE_STAGE, random).item()
        if kind == "exits":
            return exits_loss(model, now, EXIT_STAGE, random).item()
        advantages = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
        return self_critical_loss(model, now, advantages, BACKBONE_STAGE, random).item()

    plain = loss(batch.inputs, batch.targets)
    scribbled = torch.where(padding, torch.full_like(batch.inputs, 7), batch.inputs)
    assert loss(scribbled, batch.targets) == pytest.approx(plain, rel=1e-5)
    column = torch.full((len(batch.inputs), 1), PAD)
    assert loss(torch.hstack((batch.inputs, column)), torch.hstack((batch.targets, column))) == pytest.approx(
        plain, rel=1e-5
    )


@every_kind
@pytest.mark.parametrize("copied", [0.0, 1.0])
def test_every_parameter_meant_to_learn_gets_a_gradient(
    make_model: MakeModel, exits: str, fusion: str, copied: float
) -> None:
    model = make_model(exits, fusion)
    batch = random_batch(model, images=4)
    everything = {name for name, _ in model.named_parameters()}
    # A bias of attention pooling's keys adds the same to every score of a softmax: nothing to learn, by algebra.
    useless = {name for name in everything if name.endswith("_fusion.key.bias")}

    loss = exits_loss(model, batch, replace(EXIT_STAGE, copied_states=copied), np.random.default_rng(0))
    assert gradients(model, loss) == everything - useless

    exit_parts = {"imitation", "gate", "shallow_norm", "shallow_fusion", "deep_norm", "deep_fusion"}
    backbone = {name for name in everything if part(name) not in exit_parts}
    random = np.random.default_rng(0)
    assert gradients(model, backbone_loss(model, batch, BACKBONE_STAGE, random)) == backbone
    advantages = torch.randn(len(batch.targets), dtype=torch.float64)
    assert gradients(model, self_critical_loss(model, batch, advantages, BACKBONE_STAGE, random)) == backbone


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_imitation_loss_alone_teaches_every_imitator(make_model: MakeModel, fusion: str) -> None:
    model = make_model("deecap", fusion)
    batch = random_batch(model)
    _, states, imitations = model(batch.features, batch.boxes, batch.inputs)
    moved = gradients(model, imitation_loss(states, imitations, batch.targets))
    assert {name for name in moved if part(name) == "imitation"} == {
        "imitation.up", "imitation.up_bias", "imitation.down", "imitation.down_bias"
    }  # fmt: skip
    assert (model.imitation.up.grad.abs().amax(dim=(1, 2)) > 0).all()  # each MLP^k of the stack
    assert not {name for name in moved if part(name) in ("gate", "shallow_fusion", "deep_fusion", "head_norm")}
    # The last layer is a target only.
    assert not {name for name in moved if name.startswith(f"decoder.{model.layers - 1}.")}


def test_imitation_targets_are_detached() -> None:
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(3)]
    imitations = [torch.randn(2, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 4, requires_grad=True)]
    imitation_loss(states, imitations, torch.full((2, 3), 5)).backward()
    assert all(state.grad is None for state in states)
    assert all(imitated.grad is not None and imitated.grad.abs().sum() > 0 for imitated in imitations)


def test_imitation_loss_is_equation_4_from_the_first_layer(make_model: MakeModel) -> None:
    model = make_model("deecap", "average", decoder_layers=5)
    batch = random_batch(model)
    _, states, imitations = model(batch.features, batch.boxes, batch.inputs)
    layers, words = model.layers, (batch.targets != PAD).nonzero().tolist()
    total = 0.0
    for m in range(1, layers):
        over_k = 0.0
        for k in range(m + 1, layers + 1):
            for g, t in words:
                real, imitated = states[k - 1][g, t], imitations[m - 1][k - m - 1, g, t]
                over_k += (1 - real @ imitated / (real.norm() * imitated.norm())).item() / len(words)
        total += over_k / (layers - m)
    loss = imitation_loss(states, imitations, batch.targets).item()
    assert loss == pytest.approx(total / (layers - 1), rel=1e-5)  # the loss is float32


@pytest.mark.parametrize("layers", range(1, 8))
def test_exit_weights_are_layer_numbers_over_their_sum(layers: int) -> None:
    assert exit_weights(layers) == pytest.approx([m / sum(range(1, layers + 1)) for m in range(1, layers + 1)])
    assert sum(exit_weights(layers)) == pytest.approx(1.0)


@every_kind
@pytest.mark.parametrize("copied", [0.0, 1.0])
def test_exits_loss_is_equation_11(make_model: MakeModel, exits: str, fusion: str, copied: float) -> None:
    model = make_model(exits, fusion)
    batch = random_batch(model)
    stage = StageSettings("exits", "exits", 1, 1e-3, lambda_=0.3, copied_states=copied)
    left = words_that_left(batch, copied, np.random.default_rng(3)) if copied else None
    logits, states, imitations = model(batch.features, batch.boxes, batch.inputs, None, left)
    words = [cross_entropy(one, batch.targets).item() for one in logits]
    if exits == "final":
        expected = words[-1]
    else:
        expected = 0.3 * sum(m * ce for m, ce in enumerate(words, start=1)) / sum(range(1, model.layers + 1))
    if exits == "deecap":
        expected += 0.7 * imitation_loss(states, imitations, batch.targets).item()
    found = exits_loss(model, batch, stage, np.random.default_rng(3)).item()
    assert found == pytest.approx(expected, rel=1e-5)
    others = exits_loss(model, batch, replace(stage, copied_states=1.0 - copied), np.random.default_rng(3)).item()
    assert abs(others - found) > 1e-4  # copies matter


@every_kind
def test_an_exit_head_adds_its_error_to_the_loss_and_nothing_else(
    make_model: MakeModel, exits: str, fusion: str
) -> None:
    without, model = make_model(exits, fusion).float(), make_model(exits, fusion, exit_head=True).float()
    model.load_state_dict(without.state_dict(), strict=False)
    batch = single(random_batch(model))
    random = np.random.default_rng(0)
    added = exits_loss(model, batch, EXIT_STAGE, random) - exits_loss(without, batch, EXIT_STAGE, random)
    logits, states, _ = model(batch.features, batch.boxes, batch.inputs)
    if exits == "final":  # no exit to guess at
        assert added.item() == 0.0
    else:
        assert added.item() > 1e-3
        error = exit_head_loss(model, states, logits, batch.targets).item()
        assert added.item() == pytest.approx(EXIT_HEAD_WEIGHT * error, rel=1e-3)  # a difference of float32 numbers


def test_the_exit_head_learns_the_mean_squared_error_of_its_guesses(make_model: MakeModel) -> None:
    model = make_model("deecap", "average", exit_head=True).float()
    batch = single(random_batch(model))
    logits, states, _ = model(batch.features, batch.boxes, batch.inputs)
    words = (batch.targets != PAD).nonzero().tolist()
    assert len(words) < batch.targets.numel()
    layers = []
    for m in range(1, model.layers):
        errors = []
        for g, t in words:
            p = logits[m - 1][g, t].double().softmax(-1)
            nats = -(p * p.log()).sum().item()
            errors.append((model.exit_head(states[m - 1][g, t], m).item() - nats) ** 2)
        layers.append(np.mean(errors))
    assert min(layers) > 1e-3
    found = exit_head_loss(model, states, logits, batch.targets).item()
    assert found == pytest.approx(np.mean(layers), rel=1e-5)


@pytest.mark.parametrize("exits", ["deecap", "shallow", "plain"])
def test_the_exit_heads_loss_moves_nothing_but_the_exit_head(make_model: MakeModel, exits: str) -> None:
    model = make_model(exits, "average", exit_head=True).float()
    batch = single(random_batch(model))
    logits, states, _ = model(batch.features, batch.boxes, batch.inputs)
    assert logits[0].requires_grad
    moved = gradients(model, exit_head_loss(model, states, logits, batch.targets))
    assert moved == {"exit_head.weight", "exit_head.bias"}
    weight, bias = model.exit_head.weight.grad, model.exit_head.bias.grad
    assert weight is not None
    assert bias is not None
    assert (weight.abs().amax(dim=1) > 0).all()  # the guess at each exit
    assert (bias.abs() > 0).all()
    whole = gradients(model, exits_loss(model, batch, EXIT_STAGE, np.random.default_rng(0)))
    assert {"exit_head.weight", "exit_head.bias"} < whole


def test_distillation_is_the_mean_divergence_from_a_fixed_teacher() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[5, 6, PAD], [UNKNOWN, 7, 4]])
    found = []
    for g, t in [(0, 0), (0, 1), (1, 1), (1, 2)]:
        p, q = teacher[g, t].softmax(-1), logits[g, t].softmax(-1)
        found.append((p * (p / q).log()).sum().item())
    loss = distillation(logits, teacher, targets)
    assert loss.item() == pytest.approx(np.mean(found), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert logits.grad is not None
    assert distillation(logits, logits, targets).item() == pytest.approx(0.0, abs=1e-6)


def test_shallow_exits_are_drawn_below_the_last_and_the_first_most() -> None:
    random = np.random.default_rng(0)
    drawn = np.bincount([sample_shallow_exit(4, random) for _ in range(6000)], minlength=5)[1:] / 6000
    share = np.array([1, 1 / 2, 1 / 3])
    assert drawn[3] == 0
    assert drawn[:3] == pytest.approx(share / share.sum(), abs=0.03)


# The parts ---------------------------------------------------------------------------------------------------------


@every_kind
def test_padded_regions_change_nothing(make_model: MakeModel, exits: str, fusion: str) -> None:
    model = make_model(exits, fusion, encoder_layers=2)
    batch = random_batch(model)
    without, _, _ = model(batch.features, batch.boxes, batch.inputs)
    scribble = torch.full((2, 3, model.config.feature_width), 9.0, dtype=torch.float64).normal_()
    features = torch.cat((batch.features, scribble), 1)
    boxes = torch.cat((batch.boxes, torch.rand(2, 3, 4, dtype=torch.float64)), 1)
    mask = torch.arange(8).expand(2, -1) < 5
    padded, _, _ = model(features, boxes, batch.inputs, mask)
    unmasked, _, _ = model(features, boxes, batch.inputs)
    for one, other, seen in zip(without, padded, unmasked, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
        assert (seen - one).abs().max() > 1e-3  # without the mask it would matter


def test_captions_of_one_image_share_its_regions(make_model: MakeModel) -> None:
    model = make_model()
    batch = random_batch(model, images=3, each=2)
    together, _, _ = model(batch.features, batch.boxes, batch.inputs)
    for row in range(6):
        image = slice(row // 2, row // 2 + 1)
        alone, _, _ = model(batch.features[image], batch.boxes[image], batch.inputs[row : row + 1])
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], other[row], rtol=0, atol=1e-12)


def some_left(batch: Batch, seed: int = 0) -> Tensor:
    """A mask of words with both kinds in every caption, so that either treatment shows."""
    torch.manual_seed(seed)
    left = torch.rand(batch.inputs.shape) < 0.5
    left[:, 0], left[:, 1] = True, False
    return left


@torch.no_grad()
def test_deeper_layers_see_the_first_state_of_words_that_left(make_model: MakeModel) -> None:
    """Word by word and caption by caption, no mask: keys and values beyond layer 1 are of h_1 where a word left."""
    model = make_model()
    batch = random_batch(model)
    left = some_left(batch)
    memory = model.encode(batch.features, batch.boxes)
    states = model.hidden_states(memory, batch.inputs, None, left)
    for g, words in enumerate(batch.inputs):
        image = memory[g // 2 : g // 2 + 1]
        ran: list[list[Tensor]] = []  # [word][m]: h_m
        for t in range(len(words)):
            ran.append([model.embed(words[t : t + 1, None], t)[0, 0]])
            for m, layer in enumerate(model.decoder_layers, start=1):
                seen = [h[1] if m > 1 and left[g, s] else h[m - 1] for s, h in enumerate(ran)]
                keys_values = layer.word_keys_values(torch.stack(seen)[None])
                regions = layer.regions.keys_values(image)
                ran[t].append(layer(ran[t][-1][None, None], keys_values, None, regions, None)[0, 0])
        for m in range(1, model.layers + 1):
            expected = torch.stack([h[m] for h in ran])
            torch.testing.assert_close(states[m - 1][g], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_words_that_left_change_the_third_layer_and_up_and_no_word_before_them(make_model: MakeModel) -> None:
    model = make_model()
    batch = random_batch(model)
    memory = model.encode(batch.features, batch.boxes)
    plain = model.hidden_states(memory, batch.inputs)
    none = model.hidden_states(memory, batch.inputs, None, torch.zeros_like(batch.inputs, dtype=torch.bool))
    assert all(torch.equal(one, other) for one, other in zip(none, plain, strict=True))
    for t in (0, 2):
        left = torch.zeros_like(batch.inputs, dtype=torch.bool)
        left[:, t] = True
        for m, (one, other) in enumerate(
            zip(model.hidden_states(memory, batch.inputs, None, left), plain, strict=True), start=1
        ):
            torch.testing.assert_close(one[:, :t], other[:, :t], rtol=0, atol=1e-12)
            if m <= 2:  # layer 2 reads h_1 in any case
                assert torch.equal(one, other)
            else:
                assert (one[:, t:] - other[:, t:]).abs().amax(-1).min() > 1e-6


@every_kind
@torch.no_grad()
def test_exits_are_of_the_states_with_words_that_left(make_model: MakeModel, exits: str, fusion: str) -> None:
    model = make_model(exits, fusion)
    batch = random_batch(model)
    left = some_left(batch)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    logits, states, imitations = model(batch.features, batch.boxes, batch.inputs, mask, left)
    memory = model.encode(batch.features, batch.boxes, mask)
    expected = model.hidden_states(memory, batch.inputs, mask, left)
    assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))
    exit_states, imitated = model.exit_states(expected)
    assert all(torch.equal(one, model.logits(z)) for one, z in zip(logits, exit_states, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(imitations, imitated, strict=True))
    plain, _, _ = model(batch.features, batch.boxes, batch.inputs, mask)
    assert (logits[-1] - plain[-1]).abs().max() > 1e-3


@every_kind
def test_one_exit_is_that_of_all_exits(make_model: MakeModel, exits: str, fusion: str) -> None:
    model = make_model(exits, fusion)
    batch = random_batch(model)
    states = model.hidden_states(model.encode(batch.features, batch.boxes), batch.inputs)
    every, imitations = model.exit_states(states)
    assert len(every) == model.layers
    assert len(imitations) == (model.layers - 1 if exits == "deecap" else 0)
    for m in range(1, model.layers + 1):
        if exits == "final" and m < model.layers:
            with pytest.raises(ValueError, match="no exit"):
                model.exit_state(states[:m], m)
            continue
        torch.testing.assert_close(model.exit_state(states[:m], m), every[m - 1], rtol=0, atol=1e-12)
    assert every[-1] is states[-1] or torch.equal(every[-1], states[-1])  # so τ = 0 is the full-depth model


def test_an_exit_of_the_whole_system_is_equations_5_to_8(make_model: MakeModel) -> None:
    model = make_model("deecap", "concatenation")
    torch.manual_seed(2)
    states = [torch.randn(16, dtype=torch.float64) for _ in range(model.layers)]
    for m in range(1, model.layers):
        shallow = model.shallow_fusion.bias
        for k in range(1, m + 1):
            shallow = shallow + model.shallow_norm(states[k - 1]) @ model.shallow_fusion.slices[k - 1]
        deep = model.deep_fusion.bias
        for k, imitated in enumerate(model.imitation(states[m - 1], m), start=m + 1):
            deep = deep + model.deep_norm(imitated) @ model.deep_fusion.slices[k - 1]
        score = model.gate.scalar(F.gelu(model.gate.hidden(torch.cat((shallow, deep))))).item()
        alpha = 1 / (1 + math.exp(-score))
        expected = alpha * shallow + (1 - alpha) * deep
        torch.testing.assert_close(model.exit_state(states[:m], m), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("imitation_width", "inner"), [(0, 16), (5, 5), (16, 16), (40, 40)])
def test_the_imitation_stack_is_one_network_at_a_time(make_model: MakeModel, imitation_width: int, inner: int) -> None:
    imitation: Imitation = make_model(imitation_width=imitation_width).imitation
    assert imitation.up.shape == (3, 16, inner)
    assert imitation.down.shape == (3, inner, 16)
    torch.manual_seed(0)
    state = torch.randn(2, 3, 16, dtype=torch.float64)
    for m in range(1, 4):
        stacked = imitation(state, m)
        assert stacked.shape == (4 - m, 2, 3, 16)
        for k in range(m + 1, 5):
            i = k - 2  # MLP^2 is the first
            hidden = F.gelu(F.linear(state, imitation.up[i].T, imitation.up_bias[i, 0]))
            alone = F.linear(hidden, imitation.down[i].T, imitation.down_bias[i, 0])
            torch.testing.assert_close(stacked[k - m - 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_narrow_imitators_are_part_of_a_whole_network(make_model: MakeModel, fusion: str) -> None:
    model = make_model("deecap", fusion, imitation_width=3)
    batch = random_batch(model)
    _, states, imitations = model(batch.features, batch.boxes, batch.inputs)
    assert [imitated.shape for imitated in imitations] == [(4 - m, *states[0].shape) for m in range(1, 4)]
    assert part_sizes(make_model("deecap", fusion)) == part_sizes(make_model("deecap", fusion, imitation_width=16))
    moved = gradients(model, imitation_loss(states, imitations, batch.targets))
    assert {"imitation.up", "imitation.up_bias", "imitation.down", "imitation.down_bias"} <= moved


def part_sizes(model: DeeCap) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def test_an_exit_heads_guess_is_linear_in_the_normalised_state(make_model: MakeModel) -> None:
    head: ExitHead = make_model(exit_head=True).exit_head
    torch.manual_seed(0)
    state = torch.randn(2, 3, 16, dtype=torch.float64) * 5 + 2
    x = state.numpy()
    normalised = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    guesses = []
    for m in range(1, 4):
        weight, bias = head.weight[m - 1].detach().numpy(), head.bias[m - 1].item()
        guesses.append(head(state, m).detach())
        np.testing.assert_allclose(guesses[-1].numpy(), (normalised * weight).sum(-1) + bias, rtol=0, atol=1e-12)
    assert guesses[0].std() > 0.05
    assert (guesses[0] - guesses[1]).abs().min() > 1e-3  # each exit has its own


def test_a_new_exit_head_guesses_a_usual_entropy_whatever_it_sees() -> None:
    head = ExitHead(8, 4)
    assert [tuple(parameter.shape) for parameter in (head.weight, head.bias)] == [(3, 8), (3,)]
    for m in range(1, 4):
        assert head(torch.randn(5, 8) * 100, m).tolist() == [2.5] * 5


def test_only_a_model_that_is_to_have_an_exit_head_has_one(make_model: MakeModel) -> None:
    assert not {name for name in part_sizes(make_model()) if part(name) == "exit_head"}
    for exits in EXITS:
        names = {name for name in part_sizes(make_model(exits, exit_head=True)) if part(name) == "exit_head"}
        assert names == {"exit_head.weight", "exit_head.bias"}


@pytest.mark.parametrize("name", FUSIONS)
def test_fused_prefixes_are_each_run_fused_alone(name: str) -> None:
    torch.manual_seed(0)
    fusion = make_fusion(name, 8, 5).double()
    states = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(5)]
    for m, fused in enumerate(fusion.prefixes(states), start=1):
        torch.testing.assert_close(fused, fusion(states[:m], 1), rtol=0, atol=1e-12)
        if m > 1:  # every state of the run matters
            for changed in range(m):
                other = [
                    state + (1.0 if index == changed else 0.0) * state[..., :1] for index, state in enumerate(states)
                ]
                assert (fusion(other[:m], 1) - fused).abs().max() > 1e-6


def test_concatenation_is_one_linear_map_of_the_states_side_by_side() -> None:
    torch.manual_seed(0)
    fusion = Concatenation(8, 5).double()
    with torch.no_grad():
        fusion.bias.normal_()
    states = [torch.randn(3, 8, dtype=torch.float64) for _ in range(5)]
    for first, last in [(1, 1), (1, 3), (2, 5), (4, 5), (5, 5)]:
        weight = torch.cat([fusion.slices[layer - 1] for layer in range(first, last + 1)])  # (layers * d, d)
        expected = torch.cat(states[first - 1 : last], -1) @ weight + fusion.bias
        torch.testing.assert_close(fusion(states[first - 1 : last], first), expected, rtol=0, atol=1e-12)


def test_attention_pooling_asks_with_the_last_state() -> None:
    torch.manual_seed(0)
    fusion = make_fusion("attention", 4, 3).double()
    states = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    query = fusion.query(states[-1])
    scores = np.exp([(query @ fusion.key(state)).item() / 2.0 for state in states])
    expected = sum(score / scores.sum() * fusion.value(state) for score, state in zip(scores, states, strict=True))
    torch.testing.assert_close(fusion(states, 1), expected, rtol=0, atol=1e-12)


def test_sequential_is_an_lstm_cell_over_the_layers() -> None:
    torch.manual_seed(0)
    fusion = make_fusion("sequential", 4, 3).double()
    cell = torch.nn.LSTMCell(4, 4).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in fusion.lstm.state_dict().items()})
    states = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    kept = None
    for state in states:
        kept = cell(state, kept)
    assert kept is not None
    torch.testing.assert_close(fusion(states, 1), kept[0], rtol=0, atol=1e-12)


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        make_fusion("median", 4, 3)


def test_one_layer_is_a_network_too(make_model: MakeModel) -> None:
    for exits in EXITS:
        model = make_model(exits, decoder_layers=1)
        batch = random_batch(model)
        logits, _, imitations = model(batch.features, batch.boxes, batch.inputs)
        assert len(logits) == 1
        assert imitations == []
        assert torch.isfinite(exits_loss(model, batch, StageSettings("x", "exits", 1, 1e-3), np.random.default_rng(0)))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout = CheapDropout(0.25)
    x = torch.ones(300, 301, requires_grad=True)
    y = dropout(x)
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(dropout.eval()(x), x)


# Entropy -----------------------------------------------------------------------------------------------------------

INFINITE = math.inf
BIG = 1e38


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], math.log(4)),
        ([BIG, BIG, BIG, BIG], math.log(4)),
        ([-BIG, -BIG, -BIG, -BIG], math.log(4)),
        ([INFINITE, INFINITE, INFINITE, INFINITE], math.log(4)),
        ([-INFINITE, -INFINITE, -INFINITE, -INFINITE], math.log(4)),
        ([BIG, -BIG, 0.0, 0.0], 0.0),
        ([INFINITE, -INFINITE, 0.0, 1.0], 0.0),
        ([BIG, -INFINITE, BIG, 5.0], math.log(2)),
        ([-INFINITE, 0.0, 0.0, -BIG], math.log(2)),
        ([0.0, math.log(3), -INFINITE, -INFINITE], 2 * math.log(2) - 0.75 * math.log(3)),
    ],
)
def test_entropy_is_right_for_any_logits(kind: torch.dtype, logits: list[float], expected: float) -> None:
    found = entropy(torch.tensor(logits).to(kind))
    assert found.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert math.isfinite(float(found))
    assert float(found) >= 0.0
    assert float(found) == pytest.approx(expected, abs=2e-3 if kind == torch.bfloat16 else 1e-6)


def test_entropy_is_the_textbook_sum() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 50, dtype=torch.float64) * 3
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(entropy(logits), -(p * p.log()).sum(-1), rtol=0, atol=1e-12)
    assert entropy(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_exits_are_finite_in_low_precision(make_model: MakeModel, kind: torch.dtype) -> None:
    model = make_model().to(kind)
    batch = random_batch(model)
    logits, _, _ = model(batch.features.to(kind), batch.boxes.to(kind), batch.inputs)
    for one in logits:
        found = entropy(one)
        assert torch.isfinite(found).all()
        assert (found >= 0).all()
        assert (found <= math.log(model.config.vocabulary_size) + 1e-5).all()


# The configuration -------------------------------------------------------------------------------------------------


def test_a_configuration_survives_json() -> None:
    config = DeeCapConfig(vocabulary_size=10, width=64, heads=4, exits="plain", fusion="attention")
    config = replace(config, imitation_width=12, exit_head=True)
    assert DeeCapConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"exits": "never"}, "exits"),
        ({"fusion": "median"}, "fusion"),
        ({"width": 65}, "heads"),
        ({"heads": 0}, "heads"),
        ({"decoder_layers": 0}, "positive"),
        ({"vocabulary_size": -1}, "positive"),
        ({"imitation_width": -1}, "imitation_width"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_configuration_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DeeCapConfig.from_json({"vocabulary_size": 10, **changes})


def test_a_configuration_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary_size"):
        DeeCapConfig.from_json({})
