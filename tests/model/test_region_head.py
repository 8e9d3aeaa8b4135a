"""The region head: boxes and choices against slow ways, the graph against torch, learning on made-up photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.bottom_up.box_overlap import generalised_iou, pairwise_iou
from model.bottom_up.extractor import Extractor
from model.bottom_up.quantise import quantise_extractor
from model.bottom_up.region_graph import RegionExtractor, export_region_extractor
from model.bottom_up.region_head import Candidates, RegionHead
from model.bottom_up.region_limits import LEAST, MOST, NMS_IOU
from model.bottom_up.region_selection import choose, region_width, roi_align
from model.bottom_up.trunk import Trunk
from model.training.features import CROPPED, CROPPED_FLIPPED, FLIPPED, FULL, view_boxes, view_pixels
from model.training.given_boxes import in_view, pad_boxes, read_boxes
from model.training.region_loss import assign, region_losses
from model.training.region_recall import Recall
from model.training.region_training import RegionSettings, RegionTrainer
from model.training.regions import PhotoRows

CLASSES = ["person", "dog", "ball"]


def boxes(count: int, seed: int) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return corners.flatten(1)  # (count, 4): x0, y0, x1, y1


def slow_iou(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (one, other)]
    return shared / (sum(areas) - shared)


def test_overlaps_are_those_of_the_plain_formula() -> None:
    some, others = boxes(6, 0), boxes(5, 1)
    wanted = torch.tensor([[slow_iou(one, other) for other in others.tolist()] for one in some.tolist()])
    torch.testing.assert_close(pairwise_iou(some, others), wanted)
    apart = torch.tensor([[0.0, 0.0, 0.1, 0.1]]), torch.tensor([[0.9, 0.9, 1.0, 1.0]])
    torch.testing.assert_close(generalised_iou(some, some), torch.ones(6))
    torch.testing.assert_close(generalised_iou(*apart), torch.tensor([-0.98]))


def test_a_region_is_the_mean_of_bilinear_samples_under_it() -> None:
    grid, some = torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(0)), boxes(7, 2)
    within = (torch.arange(3) + 0.5) / 3
    for box, found in zip(some, roi_align(grid, some, 3), strict=True):
        x, y = box[0] + within * (box[2] - box[0]), box[1] + within * (box[3] - box[1])
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None] * 2 - 1
        sampled = F.grid_sample(grid[None], points, padding_mode="border", align_corners=False)
        torch.testing.assert_close(found, sampled.mean((0, 2, 3)))


def test_a_photo_has_between_the_least_and_the_most_regions_the_surest_first() -> None:
    some = boxes(300, 3)
    nothing_sure = torch.linspace(0.01, 0.02, 300)
    assert len(choose(some, nothing_sure)) == LEAST
    all_sure = torch.linspace(0.5, 0.9, 300)
    rows = choose(some, all_sure)
    assert len(rows) == MOST
    assert all_sure[rows].tolist() == sorted(all_sure[rows].tolist(), reverse=True)
    assert pairwise_iou(some[rows], some[rows]).fill_diagonal_(0).max() <= NMS_IOU
    same = some[:1].expand(50, 4)
    assert len(choose(same, torch.rand(50))) == 1


# The graph ---------------------------------------------------------------------------------------------------------


def random_extractor(side: int) -> RegionExtractor:
    """Weights that half precision holds exactly, and claims that differ from cell to cell."""
    torch.manual_seed(0)
    trunk, head = Trunk(), RegionHead(len(CLASSES), width=8)
    for level in head.levels:
        torch.nn.init.normal_(level.objectness.weight, std=5.0)  # so that no two are all but equal
        torch.nn.init.normal_(level.sides.weight, std=0.3)
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.0  # else export would fold a factor into the weights, and then halve them
    for module in (trunk, head):
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    return RegionExtractor(trunk, head, side).eval()


def noise(count: int) -> np.ndarray:
    small = torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    large = F.interpolate(small, size=(224, 224), mode="bicubic").clamp(0, 1) * 255
    return large.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The graphs of `random_extractor`, by its side: each takes seconds to write."""
    folder = tmp_path_factory.mktemp("graphs")
    for side in (3, 9):
        export_region_extractor(random_extractor(side), CLASSES, folder / f"{side}.onnx")
    return {side: folder / f"{side}.onnx" for side in (3, 9)}


@pytest.mark.parametrize("side", [3, 9])
def test_the_graph_finds_the_regions_that_torch_finds(side: int, graphs: dict[int, Path]) -> None:
    extractor, pixels = random_extractor(side), noise(3)
    session = Extractor(graphs[side], threads=1)
    assert session.classes == tuple(CLASSES)
    assert (session.most_regions, session.feature_width) == (MOST + side * side, region_width(8, len(CLASSES)))
    found = session.look_at_pixels(pixels)
    with torch.inference_mode():
        wanted = extractor.look(torch.from_numpy(pixels))
    for regions, (features, where) in zip(found, wanted, strict=True):
        assert LEAST + side * side <= len(regions.features) <= MOST + side * side
        np.testing.assert_allclose(regions.boxes, where, atol=1e-4)
        np.testing.assert_allclose(regions.features, features, atol=1e-3, rtol=1e-3)
    alone = session.look_at_pixels(pixels[1:2])[0]
    np.testing.assert_allclose(alone.features, found[1].features, atol=1e-3, rtol=1e-3)


def test_it_runs_in_int8_as_well(graphs: dict[int, Path], tmp_path: Path) -> None:
    pixels = noise(4)
    quantise_extractor(graphs[3], tmp_path / "int8.onnx", pixels)
    session = Extractor(tmp_path / "int8.onnx", threads=1)
    assert session.kind == "regions"
    assert session.classes == tuple(CLASSES)
    for regions in session.look_at_pixels(pixels):
        assert np.isfinite(regions.features).all()
        assert len(regions.features) == len(regions.boxes) >= LEAST


# Learning ----------------------------------------------------------------------------------------------------------


def candidates_at(where: Tensor) -> Candidates:
    count = len(where)
    return Candidates(
        torch.zeros(1, 8, 18, 18), where[None], torch.zeros(1, count), torch.zeros(1, count, len(CLASSES))
    )


def test_candidates_stand_for_the_sure_boxes_and_say_nothing_of_doubtful_ones() -> None:
    where = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.48, 0.5], [0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 1.0, 1.0]])
    centres = (where[:, :2] + where[:, 2:]) / 2
    rows = np.array([[0.1, 0.1, 0.5, 0.5, 1, 0.9], [0.6, 0.6, 0.9, 0.9, 0, 0.2]], dtype=np.float32)
    found = assign(candidates_at(where), centres, pad_boxes([rows]))
    assert found.target[0].argmax() == 0
    assert found.box[0, 0] == 0
    assert found.target[0, 0] == pytest.approx(1.0)  # the best candidate is to say its own overlap
    assert 0 < found.target[0, 1] < 1
    assert found.target[0, 2] == 0
    assert found.ignored[0].tolist() == [False, False, True, False]


def test_a_photo_without_boxes_teaches_that_nothing_is_there() -> None:
    head = RegionHead(len(CLASSES), width=8)
    said = head(torch.randn(2, 120, 18, 18), torch.randn(2, 1280, 9, 9))
    losses = region_losses(said, head.centres, pad_boxes([np.zeros((0, 6), np.float32)] * 2))
    assert losses["boxes"] == 0
    assert losses["objectness"] > 0
    assert torch.isfinite(losses["classes"])


@pytest.mark.parametrize("view", [FULL, FLIPPED, CROPPED, CROPPED_FLIPPED])
def test_boxes_go_with_the_view_of_the_photo(view: int) -> None:
    photo = np.zeros((224, 224, 3), np.uint8)
    photo[90:130, 80:150] = 255  # within any crop
    rows = np.array([[80 / 224, 90 / 224, 150 / 224, 130 / 224, 2, 0.8]], dtype=np.float32)
    x0, y0, x1, y1 = (in_view(rows, view, 7)[0, :4] * 224).round().astype(int)
    bright = view_pixels(photo, view, 7)[..., 0] > 100
    assert bright[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].all()
    bright[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = False
    assert not bright.any()


def test_a_box_of_which_a_crop_leaves_little_is_not_taught() -> None:
    edge = np.array([[0.0, 0.0, 0.05, 0.05, 0, 0.9]], dtype=np.float32)
    whole = [view_boxes(edge[:, :4], CROPPED, seed) for seed in range(50)]
    outside = [seed for seed in range(50) if (whole[seed][0, 2:] <= 0).any()]
    assert outside
    assert all(len(in_view(edge, CROPPED, seed)) == 0 for seed in outside)
    assert len(in_view(edge, FULL, 0)) == 1


def test_recall_by_hand() -> None:
    given = np.array(
        [
            [0.0, 0.0, 0.5, 0.5, 0, 0.9],  # found by the eleventh region: 0.8 of it
            [0.5, 0.5, 1.0, 1.0, 1, 0.3],  # found by the first, exactly
            [0.0, 0.5, 0.5, 1.0, 2, 0.5],  # of which the second covers 0.4
            [0.5, 0.0, 1.0, 0.5, 2, 0.29],  # not sure enough to count
        ],
        np.float32,
    )
    regions = torch.tensor(
        [[0.5, 0.5, 1.0, 1.0], [0.0, 0.5, 0.2, 1.0], *[[0.0, 0.0, 0.01, 0.01]] * 8, [0.0, 0.0, 0.4, 0.5]]
    )
    recall = Recall()
    assert recall.to_json() == {"recall_10": 0.0, "recall": 0.0, "boxes": 0, "regions_per_photo": 0.0}
    recall.add(given, regions)
    recall.add(given[:0], regions[:1])
    assert recall.to_json() == {"recall_10": 1 / 3, "recall": 2 / 3, "boxes": 3, "regions_per_photo": 6.0}


def test_the_head_learns_where_the_made_up_things_are(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = [f"{number}.jpg" for number in range(12)]
    bottom = random.normal(size=(12, 1, 120, 18, 18)).astype(np.float16) * 0.1
    of: dict[str, list[list[float]]] = {}
    for number, name in enumerate(names):
        x, y = random.integers(0, 10, size=2)
        bottom[number, 0, :8, y : y + 8, x : x + 8] += 3
        of[f"made-up/{name}"] = [[x / 18, y / 18, (x + 8) / 18, (y + 8) / 18, 1, 0.9]]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"classes": CLASSES, "boxes": of}))
    told = RegionSettings(epochs=40, warmup_steps=5, batch_images=8, learning_rate=5e-3, average_decay=0.9)
    torch.manual_seed(1)
    trunk, photos = Trunk().eval(), PhotoRows(tuple(names), (bottom,))
    val = set(names[8:])

    def trainer(settings: RegionSettings) -> RegionTrainer:
        return RegionTrainer(settings, trunk, photos, read_boxes(file), val, tmp_path / "run")

    trainer(told).run()
    measured = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert measured[-1]["boxes"] == 4
    assert measured[-1]["recall_10"] == 1.0
    assert set(torch.load(tmp_path / "run" / "head.pt", weights_only=True)) == {"classes", "head", "trunk"}
    trainer(told).run()  # nothing is left to do
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == len(measured)


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        {"classes": ["a"]},
        {"classes": ["a"], "boxes": {"x.jpg": [[0, 0, 1]]}},
        {"classes": ["a"], "boxes": {"x.jpg": [[0, 0, 1, 1, 1, 0.5]]}},
        {"classes": ["a"], "boxes": {"x.jpg": [[-1, 0, 1, 1, 0, 0.5]]}},
        {"classes": ["a"], "boxes": {"x.jpg": [[0, 0, 1, 1, 0, "sure"]]}},
    ],
)
def test_a_bad_file_of_boxes_is_named(told: Any, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(ValueError, match=r"boxes\.json"):
        read_boxes(path)
