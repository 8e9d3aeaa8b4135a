"""A row tells what the system did: against captions made one by one, and against teacher forcing word by word."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.decoding.search import emission_logits, greedy_search
from model.deecap import DeeCap, entropy
from model.evaluation.fcs import consistency
from model.evaluation.metrics import per_image_cider
from model.evaluation.result_rows import ResultRow, comparisons, read_rows, write_row
from model.evaluation.spice import JARS, spice_or_reason
from model.exits import ExitPolicy, paper_speedup
from model.experiments.measure import EVERY_WORD, encode, measure, parse_policy, read_split, threshold_for
from model.experiments.page import ROWS
from model.experiments.systems import LATER, System, configuration, from_run
from model.experiments.teacher import teacher_forced
from model.training.data import read_captions
from model.training.loop import Trainer
from model.training.settings import DataSettings, StageSettings, TrainSettings, find_settings, read_settings
from model.vocabulary import BOS, EOS


def test_captions_at_every_threshold_are_those_of_one_photo_at_a_time(
    rows: list[ResultRow], make_system: Callable[..., System], data: Path
) -> None:
    photos = [photo for photo in read_captions(data / "captions.json") if photo.captions]
    row = next(row for row in rows if row.system == "deecap-concatenation")
    system = make_system("deecap-concatenation", "deecap", 4)
    regions = system.look(photos)
    assert len(row.points) > 3
    for point in row.points:
        words, exits, executed = [], [], 0
        for seen in regions:
            parts = (torch.from_numpy(array)[None] for array in (seen.features, seen.boxes))
            decoded = greedy_search(system.model, system.model.encode(*parts), [point.tau], system.policy)
            executed += decoded.executed_rows
            exits.append([step.exit_layer for step in decoded.captions[0]])
            words.append(system.vocabulary.decode(step.token for step in decoded.captions[0]))
        steps = [layer for caption in exits for layer in caption]
        assert point.speedup == pytest.approx(paper_speedup(steps, 4), abs=1e-4)
        assert point.executed_speedup == pytest.approx(4 * len(steps) / executed, abs=1e-4)
        assert point.depth == pytest.approx([np.mean(caption) for caption in exits], abs=0.006)
        assert point.cider == pytest.approx(per_image_cider(words, [p.captions for p in photos]).tolist(), abs=0.06)
        assert point.captions == [" ".join(caption) for caption in words[:8]]
        assert point.scores["cider_d"] == pytest.approx(point.mean_cider, abs=0.06)
        assert point.scores["meteor"] == point.scores["spice"] == "not run: not asked for"


def test_exits_are_judged_word_by_word(make_system: Callable[..., System], data: Path) -> None:
    system = make_system("tf-ee", "plain", 4)
    photos = [photo for photo in read_captions(data / "captions.json") if photo.captions]
    references = [photo.captions for photo in photos]
    regions = system.look(photos)
    found = teacher_forced(system.model, system.vocabulary, encode(system, regions), references)
    slow: list[tuple[tuple[float, ...], tuple[float, ...], tuple[bool, ...]]] = []
    for seen, captions in zip(regions, references, strict=True):
        memory = system.model.encode(*(torch.from_numpy(array)[None] for array in (seen.features, seen.boxes)))
        for caption in captions:
            said = system.vocabulary.encode(caption)
            for place, word in enumerate([*said, EOS]):
                states = system.model.hidden_states(memory, torch.tensor([[BOS, *said[:place]]]))
                logits = [emission_logits(system.model, state[0, -1]) for state in states]
                slow.append(
                    (
                        tuple(float(one.softmax(-1).max()) for one in logits),
                        tuple(float(entropy(one)) for one in logits),
                        tuple(int(one.argmax()) != word for one in logits),
                    )
                )
    assert found.layers == (1, 2, 3, 4)
    # The order of tokens is the batch's own: both are sorted by the first exit's confidence.
    order, theirs = np.argsort(found.confidence[:, 0]), sorted(slow)
    assert len(theirs) == len(order)
    np.testing.assert_allclose(found.confidence[order], [one[0] for one in theirs], atol=1e-5)
    np.testing.assert_allclose(found.entropy[order].sum(0), np.sum([one[1] for one in theirs], 0), rtol=1e-4)
    np.testing.assert_array_equal(found.hard.sum(0), np.sum([one[2] for one in theirs], 0))


def test_tokens_leave_at_the_first_tested_layer_below_the_threshold(
    make_system: Callable[..., System], data: Path
) -> None:
    system = make_system("tf-ee", "plain", 4)
    split = read_split(data / "captions.json", "captions.json", "val")
    captions = [photo.captions for photo in split.photos]
    found = teacher_forced(system.model, system.vocabulary, encode(system, system.look(split.photos)), captions)
    tau = float(np.median(found.entropy))
    for tested in [(1, 2, 3), (2,), ()]:
        slow = [next((m for m in tested if row[m - 1] < tau), 4) for row in found.entropy]
        assert (found.exit_index(tau, tested) + 1).tolist() == slow
        assert found.speedup(tau, tested) == pytest.approx(4 / np.mean(slow))
    policy = ExitPolicy.every_layer(4)
    tau = threshold_for(found, 2.0, policy)
    assert found.speedup(tau, policy.tested) >= 2.0 > found.speedup(tau - 0.01, policy.tested)


def test_a_row_spans_from_full_depth_to_the_first_layer(rows: list[ResultRow]) -> None:
    for row in rows:
        assert row.points[0].tau == 0.0
        assert row.points[0].speedup == row.points[0].executed_speedup == 1.0
        assert row.data["photos"] == 24
        if row.model["exits"] == "final":
            assert [one.layer for one in row.exits] == [row.layers]
            assert len(row.points) == 1
        else:
            assert [one.layer for one in row.exits] == [1, 2, 3, 4]
            assert row.points[-1].tau == EVERY_WORD
            assert row.points[-1].speedup == 4.0
            assert any(abs(point.speedup / 2 - 1) < 0.1 for point in row.points)
        # At tau 0 every token is judged by the last exit, and beyond any entropy by the first.
        assert row.points[0].auroc == row.exits[-1].auroc
        assert row.points[-1].fcs == row.exits[0].fcs


def test_spice_is_not_run_rather_than_fetched_or_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = pytest.importorskip("pycocoevalcap.spice.spice")
    monkeypatch.setattr("shutil.which", lambda name: "/bin/java")
    monkeypatch.setattr(package, "__file__", str(tmp_path / "spice.py"))
    assert str(spice_or_reason([["a"]], [[["a"]]])).startswith("not run: stanford-corenlp-3.6.0.jar")
    (tmp_path / "lib").mkdir()
    for jar in JARS:
        (tmp_path / "lib" / jar).touch()

    class Scorer:
        def compute_score(self, truth: dict[int, list[str]], found: dict[int, list[str]]) -> tuple[float, None]:
            assert (truth, found) == ({0: ["a cat", "cats"]}, {0: ["a dog"]})
            return 0.25, None

    monkeypatch.setattr(package, "Spice", Scorer)
    assert spice_or_reason([["a", "dog"]], [[["a", "cat"], ["cats"]]]) == 25.0
    monkeypatch.setattr(package, "Spice", lambda: 1 / 0)
    assert spice_or_reason([["a"]], [[["a"]]]) == "not run: failed (division by zero)"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert spice_or_reason([["a"]], [[["a"]]]) == "not run: there is no Java on the path"


def test_a_decoder_of_one_layer_is_trained_from_the_first_layer_of_a_deeper_one(
    data: Path, tmp_path: Path, config_text: Callable[..., str]
) -> None:
    """As TF-1L is: from the backbone that the systems share, by a stage of its own, then by theirs."""
    told = json.loads((data / "captions.json").read_text())
    folder = tmp_path / "data"
    shutil.copytree(data / "regions", folder / "regions")
    for number, image in enumerate(told["images"]):
        image["split"] = "train" if number < 16 else "val"
    told["images"].pop()
    (folder / "captions.json").write_text(json.dumps(told))
    stage = ('"exits"\nkind = "exits"', '"backbone"\nkind = "backbone"')
    deep = config_text(name="deep", exits="deecap", layers=4, fusion="average").replace(*stage)
    one = config_text(name="one", exits="final", layers=1, fusion="average")
    one = one.replace("seed", 'starts_from = "deep/backbone"\nseed')
    for name, text in (("deep", deep), ("one", one)):
        (tmp_path / f"{name}.toml").write_text(text)
        settings = read_settings(tmp_path / f"{name}.toml")
        Trainer(settings, folder, tmp_path / name, tmp_path).run()
    system = from_run(settings, tmp_path / "one", folder)
    assert system.model.layers == 1
    split = read_split(folder / "captions.json", "captions.json", "val")
    found = teacher_forced(
        system.model, system.vocabulary, encode(system, system.look(split.photos)), [p.captions for p in split.photos]
    )
    assert found.layers == (1,)


def test_a_policy_of_ones_own(make_system: Callable[..., System], data: Path) -> None:
    system = make_system("tf-ee", "plain", 4)
    assert parse_policy(system, None, None) is None
    assert parse_policy(system, "every", None) == ExitPolicy((1, 2, 3))
    assert parse_policy(system, "1,3", "copied") == ExitPolicy((1, 3), "copied")
    for tested, skipped in [("4", None), ("x", None), (None, "lost")]:
        with pytest.raises(ValueError, match=r"tested|invalid|skipped"):
            parse_policy(system, tested, skipped)
    with pytest.raises(ValueError, match="exit head"):
        parse_policy(system, None, None, "0.5")
    model = system.model
    headed = dataclasses.replace(system, model=DeeCap(dataclasses.replace(model.config, exit_head=True)))
    screened = parse_policy(headed, "1", None, "0.5")
    assert screened == ExitPolicy((1,), "computed", 0.5)
    assert parse_policy(dataclasses.replace(headed, policy=screened), None, None, "none") == ExitPolicy((1,))
    with pytest.raises(ValueError, match="float"):
        parse_policy(headed, None, None, "much")
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    split = read_split(data / "captions.json", "captions.json", "val", limit=6)
    row = measure(system, split, ExitPolicy((2,)), "x", meteor=False)
    assert row.points[-1].exit_layers[0] == row.points[-1].exit_layers[2] == 0
    assert row.points[-1].speedup == 2.0


def test_a_split_without_captions_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="train"):
        read_split(data / "captions.json", "captions.json", "train")


def test_settings_that_came_later_are_left_out_where_they_say_what_they_say_by_themselves() -> None:
    defaults: dict[str, Any] = {}
    for kind in (TrainSettings, DataSettings, StageSettings):
        for item in dataclasses.fields(kind):
            if item.name in LATER:
                assert item.name not in defaults, f"{item.name} means two things"
                defaults[item.name] = item.default
    assert defaults == LATER


# Rows in files -----------------------------------------------------------------------------------------------------


def test_rows_are_read_as_written(rows: list[ResultRow], tmp_path: Path) -> None:
    paths = [write_row(tmp_path, row) for row in rows]
    assert len({path.name for path in paths}) == len(rows)
    assert sorted(read_rows(tmp_path), key=lambda row: row.key) == sorted(rows, key=lambda row: row.key)
    assert read_rows(tmp_path / "nowhere") == []
    (group,) = comparisons(rows).values()
    assert len(group) == len(rows)
    other = dataclasses.replace(rows[0], budget="other")
    assert [len(group) for group in comparisons([*rows, other]).values()] == [1, len(rows)]
    seen = dataclasses.replace(rows[0], configuration={**rows[0].configuration, "extractor": "e5e5"})
    apart = comparisons([*rows, seen])
    assert [len(group) for group in apart.values()] == [len(rows), 1]
    assert [name.endswith("extractor e5e5") for name in apart] == [False, True]


def test_the_key_is_of_what_decides_the_result(rows: list[ResultRow]) -> None:
    row = rows[0]
    told = row.configuration
    assert dataclasses.replace(row, configuration=dict(reversed(told.items()))).key == row.key
    assert dataclasses.replace(row, origin={"command": "another"}, system="renamed").key == row.key
    assert dataclasses.replace(row, configuration={**told, "seed": 1}).key != row.key
    assert dataclasses.replace(row, policy={**row.policy, "skipped": "copied"}).key != row.key
    assert len({one.key for one in rows}) == len(rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(format=9),
        lambda told: told.update(colour=1),
        lambda told: told.pop("budget"),
        lambda told: told["configuration"].update(seed=9),
        lambda told: told["points"][0].update(tau=1.0),
        lambda told: told["points"][0]["cider"].pop(),
        lambda told: told["points"][0]["cider"].__setitem__(0, "high"),
        lambda told: told["points"][0].pop("fcs"),
        lambda told: told["points"].clear(),
        lambda told: told["exits"][0].update(layer=9),
        lambda told: told.update(points={}),
    ],
)
def test_a_row_that_is_none_is_named(
    rows: list[ResultRow], tmp_path: Path, change: Callable[[dict[str, object]], None]
) -> None:
    told = json.loads(write_row(tmp_path, rows[2]).read_text())
    change(told)
    (tmp_path / "broken.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_rows(tmp_path)


def test_the_measures_of_an_exit_are_those_of_its_tokens(make_system: Callable[..., System], data: Path) -> None:
    from model.experiments.measure import exit_quality

    system = make_system("tf-ee", "plain", 4)
    split = read_split(data / "captions.json", "captions.json", "val")
    captions = [photo.captions for photo in split.photos]
    found = teacher_forced(system.model, system.vocabulary, encode(system, system.look(split.photos)), captions)
    for index, one in enumerate(exit_quality(found)):
        by_entropy = consistency(-found.entropy[:, index], found.hard[:, index])
        assert one.entropy_auroc == pytest.approx(by_entropy.auroc, abs=1e-5)
        assert one.accuracy == pytest.approx(1 - found.hard[:, index].mean(), abs=1e-5)
        assert sum(count for count, _, _ in one.reliability) == one.tokens == len(found.hard)


def test_every_committed_row_is_of_a_configuration_that_ships() -> None:
    """Else it could not be measured anew, and what is measured today would not stand beside it."""
    rows = [row for row in read_rows(ROWS) if "bundle" not in row.configuration]
    assert len(rows) >= 12
    for row in rows:
        settings = find_settings(Path(row.system))
        told = json.loads(json.dumps(configuration(settings)))
        measured = {"measured_stage", "extractor"} if settings.seen_through else {"measured_stage"}
        assert {**told, **{name: row.configuration[name] for name in measured}} == row.configuration, row.system
