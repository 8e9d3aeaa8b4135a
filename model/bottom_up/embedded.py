"""Writes the embedded extractor of a trained trunk: of grid cells, or of regions where there is a head for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.bottom_up.export import export_extractor
from model.bottom_up.region_graph import RegionExtractor, export_region_extractor
from model.bottom_up.region_head import load_region_head
from model.bottom_up.trunk import Trunk


def write_extractor(trunk: Trunk, region_head: dict[str, Any] | None, large_cells: int, path: Path) -> None:
    """`region_head` as `deecap train-regions` saved it, with so many large cells a side behind the regions."""
    if region_head is None:
        export_extractor(trunk, path)
    else:
        extractor = RegionExtractor(trunk, load_region_head(region_head), large_cells)
        export_region_extractor(extractor, region_head["classes"], path)
