"""A bundle loads back bit for bit, refuses what is not one, and its speed table keeps its promises."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from model.bundle import (
    CONFIG,
    EXTRACTOR,
    FORMAT,
    MODEL_CARD,
    REQUIRED,
    SPEEDS,
    VOCABULARY,
    WEIGHTS,
    BundleError,
    load_bundle,
    pack_weights,
    revision_of,
    save_model,
    unpack_weights,
    write_json,
)
from model.captioner import Captioner, choose_device
from model.config import EXITS, FUSIONS, DeeCapConfig
from model.deecap import DeeCap
from model.exits import DEFAULT_SPEED, TIERS, ExitPolicy, SpeedRow, SpeedTable, UnknownSpeedError
from model.vocabulary import SPECIAL, Vocabulary

SHIPPED = Path(__file__).parents[2] / "model" / "bundles" / "deecap-flickr8k"

SAMPLES = Path(__file__).parents[2] / "samples"
MEGABYTE = 1_000_000

TABLE = SpeedTable(
    rows=(
        SpeedRow(0.0, 1.0, 1.0, 50.0, 9.0),
        SpeedRow(1.0, 2.0, 1.5, 49.0, 7.0),
        SpeedRow(2.0, 5.0, 3.0, 47.0, 4.0),
    ),
    tiers={"full": 0.0, "balanced": 1.0, "fast": 1.4, "turbo": 1.7},
    measured={"split": "val"},
)


def save(folder: Path, model: DeeCap, vocabulary: Vocabulary, policy: ExitPolicy | None = None) -> Path:
    """A bundle but for the extractor, which stands for one and is not opened by `load_bundle`."""
    if policy is None:
        policy = ExitPolicy(()) if model.config.exits == "final" else ExitPolicy.every_layer(model.layers)
    save_model(folder, folder.name, model, vocabulary, policy)
    (folder / EXTRACTOR).write_bytes(b"\x08\x0a an extractor")
    write_json(folder / SPEEDS, TABLE.to_json())
    return folder


@pytest.fixture
def words() -> Vocabulary:
    return Vocabulary([*SPECIAL, *(f"word{number}" for number in range(100)), "café"])


@pytest.fixture
def bundle(tmp_path: Path, words: Vocabulary) -> Path:
    torch.manual_seed(0)
    model = DeeCap(DeeCapConfig(len(words), 40, 32, 2, 64, 1, 4))
    return save(tmp_path / "one", model, words)


@pytest.fixture
def guessing_bundle(tmp_path: Path, words: Vocabulary) -> Path:
    """Of a model with an exit head, for policies with a margin."""
    torch.manual_seed(0)
    model = DeeCap(DeeCapConfig(len(words), 40, 32, 2, 64, 1, 4, imitation_width=8, exit_head=True))
    torch.nn.init.normal_(model.exit_head.weight)
    return save(tmp_path / "guessing", model, words)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# The folder --------------------------------------------------------------------------------------------------------


def test_a_model_with_one_exit_has_none_to_test(tmp_path: Path, words: Vocabulary) -> None:
    model = DeeCap(DeeCapConfig(len(words), 40, 32, 2, 64, 1, 4, exits="final"))
    folder = save(tmp_path / "final", model, words)
    save_model(folder, "final", model, words, ExitPolicy.every_layer(4))
    with pytest.raises(BundleError, match=CONFIG):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("exits", "fusion"), [*(("deecap", fusion) for fusion in FUSIONS), *((exits, "average") for exits in EXITS[1:])]
)
def test_saving_what_was_loaded_gives_the_same_bytes(
    tmp_path: Path, words: Vocabulary, exits: str, fusion: str
) -> None:
    torch.manual_seed(1)
    model = DeeCap(DeeCapConfig(len(words), 40, 32, 2, 64, 1, 4, exits=exits, fusion=fusion))
    first = save(tmp_path / "one" / "same", model, words)
    loaded = load_bundle(first)
    second = save(tmp_path / "two" / "same", loaded.model, loaded.vocabulary)
    assert len({(first / name).stat().st_mode for name in REQUIRED}) == 1, "who may read one may read all"
    for name in REQUIRED:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    again = load_bundle(second)
    assert again.revision == loaded.revision
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_narrow_imitators_and_an_exit_head_are_saved_too(guessing_bundle: Path, tmp_path: Path) -> None:
    loaded = load_bundle(guessing_bundle)
    assert (loaded.model.config.imitation_width, loaded.model.config.exit_head) == (8, True)
    assert loaded.model.imitation.up.shape == (3, 32, 8)
    assert loaded.model.exit_head.weight.abs().max() > 1
    second = save(tmp_path / "two" / "guessing", loaded.model, loaded.vocabulary)
    assert revision_of(second) == loaded.revision


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy(()),
        ExitPolicy((1, 3)),
        ExitPolicy((2,), "copied"),
        ExitPolicy((1,), "computed", 0.0),
        ExitPolicy((1, 2, 3), "copied", -0.25),
    ],
)
def test_the_exit_policy_is_kept_as_it_is(guessing_bundle: Path, policy: ExitPolicy) -> None:
    assert ExitPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    loaded = load_bundle(guessing_bundle)
    save(guessing_bundle, loaded.model, loaded.vocabulary, policy)
    found = load_bundle(guessing_bundle)
    assert found.policy == policy
    assert isinstance(found.policy.tested, tuple)
    assert found.revision != loaded.revision
    kept = json.loads((guessing_bundle / CONFIG).read_text())
    expected = {"tested": list(policy.tested), "skipped": policy.skipped, "margin": policy.margin}
    assert kept["exit_policy"] == expected


def test_a_policy_that_names_its_layers_alone_computes_and_tests_all(bundle: Path) -> None:
    change(bundle / CONFIG, exit_policy={"tested": [1, 3]})
    assert load_bundle(bundle).policy == ExitPolicy((1, 3), "computed", None)


def test_packing_twice_is_packing_once() -> None:
    """For matrices of many rows and magnitudes: no scale may drift by the last bit."""
    torch.manual_seed(0)
    state = {"matrix": torch.randn(20_000, 7) * torch.logspace(-6, 6, 20_000)[:, None], "vector": torch.randn(9)}
    state["matrix"][5] = 0.0
    once = pack_weights(state)
    twice = pack_weights(unpack_weights(once))
    assert once.keys() == twice.keys()
    for name in once:
        assert torch.equal(once[name], twice[name]), name


def test_what_is_loaded_is_what_was_packed_bit_for_bit(bundle: Path, words: Vocabulary) -> None:
    torch.manual_seed(0)
    model = DeeCap(DeeCapConfig(len(words), 40, 32, 2, 64, 1, 4))
    expected = unpack_weights(pack_weights(model.state_dict()))
    loaded = load_bundle(bundle)
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items() if value.ndim < 2)
    assert loaded.name == "one"
    assert loaded.vocabulary.words == words.words
    assert loaded.policy == ExitPolicy((1, 2, 3))
    assert loaded.speeds == TABLE
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_int8_is_at_most_half_a_step_of_each_row_away() -> None:
    torch.manual_seed(0)
    value = torch.randn(300, 50) * torch.logspace(-4, 4, 300)[:, None]
    packed = pack_weights({"x": value})
    assert packed["x"].dtype == torch.int8
    assert set(packed) == {"x", "x.scale"}
    error = (unpack_weights(packed)["x"] - value).abs()
    step = value.abs().amax(1, keepdim=True) / 127
    assert (error <= step * 0.51).all()  # a scale may be rounded too
    assert packed["x"].abs().amax(1).min() >= 126  # the range is used


def test_a_stack_of_matrices_and_a_row_of_zeros_are_packed_too() -> None:
    value = torch.zeros(2, 3, 4)
    value[1] = torch.arange(12).reshape(3, 4)
    found = unpack_weights(pack_weights({"x": value}))["x"]
    assert found.shape == value.shape
    assert torch.equal(found[0], torch.zeros(3, 4))
    torch.testing.assert_close(found, value, rtol=0, atol=11 / 127 / 2 * 1.02)


def test_nothing_in_the_folder_is_a_pickle(bundle: Path) -> None:
    assert {path.name for path in bundle.iterdir()} == set(REQUIRED)
    for path in bundle.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))  # a pickle, and the zip that torch.save writes
        assert path.suffix in (".json", ".safetensors", ".onnx")


@pytest.mark.parametrize("name", REQUIRED)
def test_the_revision_changes_with_each_file(bundle: Path, name: str) -> None:
    before = revision_of(bundle)
    assert len(before) == 12
    int(before, 16)
    assert revision_of(bundle) == before
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content + b" ")
    assert revision_of(bundle) != before
    (bundle / name).write_bytes(content)
    assert revision_of(bundle) == before


def test_the_revision_knows_where_one_file_ends(bundle: Path) -> None:
    before = revision_of(bundle)
    content = (bundle / EXTRACTOR).read_bytes()
    (bundle / EXTRACTOR).write_bytes(content[:-1])
    (bundle / SPEEDS).write_bytes(content[-1:] + (bundle / SPEEDS).read_bytes())
    assert revision_of(bundle) != before


def test_the_model_card_is_for_people_and_no_part_of_the_revision(bundle: Path) -> None:
    before = revision_of(bundle)
    (bundle / MODEL_CARD).write_text("# A card")
    assert revision_of(bundle) == before
    load_bundle(bundle)


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        load_bundle(bundle)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, VOCABULARY, WEIGHTS, SPEEDS])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe\x00", b"null", b"[]", b"{}", b"7"])
def test_a_broken_file_is_named(bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        load_bundle(bundle)


def test_cut_weights_are_named(bundle: Path) -> None:
    content = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=WEIGHTS):
        load_bundle(bundle)


def test_weights_of_another_network_are_refused(bundle: Path) -> None:
    whole = load_file(bundle / WEIGHTS)
    lacking = {name: value for name, value in whole.items() if name != "head_bias"}
    extra = {**whole, "surplus": torch.zeros(3)}
    shorter = {**whole, "head_bias": torch.zeros(3)}
    unscaled = {name: value for name, value in whole.items() if name != "feature_in.weight.scale"}
    told = ["head_bias", "surplus", "head_bias", "feature_in.weight"]
    for state, name in zip((lacking, extra, shorter, unscaled), told, strict=True):
        save_file(state, bundle / WEIGHTS)
        with pytest.raises(BundleError, match=name):
            load_bundle(bundle)


@pytest.mark.parametrize("number", [0, FORMAT + 1, "1", None])
def test_another_format_is_refused(bundle: Path, number: object) -> None:
    change(bundle / CONFIG, format=number)
    with pytest.raises(BundleError, match=f"{CONFIG}.*format {FORMAT}"):
        load_bundle(bundle)


def test_the_format_before_is_refused_by_its_number(bundle: Path) -> None:
    """Its policy was a list of layers under another name: that it is missing is not what to say."""
    config = json.loads((bundle / CONFIG).read_text())
    del config["exit_policy"]
    write_json(bundle / CONFIG, {**config, "format": 1, "tested_layers": [1, 2, 3]})
    with pytest.raises(BundleError, match=rf"{CONFIG} .*of format 1, and this version reads format 2"):
        load_bundle(bundle)


@pytest.mark.parametrize("tested", [[0], [4], [2, 1], ["a"], "12", 3, None])
def test_tested_layers_that_do_not_fit_are_refused(bundle: Path, tested: object) -> None:
    change(bundle / CONFIG, exit_policy={"tested": tested})
    with pytest.raises(BundleError, match=CONFIG):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"colour": 1}, "colour"),
        ({"tested_layers": [1]}, "tested_layers"),
        ({"skipped": "guessed"}, "skipped must be one of computed, copied, not 'guessed'"),
        ({"skipped": None}, "skipped"),
        ({"skipped": ["copied"]}, "skipped"),
        ({"margin": math.nan}, "margin must be a finite number"),
        ({"margin": math.inf}, "margin must be a finite number"),
        ({"margin": -math.inf}, "margin must be a finite number"),
        ({"margin": "wide"}, "wide"),
        ({"margin": [0.1]}, "number"),
    ],
)
def test_a_policy_that_is_none_is_refused(guessing_bundle: Path, changes: dict[str, object], told: str) -> None:
    policy = json.loads((guessing_bundle / CONFIG).read_text())["exit_policy"]
    change(guessing_bundle / CONFIG, exit_policy={**policy, **changes})  # JSON as Python writes it has NaN
    with pytest.raises(BundleError, match=f"{CONFIG}.*{told}"):
        load_bundle(guessing_bundle)


@pytest.mark.parametrize("policy", [None, 3, [], [1, 2, 3], "copied", {}])
def test_what_is_no_policy_at_all_is_refused(bundle: Path, policy: object) -> None:
    change(bundle / CONFIG, exit_policy=policy)
    with pytest.raises(BundleError, match=CONFIG):
        load_bundle(bundle)


@pytest.mark.parametrize("margin", [0.0, -0.5, 2])
def test_a_margin_needs_an_exit_head(bundle: Path, guessing_bundle: Path, margin: float) -> None:
    policy = {"tested": [1], "skipped": "copied", "margin": margin}
    change(bundle / CONFIG, exit_policy=policy)
    with pytest.raises(BundleError, match=f"{CONFIG}.*exit head"):
        load_bundle(bundle)
    change(guessing_bundle / CONFIG, exit_policy=policy)
    assert load_bundle(guessing_bundle).policy.margin == margin


@pytest.mark.parametrize(
    ("changes", "told"), [({"exit_head": True}, "exit_head"), ({"imitation_width": 8}, "imitation.up")]
)
def test_parts_that_the_weights_do_not_have_are_named(bundle: Path, changes: dict[str, object], told: str) -> None:
    config = json.loads((bundle / CONFIG).read_text())
    change(bundle / CONFIG, model={**config["model"], **changes})
    with pytest.raises(BundleError, match=rf"(?s){WEIGHTS}.*{told}"):
        load_bundle(bundle)


def test_a_network_that_cannot_be_is_refused(bundle: Path) -> None:
    for wrong in (
        {"heads": 3},
        {"heads": 0},
        {"exits": "never"},
        {"colour": 1},
        {"width": "wide"},
        {"imitation_width": -1},
    ):
        config = json.loads((bundle / CONFIG).read_text())
        broken = shutil.copytree(bundle, bundle.parent / "broken", dirs_exist_ok=True)
        change(broken / CONFIG, model={**config["model"], **wrong})
        with pytest.raises(BundleError):
            load_bundle(broken)


@pytest.mark.parametrize("added", [["more"], []])
def test_a_vocabulary_of_another_length_is_refused(bundle: Path, words: Vocabulary, added: list[str]) -> None:
    write_json(bundle / VOCABULARY, [*words.words, *added] if added else list(words.words[:-1]))
    with pytest.raises(BundleError, match="words"):
        load_bundle(bundle)


def test_a_broken_extractor_is_named_when_the_captioner_opens_it(bundle: Path) -> None:
    with pytest.raises(BundleError, match=EXTRACTOR):
        Captioner.load(bundle, "cpu")


def test_a_device_that_is_not_there_is_refused(bundle: Path) -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda")
    with pytest.raises(BundleError, match="abacus"):
        Captioner.load(bundle, "abacus")
    if not torch.cuda.is_available():
        with pytest.raises(BundleError, match="GPU"):
            choose_device("cuda")


# The speed table ---------------------------------------------------------------------------------------------------


def test_tiers_are_named_points() -> None:
    for name, tau in TABLE.tiers.items():
        found = TABLE.resolve(name)
        assert (found.requested, found.tier, found.tau) == (name, name, tau)
        assert found.promised == pytest.approx(TABLE.speedup_at(tau))
    assert TABLE.resolve() == TABLE.resolve(DEFAULT_SPEED)
    assert TABLE.resolve("full").tau == 0.0
    assert TABLE.resolve("fast").promised == pytest.approx(2.0 + 3.0 * 0.4)


@pytest.mark.parametrize(
    ("asked", "tau"), [(1, 0.0), (1.0, 0.0), (1.5, 0.5), (2, 1.0), (3.5, 1.5), (5, 2.0), ("2", 1.0), ("3.5", 1.5)]
)
def test_numbers_are_looked_up_between_the_rows(asked: str | float, tau: float) -> None:
    found = TABLE.resolve(asked)
    assert found.tau == pytest.approx(tau)
    assert found.tier is None
    assert found.requested == float(asked)
    assert found.promised == pytest.approx(float(asked))


@pytest.mark.parametrize(("tau", "promised"), [(0.0, 1.0), (0.25, 1.25), (1.5, 3.5), (2.0, 5.0), (50.0, 5.0)])
def test_a_threshold_is_taken_as_it_is(tau: float, promised: float) -> None:
    found = TABLE.resolve(tau=tau)
    assert (found.requested, found.tier, found.tau) == (None, None, tau)
    assert found.promised == pytest.approx(promised)


HUGE = pytest.param(10**400, id="huge")  # JSON knows no largest number


@pytest.mark.parametrize(
    "speed",
    [math.nan, math.inf, -math.inf, -2, 0, 0.5, 0.999, 5.001, 100, HUGE, "warp", "", "nan", "inf", "Full", "1e9"],
)
def test_speeds_that_are_not_offered_are_refused(speed: str | float) -> None:
    with pytest.raises(UnknownSpeedError, match=r"full, balanced, fast, turbo .* 1 to 5\.00"):
        TABLE.resolve(speed)


@pytest.mark.parametrize("tau", [math.nan, math.inf, -math.inf, -0.1, HUGE])
def test_thresholds_that_are_none_are_refused(tau: float) -> None:
    with pytest.raises(UnknownSpeedError, match="tau"):
        TABLE.resolve(tau=tau)


def test_speed_and_threshold_together_are_refused() -> None:
    with pytest.raises(UnknownSpeedError, match="both"):
        TABLE.resolve("fast", tau=1.0)
    with pytest.raises(UnknownSpeedError, match="both"):
        TABLE.resolve(1.0, tau=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_more_speed_is_never_a_lower_threshold_even_where_the_measure_is_uneven(seed: int) -> None:
    random = np.random.default_rng(seed)
    speedups = [1.0, *(1.0 + np.linspace(0.2, 4.0, 9) + random.normal(size=9) * 0.7).clip(1.0).tolist()]
    table = replace(
        TABLE, rows=tuple(SpeedRow(float(tau), speedup, 1.0, 0.0, 0.0) for tau, speedup in enumerate(speedups))
    )
    assert table.fastest == max(speedups)
    asked = np.linspace(1.0, table.fastest, 101).tolist()
    taus = [table.resolve(speed).tau for speed in asked]
    assert taus == sorted(taus)
    for speed, tau in zip(asked, taus, strict=True):
        assert table.speedup_at(tau) == pytest.approx(speed)
    promises = [table.speedup_at(tau) for tau in np.linspace(0.0, 12.0, 101)]
    assert promises == sorted(promises)
    for tau, speedup in enumerate(speedups):  # never less than what was measured at or below
        assert table.speedup_at(tau) >= speedup


def test_a_table_of_one_row_offers_full_depth_only() -> None:
    table = SpeedTable((SpeedRow(0.0, 1.0, 1.0, 0.0, 0.0),), dict.fromkeys(TIERS, 0.0))
    assert table.resolve("turbo").tau == 0.0
    assert table.resolve(1.0).promised == 1.0
    assert table.resolve(tau=3.0).promised == 1.0
    with pytest.raises(UnknownSpeedError):
        table.resolve(1.01)


def test_a_table_survives_json() -> None:
    assert SpeedTable.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.pop("rows"),
        lambda data: data.pop("tiers"),
        lambda data: data["rows"].clear(),
        lambda data: data["rows"].reverse(),
        lambda data: data["rows"].append(data["rows"][-1]),
        lambda data: data["rows"].pop(0),
        lambda data: data["rows"][0].pop("cider"),
        lambda data: data["rows"][0].update(colour=1),
        lambda data: data["tiers"].pop("fast"),
        lambda data: data["tiers"].update(warp=9.0),
    ],
)
def test_a_table_that_is_none_is_refused(spoil: Callable[[dict[str, object]], object]) -> None:
    data = json.loads(json.dumps(TABLE.to_json()))
    spoil(data)
    with pytest.raises(ValueError, match=r"speed table"):
        SpeedTable.from_json(data)


# The bundle that ships ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.load(SHIPPED, "cpu")


def test_the_shipped_bundle_is_small_and_says_what_it_is() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * MEGABYTE
    card = (SHIPPED / MODEL_CARD).read_text()
    assert "Flickr8k" in card
    assert all(path.suffix in (".json", ".safetensors", ".onnx", ".md", ".txt", "") for path in files)


def test_the_shipped_bundle_offers_its_tiers(captioner: Captioner) -> None:
    assert captioner.name == "deecap-flickr8k"
    for name, target in TIERS.items():
        assert captioner.speeds.resolve(name).promised >= target
    assert captioner.speeds.tiers["full"] == 0.0
    assert captioner.speeds.fastest >= 4.0


@pytest.mark.parametrize("photo", sorted(SAMPLES.glob("*.jpg")), ids=lambda path: path.stem)
def test_the_shipped_bundle_captions_the_sample_photos(captioner: Captioner, photo: Path) -> None:
    with Image.open(photo) as image:
        regions = captioner.look(image)
    for tier in TIERS:
        caption = captioner.describe(regions, tier)
        assert len(caption.words) >= 3, tier
        assert 0 < caption.confidence < 1
    full = captioner.describe(regions, tau=0.0)
    assert {step.exit_layer for step in full.steps} == {captioner.layers}
    assert full.speedup == 1.0
    assert captioner.describe(regions, "turbo").speedup > 1.0
