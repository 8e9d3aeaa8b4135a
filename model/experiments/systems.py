"""A trained system, from the checkpoint of a run or from a bundle, and the photos of a split as it sees them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bottom_up.grid import cells
from model.bottom_up.preprocess import normalise
from model.bottom_up.trunk import HEAD_WIDTH, Trunk
from model.bundle import EXTRACTOR, load_bundle
from model.caption import Regions
from model.deecap import DeeCap
from model.exits import ExitPolicy
from model.training.data import Photo
from model.training.from_bundle import KEPT
from model.training.photos import look_at
from model.training.readers.keys import photo_keys
from model.training.readers.open_regions import open_regions
from model.training.regions import boxes_for
from model.training.settings import TrainSettings
from model.training.trained import read_stage, trained_network
from model.vocabulary import Vocabulary

# Settings of training that came when there were rows already, and what they are where they say nothing.
LATER = {
    "starts_from_bundle": "",
    "extractor_of_bundle": "",
    "boxes": "",
    "smallest_window": 1.0,
    "cell_classes": 0.0,
    "cell_class_photos": 0,
    "hidden_regions": 0.0,
}


@dataclass(frozen=True)
class System:
    """What is measured. `look` turns photos into regions, in their order."""

    name: str
    budget: str
    configuration: dict[str, Any]
    model: DeeCap
    vocabulary: Vocabulary
    policy: ExitPolicy
    weights: str  # a digest, so that a row tells which training it came from
    look: Callable[[Sequence[Photo]], list[Regions]]


def from_run(settings: TrainSettings, work: Path, data: Path, stage: str = "", budget: str = "") -> System:
    """The model that a stage (default: the last) of a run ended with; regions as in training: at full precision, or by
    the extractor of the bundle that the run saw them through.

    Raises `FileNotFoundError` for a run that is not finished, `ValueError` for a checkpoint of another configuration.
    """
    path = work / f"{stage or settings.stages[-1].name}.pt"
    state = read_stage(path)
    model, policy = trained_network(settings, state)
    photos = data / settings.data.photos
    told = {**configuration(settings), "measured_stage": path.stem}
    if settings.seen_through:
        from model.bottom_up.extractor import revision_of_extractor  # ONNX Runtime comes with it

        look = _look_through(work / KEPT, photos)
        told["extractor"] = revision_of_extractor(work / KEPT)
    elif "trunk" in state:
        trunk = Trunk()
        trunk.load_state_dict(state["trunk"])
        look = _look_with(trunk.eval(), photos)
    else:
        look = _look_up(data / settings.data.region_features)
    return System(
        settings.name,
        budget or settings.budget or settings.name,
        told,
        model.requires_grad_(False).eval(),
        Vocabulary(state["vocabulary"]),
        policy,
        _digest(path),
        look,
    )


def configuration(settings: TrainSettings) -> dict[str, Any]:
    """All that training was told but its name, as a row has it: what a row written today must find the others by."""
    told = _without_later(dataclasses.asdict(settings))
    return {name: value for name, value in told.items() if name not in ("name", "budget")}


def _without_later(told: Any) -> Any:
    """The same less the settings of `LATER` where they say nothing."""
    if isinstance(told, dict):
        kept = {name: value for name, value in told.items() if name not in LATER or value != LATER[name]}
        return {name: _without_later(value) for name, value in kept.items()}
    return [_without_later(value) for value in told] if isinstance(told, list | tuple) else told


def from_bundle(folder: Path, photos: Path, budget: str = "") -> System:
    """A bundle's network in float32 (its weights are int8), with the extractor that it ships.

    Raises `model.bundle.BundleError` for what is no bundle.
    """
    bundle = load_bundle(folder)
    configuration = {
        "bundle": bundle.name, "revision": bundle.revision, "model": bundle.model.config.to_json()
    }  # fmt: skip
    return System(
        bundle.name,
        budget or bundle.name,
        configuration,
        bundle.model,
        bundle.vocabulary,
        bundle.policy,
        bundle.revision,
        _look_through(folder / EXTRACTOR, photos),
    )


def _look_up(path: Path) -> Callable[[Sequence[Photo]], list[Regions]]:
    def look(photos: Sequence[Photo]) -> list[Regions]:
        store = open_regions(path)
        found = []
        for photo in photos:
            key = store.find(photo_keys(photo.name, photo.number))
            if key is None:
                raise FileNotFoundError(f"{path} has no features of {photo.name}")
            found.append(store.read(key))
        return found

    return look


def _look_through(extractor: Path, folder: Path) -> Callable[[Sequence[Photo]], list[Regions]]:
    from model.bottom_up.extractor import Extractor
    from model.threads import available_cores

    look = Extractor(extractor, "cpu", available_cores()).look_at_pixels
    return lambda photos: look_at(folder, [photo.name for photo in photos], look)


def _look_with(trunk: Trunk, folder: Path) -> Callable[[Sequence[Photo]], list[Regions]]:
    boxes = boxes_for(1)[0].numpy()

    @torch.no_grad()
    def through(pixels: np.ndarray) -> list[Regions]:
        features = cells(trunk.top(trunk.bottom(normalise(torch.from_numpy(pixels))))).numpy()
        assert features.shape[-1] == HEAD_WIDTH
        return [Regions(boxes, one) for one in features]

    return lambda photos: look_at(folder, [photo.name for photo in photos], through)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
