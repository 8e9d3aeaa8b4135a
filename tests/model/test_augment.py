"""What batches are changed by, and what the trunk's cells are asked: held to hand-worked cases and slow oracles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.training.augment import draw_windows, hide_regions, zoom, zoom_boxes
from model.training.cell_classes import CellClasses, SeenPart, boxes_in, cell_targets
from model.training.features import CROPPED, CROPPED_FLIPPED, FLIPPED, FULL, view_pixels
from model.training.given_boxes import GivenBoxes
from model.training.regions import PhotoRows
from model.training.settings import StageSettings, read_settings
from model.training.tuning import TrunkTuning

WHOLE = np.array([0.0, 0.0, 1.0, 1.0])


def test_windows_are_within_the_photo_and_no_smaller_than_told() -> None:
    windows = draw_windows(500, 0.7, np.random.default_rng(0))
    size = windows[:, 2:] - windows[:, :2]
    assert (windows >= 0).all()
    assert (windows <= 1).all()
    assert 0.7 <= size.min() < 0.72
    assert 0.98 < size.max() <= 1
    assert draw_windows(3, 1.0, np.random.default_rng(0)) == pytest.approx(np.tile(WHOLE, (3, 1)))


def test_zooming_into_all_of_a_map_changes_nothing() -> None:
    features = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(zoom(features, np.tile(WHOLE, (2, 1))), features, atol=1e-5)


def test_a_window_is_read_between_the_cells_where_it_lies() -> None:
    """A map that says its own coordinates: cell centres at 1/8, 3/8, 5/8, 7/8 of each axis."""
    centres = (torch.arange(4) + 0.5) / 4
    features = torch.stack((centres.expand(4, 4), centres[:, None].expand(4, 4)))[None]  # x, y
    window = np.array([[0.25, 0.5, 0.75, 0.9]])
    x, y = zoom(features, window)[0]
    assert torch.allclose(x, (0.25 + 0.5 * centres).expand(4, 4), atol=1e-6)
    # Beyond the outermost centres, at 7/8, there is nothing to read between.
    assert torch.allclose(y, (0.5 + 0.4 * centres).clamp(max=0.875)[:, None].expand(4, 4), atol=1e-6)


def test_boxes_go_with_the_window() -> None:
    window = np.array([0.5, 0.0, 1.0, 0.8])
    assert zoom_boxes(np.array([[0.5, 0.2, 0.75, 0.4], [0.0, 0.0, 0.5, 0.8]]), window) == pytest.approx(
        np.array([[0.0, 0.25, 0.5, 0.5], [-1.0, 0.0, 0.0, 1.0]])
    )


@pytest.mark.parametrize("view", [FULL, FLIPPED, CROPPED, CROPPED_FLIPPED])
@pytest.mark.parametrize("seed", [0, 5])
def test_boxes_are_where_their_things_are_seen(view: int, seed: int) -> None:
    """A white rectangle, looked for in the pixels of the view after zooming as maps are."""
    box, window = np.array([0.35, 0.3, 0.7, 0.55]), np.array([0.2, 0.1, 0.9, 0.75])
    photo = np.zeros((224, 224, 3), np.uint8)
    left, top, right, bottom = (box * 224).round().astype(int)
    photo[top:bottom, left:right] = 255
    pixels = torch.from_numpy(view_pixels(photo, view, seed)).permute(2, 0, 1)[None].float()
    lit = zoom(pixels, window[None])[0, 0].numpy() > 100
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 224
    (found,) = boxes_in(SeenPart("a.jpg", view, seed, window), np.array([[*box, 7, 0.9]]))
    assert found[:4] == pytest.approx(seen, abs=0.02)
    assert found[4:].tolist() == [7, 0.9]


def test_what_is_out_of_sight_is_left_out_and_the_rest_cut_off() -> None:
    part = SeenPart("a.jpg", FULL, 0, np.array([0.5, 0.0, 1.0, 0.8]))
    rows = np.array([[0.0, 0.0, 0.5, 0.8, 3, 0.8], [0.0, 0.0, 0.6, 0.8, 2, 0.7], [0.5, 0.8, 1.0, 1.0, 1, 0.6]])
    assert boxes_in(part, rows) == pytest.approx(np.array([[0.0, 0.0, 0.2, 1.0, 2, 0.7]]))
    # Two hundredths are left of the first, which is too little; the second is as small, but whole.
    slivers = np.array([[0.0, 0.0, 0.51, 0.8, 4, 0.9], [0.6, 0.1, 0.61, 0.5, 5, 0.9]])
    assert boxes_in(part, slivers)[:, 4].tolist() == [5]


def test_a_share_of_the_regions_is_hidden_and_never_all() -> None:
    random = np.random.default_rng(0)
    hidden = 1 - hide_regions(torch.ones(2000, 81, dtype=torch.bool), 0.6, random).float().mean(1)
    assert 0.28 < float(hidden.mean()) < 0.32  # half of 0.6
    assert 0.5 < float(hidden.max()) < 0.8
    there = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    there[:, 0] |= ~there.any(1)
    kept = hide_regions(there, 0.95, random)
    assert not (kept & ~there).any()
    assert kept.any(1).all()
    assert kept.sum() < there.sum()
    assert torch.equal(hide_regions(there, 0.0, random), there)


def test_a_mask_stays_where_it_is() -> None:
    """On whatever device the features are; `meta` stands for one that is not the CPU."""
    assert hide_regions(torch.ones(2, 3, dtype=torch.bool, device="meta"), 0.5, np.random.default_rng(0)).is_meta


def test_a_cell_shows_the_boxes_that_its_centre_is_in() -> None:
    boxes = np.array(
        [[0.0, 0.0, 0.55, 0.3, 1, 0.9], [0.0, 0.0, 0.3, 0.3, 1, 0.5], [0.7, 0.7, 0.72, 0.72, 0, 0.4]], np.float32
    )
    told = cell_targets([boxes, boxes[:0]], 3, 2).reshape(2, 3, 3, 2)
    assert told[0, :, :, 1].tolist() == [[pytest.approx(0.9), pytest.approx(0.9), 0], [0, 0, 0], [0, 0, 0]]
    assert told[0, :, :, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, pytest.approx(0.4)]]  # too small for any centre
    assert not told[1].any()


def test_cells_of_many_boxes_are_those_of_the_slow_way() -> None:
    random = np.random.default_rng(1)
    corners = np.sort(random.random((200, 2, 2)), 1).reshape(200, 4)  # x0, y0, x1, y1
    rows = np.concatenate((corners, random.integers(4, size=(200, 1)), random.random((200, 1))), 1).astype(np.float32)
    expected = np.zeros((9, 9, 4), np.float32)
    for x0, y0, x1, y1, number, score in rows:
        inside = [
            (row, column)
            for row in range(9)
            for column in range(9)
            if x0 <= (column + 0.5) / 9 <= x1 and y0 <= (row + 0.5) / 9 <= y1
        ]
        if inside:
            for row, column in inside:
                expected[row, column, int(number)] = max(expected[row, column, int(number)], score)
        else:
            rows_of, columns_of = _reached(y0, y1), _reached(x0, x1)
            for row in rows_of:
                for column in columns_of:
                    expected[row, column, int(number)] = max(expected[row, column, int(number)], score)
    assert np.array_equal(cell_targets([rows], 9, 4)[0].numpy().reshape(9, 9, 4), expected)


def _reached(low: float, high: float) -> list[int]:
    """Cells along one axis whose centres are between, else the one that the middle is in."""
    return [cell for cell in range(9) if low <= (cell + 0.5) / 9 <= high] or [int((low + high) / 2 * 9)]


def test_cells_learn_from_the_view_and_window_that_were_seen() -> None:
    given = GivenBoxes(("cat", "dog"), {"a.jpg": np.array([[0.0, 0.0, 0.5, 1.0, 1, 1.0]], np.float32)})
    lessons = CellClasses(given, 3)
    features = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = SeenPart("a.jpg", FULL, 0, WHOLE)
    mirrored = SeenPart("a.jpg", FLIPPED, 0, WHOLE)
    unknown = SeenPart("b.jpg", FULL, 0, WHOLE)
    logits = lessons.classifier(features).detach()
    chances = logits.sigmoid()
    dog = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])  # cells row by row: left half, and right half where mirrored
    expected = -(1 - chances[:2, :, 0]).log()
    expected = expected - dog * chances[:2, :, 1].log() - (1 - dog) * (1 - chances[:2, :, 1]).log()
    loss = lessons.loss(features, [whole, mirrored, unknown])
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    loss.backward()
    assert features.grad is not None
    assert features.grad[:2].abs().sum() > 0
    assert not features.grad[2].any()
    zoomed = lessons.loss(features[:1], [SeenPart("a.jpg", FULL, 0, np.array([0.5, 0.0, 1.0, 1.0]))])
    assert zoomed.item() == pytest.approx(-(1 - chances[0]).log().sum(-1).mean().item(), rel=1e-4)  # no dog in sight
    # Mirrored, the dog is on the right: all of what this window shows, and the right half of what that one does.
    for window, cells in [((0.5, 0.0, 1.0, 1.0), [1.0] * 4), ((0.3, 0.0, 0.7, 1.0), [0.0, 1, 0, 1])]:
        shown = torch.tensor(cells)
        told = -(
            shown * chances[0, :, 1].log() + (1 - shown) * (1 - chances[0, :, 1]).log() + (1 - chances[0, :, 0]).log()
        )
        seen = lessons.loss(features[:1], [SeenPart("a.jpg", FLIPPED, 0, np.array(window))])
        assert seen.item() == pytest.approx(told.mean().item(), rel=1e-4)
    assert lessons.loss(features, [unknown] * 3).item() == 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("smallest_window = 0.0\ntune_trunk_from = 0", "above 0"),
        ("hidden_regions = 1.0", "hidden_regions"),
        ("smallest_window = 0.5", "a trunk that learns"),
        ("cell_classes = 1.0", "a trunk that learns"),
        ("cell_class_photos = 2\ntune_trunk_from = 0", "for cell_classes"),
        ("cell_classes = -1.0\ntune_trunk_from = 0", "below 0"),
        ("cell_classes = 1.0\ntune_trunk_from = 1", "does not have"),
        ("cell_classes = 1.0\ntune_trunk_from = 0\ncaptions_per_image = 2", "teaches no cell_classes"),
        ("cell_classes = 1.0\ntune_trunk_from = 0", "which need them"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, setting: str, told: str) -> None:
    path = tmp_path / "own.toml"
    kind = "self_critical" if "captions_per_image" in setting else "backbone"
    told_of_stage = f'[[stage]]\nname = "words"\nkind = "{kind}"\nepochs = 1\nlearning_rate = 1e-3\n{setting}\n'
    path.write_text(f'name = "own"\nseed = 0\n[data]\ncaptions = "c.json"\nphotos = "p"\n{told_of_stage}')
    with pytest.raises(ValueError, match=told):
        read_settings(path)


def test_untrained_cells_say_that_little_is_there() -> None:
    lessons = CellClasses(GivenBoxes(("cat",) * 50, {}), 100)
    assert lessons.classifier(torch.zeros(100)).sigmoid().detach() == pytest.approx(np.full(50, 0.01), abs=1e-6)
    assert 0.009 < lessons.classifier.weight.std().item() < 0.011


# Tuning ------------------------------------------------------------------------------------------------------------


class Halving(nn.Module):
    """A trunk whose cells are the means of four of its map's, times a weight of one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def top(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) * self.weight


class Watched(CellClasses):
    """Remembers what it was asked of."""

    def loss(self, features: Tensor, parts: Sequence[SeenPart]) -> Tensor:
        self.asked = features, parts
        return features.mean()


def tuning(unlabelled: int = 3) -> tuple[TrunkTuning, np.ndarray, Watched]:
    """Two views of two captioned photos and one of some others, whose maps all differ."""
    random = np.random.default_rng(0)
    captioned = random.normal(size=(2, 2, 120, 18, 18)).astype(np.float16)
    others = random.normal(size=(unlabelled, 1, 120, 18, 18)).astype(np.float16)
    names = ("a.jpg", "b.jpg", *(f"{number}.jpg" for number in range(unlabelled)))
    watched = Watched(GivenBoxes(("dog",), {}), 120)
    trunk: Any = Halving()
    photos = PhotoRows(names, (captioned, others))
    return TrunkTuning(trunk, photos, watched, range(2, 2 + unlabelled)), captioned, watched


def stage(**told: Any) -> StageSettings:
    return StageSettings("words", "backbone", 1, 1e-3, tune_trunk_from=0, **told)


def test_a_stage_that_changes_nothing_sees_photos_whole_and_draws_nothing() -> None:
    tuned, maps, _ = tuning()
    random = np.random.default_rng(1)
    before = random.bit_generator.state
    features, loss = tuned.look(stage(), [1, 0], [0, 1], random)
    assert random.bit_generator.state == before
    expected = F.avg_pool2d(torch.from_numpy(np.stack((maps[1, 0], maps[0, 1]))).float(), 2).flatten(2).transpose(1, 2)
    assert torch.allclose(features, expected, atol=1e-6)
    assert features.requires_grad
    assert loss.item() == 0


def test_cells_are_asked_of_the_parts_that_were_seen_and_other_photos_beside() -> None:
    tuned, maps, watched = tuning()
    told = stage(smallest_window=0.5, cell_classes=0.25, cell_class_photos=2)
    features, loss = tuned.look(told, [1, 0], [0, 1], np.random.default_rng(1))
    assert features.shape == (2, 81, 120)
    seen, parts = watched.asked
    assert torch.equal(seen[:2], features)
    assert loss.item() == pytest.approx(0.25 * seen.mean().item())
    assert [(part.name, part.view) for part in parts[:2]] == [("b.jpg", 0), ("a.jpg", 1)]
    assert [part.seed for part in parts[:2]] == [1, 0]
    assert {part.name for part in parts[2:]} < {"0.jpg", "1.jpg", "2.jpg"}
    assert len({part.name for part in parts[2:]}) == 2
    for place, one in enumerate((maps[1, 0], maps[0, 1])):
        zoomed = zoom(torch.from_numpy(one)[None].float(), parts[place].window[None])
        assert torch.allclose(features[place], F.avg_pool2d(zoomed, 2)[0].flatten(1).T, atol=1e-5)
    again, _ = tuned.look(told, [1, 0], [0, 1], np.random.default_rng(1))
    assert torch.equal(again, features)
