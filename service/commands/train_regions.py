"""`deecap train-regions`: trains a region head on given boxes, over the trunk of a finished training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from service.commands.extract import load_extractor
from service.commands.loading import read_settings, require_onnx_runtime, stop


def train_regions(
    data: Annotated[Path, typer.Option(help="Folder that the configuration's paths start from.")],
    trunk: Annotated[
        str | None, typer.Option(help="RUN/STAGE of a finished run in the work folder, whose trunk is taken.")
    ] = None,
    boxes: Annotated[str, typer.Option(help="File of boxes in the data folder.")] = "boxes.json",
    config: Annotated[Path, typer.Option(help="Configuration that names photos and captions.")] = Path("flickr8k"),
    work: Annotated[Path, typer.Option(help="Folder of runs and kept features.")] = Path("work"),
    name: Annotated[str, typer.Option(help="Of this run: its folder in the work folder.")] = "regions",
    epochs: Annotated[int, typer.Option(help="Times that all photos are seen.", min=1)] = 12,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one per core.")] = 0,
    measure: Annotated[
        Path | None, typer.Option(help="Train nothing: print the recall of this folder's extractor on the split val.")
    ] = None,
) -> None:
    """Train a region head; the same command goes on after a stop. It writes WORK/NAME/head.pt and log.jsonl.

    A configuration with `region_head = "NAME"` then learns to caption from its regions.
    """
    import torch

    from model.training.region_training import RegionSettings, train_region_head
    from model.training.settings import find_settings

    if threads:
        torch.set_num_threads(threads)
    try:
        settings = find_settings(config)
        if measure is not None:
            _measure(measure, data / settings.data.captions, data / settings.data.photos, data / boxes)
            return
        if trunk is None:
            stop("--trunk RUN/STAGE is needed, or --measure BUNDLE")
        train_region_head(settings, data, data / boxes, work / f"{trunk}.pt", work, name, RegionSettings(epochs=epochs))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        stop(str(error))


def _measure(bundle: Path, captions: Path, photos: Path, boxes: Path) -> None:
    """Raises `ValueError` and `FileNotFoundError` as what it calls."""
    from model.training.given_boxes import read_boxes
    from model.training.region_recall import measure_extractor

    require_onnx_runtime()
    extractor, revision = load_extractor(read_settings(bundle=bundle))
    recall = measure_extractor(extractor, read_boxes(boxes), captions, photos, "val")
    typer.echo(json.dumps({"extractor": revision, **recall.to_json()}))
