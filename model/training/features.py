"""Frozen features of a data set's photos, computed once into a file that training maps into memory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.bottom_up.preprocess import INPUT_SIZE, PHOTO_SIZE, normalise
from model.bottom_up.trunk import Trunk
from model.training.augment import zoom_boxes
from model.training.memory_format import channels_last
from model.training.photos import in_batches, iterate_photos
from model.training.throughput import machine

BATCH = 32  # views
SAVE_EVERY = 1000  # photos
GRID = INPUT_SIZE // 16
BOTTOM_SHAPE = (120, GRID, GRID)  # what `Trunk.bottom` yields for one photo
FULL, FLIPPED, CROPPED, CROPPED_FLIPPED = range(4)  # the views of a photo that are kept
SMALLEST_CROP = 0.75  # of each side


def view_pixels(photo: np.ndarray, view: int, seed: int) -> np.ndarray:
    """One view of a photo, uint8 `(224, 224, 3)` to the same: whole or cropped, as it is or mirrored.

    Crops are also made up to a fifth brighter or darker. All is drawn from `seed` alone: a re-run gives the same views.
    """
    if view in (CROPPED, CROPPED_FLIPPED):
        (top, left, height, width), brightness = _crop(view, seed)
        crop = torch.from_numpy(photo[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None].float()
        crop = crop * brightness
        resized = torch.nn.functional.interpolate(crop, size=(PHOTO_SIZE, PHOTO_SIZE), mode="bicubic", antialias=True)
        photo = resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    if view in (FLIPPED, CROPPED_FLIPPED):
        photo = photo[:, ::-1]
    return np.ascontiguousarray(photo)


def _crop(view: int, seed: int) -> tuple[tuple[int, int, int, int], float]:
    """Top, left, height and width in pixels, and the brightness."""
    random = np.random.default_rng([seed, view])
    height, width = (random.uniform(SMALLEST_CROP, 1.0, size=2) * PHOTO_SIZE).astype(int)
    top, left = random.integers(0, PHOTO_SIZE - height + 1), random.integers(0, PHOTO_SIZE - width + 1)
    return (int(top), int(left), int(height), int(width)), random.uniform(0.8, 1.2)


def view_boxes(boxes: np.ndarray, view: int, seed: int) -> np.ndarray:
    """Boxes `(G, 4)` of a photo, relative to it -> relative to its `view_pixels`, of which they may stick out."""
    if view in (CROPPED, CROPPED_FLIPPED):
        (top, left, height, width), _ = _crop(view, seed)
        boxes = zoom_boxes(boxes, np.array([left, top, left + width, top + height]) / PHOTO_SIZE)
    if view in (FLIPPED, CROPPED_FLIPPED):
        boxes = np.stack((1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]), 1)
    return boxes.astype(np.float32)


def bottom_features(trunk: Trunk, folder: Path, names: Sequence[str], views: int, cache: Path) -> np.ndarray:
    """float16 `(len(names), views, 120, 18, 18)`: the frozen lower trunk over every view of every photo.

    Kept in `cache` (an `.npy` beside a `.json` of names and progress) and continued there after a stop.
    Raises `FileNotFoundError` for photos that `folder` does not hold, `ValueError` for a cache of other names.
    """
    shape = (len(names), views, *BOTTOM_SHAPE)
    index_path = cache.with_suffix(".json")
    if index_path.exists():
        index = json.loads(index_path.read_text())
        if index["names"] != list(names) or index["views"] != views:
            raise ValueError(f"{cache} holds the features of other photos: remove it or choose another work folder")
        done = set(index["done"])
        features = np.lib.format.open_memmap(cache, mode="r+")
    else:
        cache.parent.mkdir(parents=True, exist_ok=True)
        features = np.lib.format.open_memmap(cache, mode="w+", dtype=np.float16, shape=shape)
        done = set()
    row = {name: number for number, name in enumerate(names)}
    wanted = set(names) - done
    if not wanted:
        return features

    def save() -> None:
        features.flush()
        partial = index_path.with_suffix(".part")
        partial.write_text(json.dumps({"names": list(names), "views": views, "done": sorted(done)}))
        partial.replace(index_path)

    device = next(trunk.parameters()).device
    trunk = channels_last(trunk)
    found = tqdm(iterate_photos(folder, wanted), total=len(wanted), desc=f"features {cache.stem}")
    unsaved = 0
    for batch in in_batches(found, math.ceil(BATCH / views)):
        pixels = np.stack([view_pixels(photo, view, row[name]) for name, photo in batch for view in range(views)])
        with torch.inference_mode(), machine(device).autocast(device):
            x = normalise(torch.from_numpy(pixels).to(device)).to(memory_format=torch.channels_last)
            y = trunk.bottom(x).to(torch.float16).cpu().numpy()
        for (name, _), value in zip(batch, y.reshape(len(batch), views, *BOTTOM_SHAPE), strict=True):
            features[row[name]] = value
            done.add(name)
        unsaved += len(batch)
        if unsaved >= SAVE_EVERY:
            save()
            unsaved = 0
    save()
    return features
