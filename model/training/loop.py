"""The training loop: stages in order, a checkpoint every epoch, and the same command goes on after a stop."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.bottom_up.grid import cells
from model.bottom_up.trunk import HEAD_WIDTH, Trunk, imagenet_trunk
from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.training.average import WeightAverage
from model.training.data import Photo, epoch_batches, pad_captions, pick_captions, read_captions
from model.training.features import bottom_features
from model.training.objectives import Batch, backbone_loss, exits_loss
from model.training.optimiser import freeze_layers, make_optimiser, rate_at
from model.training.regions import KeptRegions, PhotoRows, boxes_for, mirrored
from model.training.settings import StageSettings, TrainSettings
from model.training.validation import caption_rows, caption_words, mean_cider
from model.vocabulary import Vocabulary

LOG_EVERY = 20  # steps between lines of the log


class Trainer:
    """One run in one work folder: `log.jsonl` to plot, `checkpoint.pt` to go on from, `<stage>.pt` when a stage ends."""

    def __init__(self, settings: TrainSettings, data: Path, work: Path, features: Path) -> None:
        """`features`: folder of kept lower-trunk features, shared by runs. Raises `ValueError` for bad data."""
        self.settings, self.work = settings, work
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        photos = read_captions(data / settings.data.captions)
        extra = read_captions(data / settings.data.extra_captions) if settings.data.extra_captions else []
        self.photos: list[Photo] = [*photos, *(replace(photo, split="train") for photo in extra)]
        self.train_rows = [row for row, photo in enumerate(self.photos) if photo.split == "train"]
        self.val_rows = [row for row, photo in enumerate(self.photos) if photo.split == "val"]
        self.references = [self.photos[row].captions for row in self.val_rows]
        self.vocabulary = Vocabulary.build(
            (caption for row in self.train_rows for caption in self.photos[row].captions), settings.least_count
        )
        self.trunk: Trunk = imagenet_trunk().to(memory_format=torch.channels_last)
        parts = [self._bottom(photos, data / settings.data.photos, features / f"{settings.name}.npy")]
        if extra:
            folder = data / settings.data.extra_photos
            parts.append(self._bottom(extra, folder, features / f"{settings.name}-extra.npy"))
        self.rows = PhotoRows(tuple(photo.name for photo in self.photos), tuple(parts))
        config = DeeCapConfig(vocabulary_size=len(self.vocabulary), feature_width=HEAD_WIDTH, **settings.model)
        self.model = DeeCap(config)
        self.kept: KeptRegions | None = None

    def _bottom(self, photos: Sequence[Photo], folder: Path, cache: Path) -> np.ndarray:
        return bottom_features(self.trunk, folder, [photo.name for photo in photos], self.settings.views, cache)

    def run(self) -> None:
        """All stages, those already done left out."""
        for stage in self.settings.stages:
            if not (self.work / f"{stage.name}.pt").exists():
                self._run_stage(stage)
            self._load(torch.load(self.work / f"{stage.name}.pt", weights_only=True))

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"], strict=False)
        self.trunk.load_state_dict(state["trunk"])

    # Regions ------------------------------------------------------------------------------------------------------

    def regions(self, rows: Sequence[int], views: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, boxes and mask of photos, by the trunk as it is now; gradients flow where they are on."""
        if self.kept is not None:
            features = self.kept(rows, views)
        else:
            features = cells(self.trunk.top(self.rows.bottom(rows, views)))
        return features, boxes_for(len(rows)), None

    # One stage ----------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: StageSettings) -> None:
        tuned = stage.tune_trunk_from >= 0
        self.kept = None if tuned else KeptRegions(self.rows, self.trunk, self.settings.views)
        optimiser = make_optimiser(self.model, self.trunk.top_parameters() if tuned else [], stage)
        average = WeightAverage({"model": self.model, "trunk": self.trunk}, self.settings.average_decay)
        progress: dict[str, Any] = {"epoch": 0, "best": -1.0, "best_epoch": -1}
        path = self.work / "checkpoint.pt"
        if path.exists() and (saved := torch.load(path, weights_only=True))["stage"] == stage.name:
            self._load(saved)
            optimiser.load_state_dict(saved["optimiser"])
            average.load_state_dict(saved["average"])
            progress = saved["progress"]
        while progress["epoch"] < stage.epochs and progress["epoch"] - progress["best_epoch"] <= stage.patience:
            self._run_epoch(stage, progress["epoch"], optimiser, average)
            average.swap()
            cider = self._validate(stage, progress["epoch"])
            if cider > progress["best"]:
                progress.update(best=cider, best_epoch=progress["epoch"])
                _save(self.work / f"{stage.name}.best.pt", self._state(stage, progress))
            average.swap()
            progress["epoch"] += 1
            _save(path, {**self._state(stage, progress), "optimiser": optimiser.state_dict(), "average": average.state_dict()})
        (self.work / f"{stage.name}.best.pt").replace(self.work / f"{stage.name}.pt")

    def _state(self, stage: StageSettings, progress: dict[str, Any]) -> dict[str, Any]:
        states = {"model": self.model.state_dict(), "trunk": self.trunk.state_dict()}
        return {"stage": stage.name, "progress": dict(progress), **states}

    def _run_epoch(
        self, stage: StageSettings, epoch: int, optimiser: torch.optim.Optimizer, average: WeightAverage
    ) -> None:
        self.model.train()
        random = np.random.default_rng([self.settings.seed, epoch, len(stage.name)])
        steps = len(self.train_rows) // stage.batch_images
        tuning = 0 <= stage.tune_trunk_from <= epoch
        started, losses = time.monotonic(), []
        bar = tqdm(
            epoch_batches(len(self.train_rows), stage.batch_images, self.settings.seed, epoch),
            total=steps,
            desc=f"{stage.name} {epoch + 1}/{stage.epochs}",
        )
        for number, chosen in enumerate(bar):
            step = epoch * steps + number
            rate = rate_at(step, steps, stage)
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.param_groups[2]["lr"] = rate * stage.trunk_learning_rate / stage.learning_rate
            rows = [self.train_rows[index] for index in chosen]
            views = random.integers(0, self.settings.views if self.kept is None else 2, size=len(rows)).tolist()
            with torch.set_grad_enabled(tuning):
                features, boxes, mask = self.regions(rows, views)
            captions = [
                caption
                for row, view in zip(rows, views, strict=True)
                for caption in pick_captions(
                    self.photos[row].captions, stage.captions_per_image, self.vocabulary, mirrored(view), random
                )
            ]
            inputs, targets = pad_captions(captions, self.model.config.max_words)
            batch = Batch(features, boxes, mask, inputs, targets)
            with torch.autocast("cpu", torch.bfloat16):
                if stage.kind == "backbone":
                    loss = backbone_loss(self.model, batch, stage, random)
                else:
                    loss = exits_loss(self.model, batch, stage)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if stage.kind == "exits" and stage.freeze_layers:
                freeze_layers(self.model, random)
            parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, stage.gradient_norm)
            optimiser.step()
            average.update()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if number % LOG_EVERY == LOG_EVERY - 1:
                self._log(stage=stage.name, step=step + 1, loss=float(np.mean(losses[-LOG_EVERY:])), rate=rate)
        seconds = time.monotonic() - started
        per_second = steps * stage.batch_images * stage.captions_per_image / seconds
        self._log(stage=stage.name, epoch=epoch + 1, loss=float(np.mean(losses)), seconds=seconds, captions_per_s=per_second)

    def _validate(self, stage: StageSettings, epoch: int) -> float:
        decoded, _ = caption_rows(self.model, self.regions, self.val_rows, batch=self.settings.validation_batch)
        words = caption_words(decoded, self.vocabulary)
        cider = mean_cider(words, self.references)
        self._log(stage=stage.name, epoch=epoch + 1, val_cider=cider, sample=" ".join(words[0]))
        return cider

    def _log(self, **line: Any) -> None:
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        if "epoch" in line:
            print(json.dumps(line), flush=True)


def _save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)
