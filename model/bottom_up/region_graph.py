"""Writes the extractor with a region head as one ONNX graph: RoIAlign and NMS are operators in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx.compose
from onnx import TensorProto
from torch import Tensor, nn

from model.bottom_up.export import tidy, traced
from model.bottom_up.extractor_kinds import CLASSES_KEY, KIND_KEY, REGIONS
from model.bottom_up.graph import Graph
from model.bottom_up.grid import grid_boxes
from model.bottom_up.preprocess import INPUT_SIZE, normalise
from model.bottom_up.region_head import RegionHead
from model.bottom_up.region_limits import BACKGROUND_SIDE, CONFIDENCE, LEAST, MOST, NMS_IOU, SAMPLES
from model.bottom_up.region_selection import Parts, parts_of, region_width, regions_of
from model.bottom_up.trunk import HEAD_WIDTH, STRIDE, Trunk


class RegionExtractor(nn.Module):
    """The embedded extractor with its region head in torch: the exported graph's reference."""

    def __init__(self, trunk: Trunk, head: RegionHead, side: int = BACKGROUND_SIDE) -> None:
        super().__init__()
        self.trunk, self.head, self.side = trunk, head, side

    def forward(self, pixels: Tensor) -> Parts:
        """uint8 `(B, 224, 224, 3)` -> all that needs no choice."""
        fine = self.trunk.bottom(normalise(pixels))
        coarse = self.trunk.top(fine)
        return parts_of(self.head(fine, coarse), coarse, self.side)

    def look(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """uint8 `(B, 224, 224, 3)` -> features `(R, F)` and boxes `(R, 4)` of each photo."""
        return regions_of(self(pixels))


def export_region_extractor(extractor: RegionExtractor, classes: list[str], path: Path) -> None:
    """Writes `path`, one self-contained ONNX file, weights in half precision. Needs the `train` extra.

    `pixels` uint8 `(B, 224, 224, 3)` -> `features (B, 36 + cells, F)`, `boxes (B, 36 + cells, 4)` and `counts (B,)`:
    how many of the first 36 are regions; what follows them there is of no meaning. `classes`: their names.
    """
    first, second = traced(extractor.eval(), [f"{name}_out" for name in Parts._fields]), _choice(extractor)
    first.ir_version = second.ir_version
    whole = onnx.compose.merge_models(first, second, io_map=[(f"{name}_out", f"{name}_in") for name in Parts._fields])
    del whole.opset_import[1:]  # both parts name the same one
    onnx.helper.set_model_props(whole, {KIND_KEY: REGIONS, CLASSES_KEY: json.dumps(classes)})
    tidy(whole)
    path.write_bytes(whole.SerializeToString(deterministic=True))


def _choice(extractor: RegionExtractor) -> onnx.ModelProto:
    """The second part: which candidates are regions, and what lies under them. As `region_selection`, for a batch."""
    graph, head, side = Graph(), extractor.head, extractor.side
    cells, width = INPUT_SIZE // STRIDE, region_width(head.width, head.class_count)
    count, fine = len(head.centres), 2 * cells
    shapes: tuple[list[int | str], ...] = (
        ["batch", HEAD_WIDTH, cells, cells],
        ["batch", head.width, fine, fine],
        ["batch", count, 4],
        ["batch", count],
        ["batch", count, head.class_count],
        ["batch", side * side, width],
    )
    given = (
        graph.input(f"{name}_in", TensorProto.FLOAT, shape) for name, shape in zip(Parts._fields, shapes, strict=True)
    )
    coarse, pyramid, boxes, chances, classes, around = given
    scores = graph.op("Unsqueeze", chances, graph.integers(1))
    kept = graph.op("NonMaxSuppression", boxes, scores, graph.integers(MOST), graph.constant([NMS_IOU]))  # (K, 3)
    places = graph.op("Gather", kept, graph.integers(0, 2), axis=1)  # (K, 2): photo, candidate
    gone = graph.op("Sub", graph.op("Mul", chances, graph.constant(0)), graph.constant(1))  # (B, A), all -1
    stays = graph.op("ScatterND", gone, places, graph.op("GatherND", chances, places))
    best, rows = graph.ops("TopK", 2, stays, graph.integers(MOST), axis=1)  # (B, 36), the surest first
    sure = graph.op("GreaterOrEqual", best, graph.constant(CONFIDENCE))
    there = graph.op("GreaterOrEqual", best, graph.constant(0))  # there may be fewer than the least
    numbers = [graph.op("ReduceSum", graph.whole(of), graph.integers(1), keepdims=0) for of in (sure, there)]
    counts = graph.op("Min", graph.op("Max", numbers[0], graph.integers(LEAST)), numbers[1])

    each = graph.op("Unsqueeze", rows, graph.integers(2))

    def chosen(of: str) -> str:
        return graph.op("GatherND", of, each, batch_dims=1)  # (B, 36, ...)

    chosen_boxes = chosen(boxes)
    flat = graph.op("Reshape", chosen_boxes, graph.integers(-1, 4))
    zero, one = (graph.constant(number, np.int64) for number in (0, 1))
    photos = graph.op("Range", zero, graph.op("Gather", graph.op("Shape", chances), zero, axis=0), one)
    owners = graph.op("Expand", graph.op("Unsqueeze", photos, graph.integers(1)), graph.integers(1, MOST))
    owners = graph.op("Reshape", owners, graph.integers(-1))

    def under(grid: str, size: int, channels: int) -> str:
        pooled = graph.op(
            "RoiAlign",
            grid,
            flat,
            owners,
            output_height=1,
            output_width=1,
            sampling_ratio=SAMPLES,
            spatial_scale=float(size),
            mode="avg",
            coordinate_transformation_mode="half_pixel",
        )
        return graph.op("Reshape", pooled, graph.integers(-1, MOST, channels))

    grids = under(coarse, cells, HEAD_WIDTH), under(pyramid, fine, head.width)
    sureness = graph.op("Max", graph.op("Unsqueeze", best, graph.integers(2)), graph.constant(0))
    features = graph.op("Concat", *grids, chosen(classes), sureness, axis=2)
    cell_boxes = graph.constant(grid_boxes(side)[None])
    batch = graph.op("Shape", chances, start=0, end=1)
    shape = graph.op("Concat", batch, graph.integers(side * side, 4), axis=0)
    all_boxes = graph.op("Concat", chosen_boxes, graph.op("Expand", cell_boxes, shape), axis=1)
    graph.output("features", graph.op("Concat", features, around, axis=1), ["batch", MOST + side * side, width])
    graph.output("boxes", all_boxes, ["batch", MOST + side * side, 4])
    graph.output("counts", counts, ["batch"], TensorProto.INT64)
    return graph.model("choice", {})
