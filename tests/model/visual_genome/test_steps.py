"""Each step of the detector against the slow one: anchors, boxes, suppression, pooling, selection, pixels."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from model.bottom_up.visual_genome.boxes import (
    cell_anchors,
    clip,
    decode,
    grid_anchors,
    overlaps,
    suppress,
    suppress_per_class,
)
from model.bottom_up.visual_genome.config import PIXEL_MEAN, DetectorConfig
from model.bottom_up.visual_genome.pooling import pool_regions
from model.bottom_up.visual_genome.preprocess import scale_photo, scaled_size, to_photo
from model.bottom_up.visual_genome.selection import confidences, select
from tests.model.visual_genome import oracles


def boxes_in(width: int, height: int, count: int, seed: int = 0) -> torch.Tensor:
    """Of all sizes, some of a pixel, some equal."""
    random = torch.Generator().manual_seed(seed)
    sides = torch.tensor([width, height, width, height]) - 1
    boxes = torch.rand(count, 4, generator=random) * sides
    boxes = torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), 1)
    boxes[-3:] = boxes[:3] + 1.5
    return clip(torch.cat((boxes, boxes[:1], boxes[:1, [0, 1, 0, 1]])), width, height)


def test_the_published_sizes() -> None:
    config = DetectorConfig()
    assert (config.grid_width, config.feature_width, config.anchors) == (1024, 2048, 12)


def test_anchors_are_the_published_ones() -> None:
    assert cell_anchors(16, (8, 16, 32), (0.5, 1.0, 2.0)).tolist() == [list(box) for box in oracles.PUBLISHED_ANCHORS]
    with_small = cell_anchors(16, (4, 8, 16, 32), (0.5, 1.0, 2.0)).tolist()
    assert with_small[0] == [-38, -16, 53, 31]  # 92 x 48 about the same centre, 7.5
    assert [with_small[row] for row in (1, 2, 3, 5, 6, 7, 9, 10, 11)] == [
        list(box) for box in oracles.PUBLISHED_ANCHORS
    ]


def test_anchors_are_laid_out_row_by_row() -> None:
    cell = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 9.0, 9.0]])
    grid = grid_anchors(cell, rows=2, columns=3, stride=16).tolist()
    expected = [
        [value + 16 * (row if axis % 2 else column) for axis, value in enumerate(anchor)]
        for row in range(2)
        for column in range(3)
        for anchor in cell.tolist()
    ]
    assert grid == expected


def test_boxes_are_decoded_and_clipped() -> None:
    anchors = boxes_in(300, 200, 40).double()
    deltas = torch.randn(len(anchors), 4, generator=torch.Generator().manual_seed(1)).double()
    boxes = decode(anchors, deltas)
    cut = clip(boxes, 300, 200)
    for row in range(len(anchors)):
        expected = oracles.decoded(anchors[row].tolist(), deltas[row].tolist())
        assert boxes[row].tolist() == pytest.approx(expected)
        assert cut[row].tolist() == pytest.approx(oracles.clipped(expected, 300, 200))
    assert bool((cut != boxes).any())


def test_a_box_that_would_grow_without_end_is_the_whole_photo() -> None:
    anchors = torch.tensor([[0.0, 0.0, 43.0, 43.0]])
    assert clip(decode(anchors, torch.tensor([[0.0, 0.0, 500.0, 90.0]])), 1000, 600).tolist() == [[0, 0, 999, 599]]


def test_overlaps_count_both_ends() -> None:
    boxes = boxes_in(60, 40, 20)
    found = overlaps(boxes, boxes.flip(0))
    for row, box in enumerate(boxes.tolist()):
        for column, other in enumerate(boxes.flip(0).tolist()):
            assert float(found[row, column]) == pytest.approx(oracles.overlap(box, other), abs=1e-5)
    ones = torch.tensor([[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 4.0, 3.0]])
    assert overlaps(ones, ones).tolist() == [[1.0, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_keeps_the_best_of_each_heap(threshold: float) -> None:
    boxes = boxes_in(90, 70, 80)
    scores = torch.randn(len(boxes), 6, generator=torch.Generator().manual_seed(2))
    scores[10:14, 0] = 0.25  # equal ones
    for column in range(6):
        expected = oracles.kept(boxes.tolist(), scores[:, column].tolist(), threshold)
        assert 5 < len(expected) < len(boxes) - 5
        assert suppress(boxes, scores[:, column], threshold, 1000).tolist() == expected
        assert suppress(boxes, scores[:, column], threshold, 4).tolist() == expected[:4]
        stays = suppress_per_class(boxes, scores, threshold)[:, column]
        assert set(stays.nonzero()[:, 0].tolist()) == set(expected)


def test_regions_are_pooled() -> None:
    """Inside, over the edges, of one pixel, and with ends that lie between two cells."""
    grid = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat((boxes_in(192, 144, 12), torch.tensor([[8.0, 24.0, 191.0, 143.0], [150.0, 100.0, 400.0, 300.0]])))
    for cells in (3, 14):
        found = pool_regions(grid, boxes, 1 / 16, cells)
        for row, box in enumerate(boxes.tolist()):
            assert np.array_equal(found[row].numpy(), oracles.pooled(grid.numpy(), box, cells)), box


def test_a_region_beyond_the_grid_is_zeros() -> None:
    assert not pool_regions(torch.ones(2, 4, 4), torch.tensor([[900.0, 900.0, 950.0, 950.0]]), 1 / 16, 2).any()


@pytest.mark.parametrize("sharpness", [0.3, 4.0, 12.0])
@pytest.mark.parametrize("count", [6, 48])
def test_regions_are_selected_by_the_published_rule(sharpness: float, count: int) -> None:
    """With so few confident ones that the least count, with a number between, and with too many."""
    rule = replace(DetectorConfig(), least_regions=10, most_regions=24)
    boxes = boxes_in(400, 400, count)
    scores = torch.randn(len(boxes), 30, generator=torch.Generator().manual_seed(5)) * sharpness
    probabilities = scores.softmax(1)
    rows = select(boxes, probabilities, rule)
    assert set(rows.tolist()) == oracles.selected(boxes.numpy(), probabilities.numpy(), rule)
    confident = confidences(boxes, probabilities, rule.class_nms)[rows]
    assert bool((confident[:-1] >= confident[1:]).all())


def test_the_selections_above_are_of_all_three_kinds() -> None:
    rule = replace(DetectorConfig(), least_regions=10, most_regions=24)
    boxes = boxes_in(400, 400, 48)
    counts = []
    for sharpness in (0.3, 4.0, 12.0):
        scores = torch.randn(len(boxes), 30, generator=torch.Generator().manual_seed(5)) * sharpness
        counts.append(int((confidences(boxes, scores.softmax(1), 0.3) >= rule.confidence).sum()))
    assert counts[0] < 10 <= counts[1]
    assert counts[2] > 24


# Pixels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (600, 800)),
        (640, 480, (800, 600)),
        (600, 600, (600, 600)),
        (300, 500, (600, 1000)),
        (300, 501, (599, 1000)),
        (100, 5000, (32, 1000)),
        (1, 1, (600, 600)),
    ],
)
def test_photos_are_scaled_to_600_by_at_most_1000(height: int, width: int, expected: tuple[int, int]) -> None:
    scale, *size = scaled_size(height, width, DetectorConfig())
    assert tuple(size) == expected
    exact = min(Fraction(600, min(height, width)), Fraction(1000, max(height, width)))
    if max(height, width) * 600 > 1000 * min(height, width):
        assert scale == pytest.approx(float(exact))


def test_pixels_are_blue_first_less_the_mean_and_bilinear() -> None:
    config = replace(DetectorConfig(), shorter_side=35, longer_side=50)
    photo = np.random.default_rng(0).integers(0, 256, (14, 17, 3)).astype(np.uint8)
    x, scale = scale_photo(torch.from_numpy(photo), config)
    assert scale == 2.5
    expected = oracles.resized(photo[..., ::-1] - np.array(PIXEL_MEAN), 35, 42)
    assert x.shape == (1, 3, 35, 42)
    assert x[0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-3)


def test_a_large_photo_is_shrunk_by_averaging_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (130, 190, 3)).astype(np.uint8)
    assert np.array_equal(to_photo(Image.fromarray(pixels[:119]), 60), pixels[:119])
    shrunk = to_photo(Image.fromarray(pixels), 60)
    assert shrunk.shape == (65, 95, 3)
    assert shrunk == pytest.approx(pixels.reshape(65, 2, 95, 2, 3).mean((1, 3)), abs=0.51)
    upright = Image.fromarray(pixels)
    upright.getexif()[0x0112] = 6  # to be turned by a quarter
    assert to_photo(upright, 60).shape == (95, 65, 3)
