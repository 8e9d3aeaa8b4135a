"""The captions that a model makes for itself, and the file that a stop does not lose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.deecap import DeeCap
from model.training.own_captions import KEPT, beam_captions, made_once
from model.vocabulary import EOS

MakeModel = Callable[..., DeeCap]


def memory_of(network: DeeCap, images: int) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return network.encode(
            torch.randn(images, 3, network.config.feature_width, dtype=torch.float64),
            torch.rand(images, 3, 4, dtype=torch.float64),
        )


def test_beam_captions_are_without_eos(make_model: MakeModel) -> None:
    network = make_model(max_words=4)
    for captions in beam_captions(network, memory_of(network, images=2), None):
        assert 1 <= len(captions) <= KEPT
        assert all(EOS not in caption for caption in captions)


def captions_of(start: int, end: int) -> list[list[list[int]]]:
    return [[[number], [number, number]] for number in range(start, end)]


def test_captions_are_made_once(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(7)]
    made = made_once(tmp_path / "own.json", names, captions_of, batch=3)
    assert made == {f"{number}.jpg": [[number], [number, number]] for number in range(7)}
    assert [path.name for path in tmp_path.iterdir()] == ["own.json"]

    def never(start: int, end: int) -> list[list[list[int]]]:
        raise AssertionError("made again")

    assert made_once(tmp_path / "own.json", names, never) == made


@pytest.mark.parametrize("torn", ["", '{"6.jpg": [[6'])
def test_after_a_stop_only_the_rest_is_made(tmp_path: Path, torn: str) -> None:
    names, path = [f"{number}.jpg" for number in range(10)], tmp_path / "own.json"
    asked = []

    def stopped(start: int, end: int) -> list[list[list[int]]]:
        if start == 6:
            raise KeyboardInterrupt
        return captions_of(start, end)

    with pytest.raises(KeyboardInterrupt):
        made_once(path, names, stopped, batch=3)
    assert not path.exists()
    with path.with_suffix(".jsonl").open("a") as lines:
        lines.write(torn)

    def going_on(start: int, end: int) -> list[list[list[int]]]:
        asked.append((start, end))
        if start == 9 and len(asked) == 2:
            raise KeyboardInterrupt  # a second stop: the torn line must not have spoilt the file
        return captions_of(start, end)

    with pytest.raises(KeyboardInterrupt):
        made_once(path, names, going_on, batch=3)
    made = made_once(path, names, going_on, batch=3)
    assert asked == [(6, 9), (9, 10), (9, 10)]
    assert made == made_once(tmp_path / "other.json", names, captions_of)
    assert json.loads(path.read_text()) == made


def test_what_is_left_of_other_photos_is_refused_and_kept(tmp_path: Path) -> None:
    left = tmp_path / "own.jsonl"
    left.write_text('{"a.jpg": [[5]], "b.jpg": [[6]]}\n')
    with pytest.raises(ValueError, match=r"own\.jsonl is of other photos"):
        made_once(tmp_path / "own.json", ["a.jpg", "c.jpg", "d.jpg"], captions_of, batch=2)
    assert left.exists()
