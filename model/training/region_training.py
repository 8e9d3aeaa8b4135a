"""Trains the region head on a trunk that stays as it is: a checkpoint every epoch, the same command goes on."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.bottom_up.box_overlap import suppress
from model.bottom_up.region_head import Candidates, RegionHead
from model.bottom_up.region_limits import MOST, NMS_IOU
from model.bottom_up.trunk import Trunk
from model.training.average import WeightAverage
from model.training.checkpoint import save_whole
from model.training.data import epoch_batches, read_captions
from model.training.features import FULL
from model.training.given_boxes import GivenBoxes, in_view, pad_boxes, read_boxes
from model.training.memory_format import channels_last
from model.training.photos import photo_names
from model.training.region_loss import region_losses
from model.training.region_recall import Recall
from model.training.regions import PhotoRows, PhotoSource, kept_rows
from model.training.settings import TrainSettings
from model.training.throughput import machine

BATCH = 32  # photos at a time where nothing is learned


@dataclass(frozen=True)
class RegionSettings:
    """Of a run of `deecap train-regions`."""

    epochs: int = 12
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.02
    batch_images: int = 32
    average_decay: float = 0.998
    seed: int = 0


class RegionTrainer:
    """One run in one folder: `log.jsonl`, `checkpoint.pt` to go on from, and at the end `head.pt`."""

    def __init__(
        self, settings: RegionSettings, trunk: Trunk, photos: PhotoRows, given: GivenBoxes, val: set[str], work: Path
    ) -> None:
        """`val`: names of photos that are for measuring. Raises `ValueError` where boxes or photos are missing."""
        self.settings, self.trunk, self.photos, self.given, self.work = settings, trunk, photos, given, work
        known = [row for row, name in enumerate(photos.names) if name in given.of]
        self.val_rows = [row for row in known if photos.names[row] in val]
        self.train_rows = [row for row in known if photos.names[row] not in val]
        if len(self.train_rows) < settings.batch_images or not self.val_rows:
            raise ValueError(
                f"{len(self.train_rows)} photos with boxes to train on, {len(self.val_rows)} in the split val: "
                f"a batch takes {settings.batch_images}, and measuring at least one"
            )
        torch.manual_seed(settings.seed)
        self.device = next(trunk.parameters()).device
        self.head = channels_last(RegionHead(len(given.classes)).to(self.device))
        work.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """All epochs, those already done left out."""
        told = self.settings
        matrices = [p for p in self.head.parameters() if p.ndim > 1]
        vectors = [p for p in self.head.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": told.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=told.learning_rate, fused=True)
        average = WeightAverage({"head": self.head}, told.average_decay)
        path, epoch = self.work / "checkpoint.pt", 0
        if path.exists():
            saved = torch.load(path, map_location=self.device, weights_only=True)
            if saved["classes"] != list(self.given.classes):
                raise ValueError(f"{path} is of a run with other classes: choose another work folder")
            self.head.load_state_dict(saved["head"])
            optimiser.load_state_dict(saved["optimiser"])
            average.load_state_dict(saved["average"])
            epoch = saved["epoch"]
        while epoch < told.epochs:
            self._run_epoch(epoch, optimiser, average)
            epoch += 1
            now = {
                "epoch": epoch,
                **self._state(),
                "optimiser": optimiser.state_dict(),
                "average": average.state_dict(),
            }
            save_whole(path, now)
            average.swap()
            self._log(epoch=epoch, **self.recalls())
            if epoch == told.epochs:
                save_whole(self.work / "head.pt", self._state())
            average.swap()

    def _state(self) -> dict[str, Any]:
        states = {"head": self.head.state_dict(), "trunk": self.trunk.state_dict()}
        return {"classes": list(self.given.classes), **states}

    def _run_epoch(self, epoch: int, optimiser: torch.optim.Optimizer, average: WeightAverage) -> None:
        told = self.settings
        random = np.random.default_rng([told.seed, epoch])
        steps = len(self.train_rows) // told.batch_images
        started, sums = time.monotonic(), dict.fromkeys(("objectness", "classes", "boxes"), 0.0)
        self.head.train()
        batches = epoch_batches(len(self.train_rows), told.batch_images, told.seed, epoch)
        for number, chosen in enumerate(tqdm(batches, total=steps, desc=f"regions {epoch + 1}/{told.epochs}")):
            rate = _rate(epoch * steps + number, steps * told.epochs, told)
            for group in optimiser.param_groups:
                group["lr"] = rate
            rows = [self.train_rows[index] for index in chosen]
            views = [int(random.integers(self.photos.views(row))) for row in rows]
            names = [self.photos.names[row] for row in rows]
            # A crop was drawn from the photo's row in its own data set, as `bottom_features` did.
            found = [
                in_view(self.given.of[n], v, self.photos.seed(r)) for n, v, r in zip(names, views, rows, strict=True)
            ]
            given = pad_boxes(found)
            losses = region_losses(self._look(rows, views), self.head.centres, given)
            optimiser.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 10.0)
            optimiser.step()
            average.update()
            for name, loss in losses.items():
                sums[name] += loss.item()
        means = {name: total / steps for name, total in sums.items()}
        self._log(epoch=epoch + 1, **means, seconds=time.monotonic() - started)

    def _look(self, rows: list[int], views: list[int]) -> Candidates:
        fine = self.photos.bottom(rows, views).to(self.device)
        with machine(self.device).autocast(self.device):
            with torch.no_grad():
                coarse = self.trunk.top(fine)
            return self.head(fine, coarse)

    @torch.no_grad()
    def recalls(self) -> dict[str, float]:
        """Of the val photos' sure boxes, for the top 10 and the top 36 regions."""
        self.head.eval()
        recall = Recall()
        for start in range(0, len(self.val_rows), BATCH):
            rows = self.val_rows[start : start + BATCH]
            candidates = self._look(rows, [FULL] * len(rows))
            chances = candidates.objectness.float().sigmoid()
            for boxes, sure, row in zip(candidates.boxes, chances, rows, strict=True):
                kept = suppress(boxes, sure, NMS_IOU, MOST)
                recall.add(self.given.of[self.photos.names[row]], boxes[kept])
        return recall.to_json()

    def _log(self, **line: Any) -> None:
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def train_region_head(
    settings: TrainSettings, data: Path, boxes: Path, trained: Path, work: Path, name: str, told: RegionSettings
) -> None:
    """Trains the head over the trunk saved in `trained`, on all photos of the configuration that have boxes.

    Photos of the split val are for measuring, those of other splits but train are left out. Raises `ValueError` for bad
    data, `FileNotFoundError` where something is not there.
    """
    if not trained.exists():
        raise FileNotFoundError(f"{trained} is not there: train its run first")
    given = read_boxes(boxes)
    state = torch.load(trained, map_location="cpu", weights_only=True)
    if "trunk" not in state:
        raise ValueError(f"{trained} is of a run on region features or through a bundle: it has no trunk")
    trunk = Trunk()
    trunk.load_state_dict(state["trunk"])
    where = settings.data
    photos = [photo for photo in read_captions(data / where.captions) if photo.split in ("train", "val")]
    groups = [(where.captions, where.photos, [photo.name for photo in photos], settings.views)]
    if where.extra_captions:
        extra = [photo.name for photo in read_captions(data / where.extra_captions) if photo.split == "train"]
        groups.append((where.extra_captions, where.extra_photos, extra, settings.views))
    if where.unlabelled_photos:
        groups.append(
            (where.unlabelled_photos, where.unlabelled_photos, photo_names(data / where.unlabelled_photos), 1)
        )
    sources = [PhotoSource(data / folder, tuple(names), source, views) for source, folder, names, views in groups]
    rows = kept_rows(channels_last(trunk), sources, work / "features")
    val = {photo.name for photo in photos if photo.split == "val"}
    RegionTrainer(told, trunk, rows, given, val, work / name).run()


def _rate(step: int, steps: int, told: RegionSettings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < told.warmup_steps:
        return told.learning_rate * (step + 1) / told.warmup_steps
    share = (step - told.warmup_steps) / max(1, steps - told.warmup_steps)
    return told.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
