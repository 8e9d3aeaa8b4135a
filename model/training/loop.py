"""The training loop: stages in order, a checkpoint every epoch, and the same command goes on after a stop."""

from __future__ import annotations

import functools
import json
import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.training.augment import hide_regions
from model.training.average import WeightAverage
from model.training.checkpoint import save_whole
from model.training.data import epoch_batches, pad_captions, pick_captions
from model.training.features import FULL
from model.training.from_bundle import keep_extractor, network_like, read_start, take_weights, with_new_words
from model.training.objectives import Batch, backbone_loss, exits_loss
from model.training.optimiser import clip_gradients, freeze_layers, is_exit_part, make_optimiser, rate_at, set_rate
from model.training.own_captions import beam_captions, made_once
from model.training.photo_regions import PhotoRegions, read_photos
from model.training.regions import boxes_for, mirrored
from model.training.sampling import sample_captions
from model.training.self_critical import CiderReward, pad_samples, sacreeos_signature, self_critical_loss
from model.training.settings import StageSettings, TrainSettings
from model.training.throughput import count_flops, machine
from model.training.validation import caption_rows, caption_words, mean_cider
from model.vocabulary import Vocabulary

LOG_EVERY = 20  # steps between lines of the log


class Trainer:
    """One run in one work folder: `log.jsonl` to plot, `checkpoint.pt` to go on from, `<stage>.pt` of each stage."""

    def __init__(self, settings: TrainSettings, data: Path, work: Path, features: Path) -> None:
        """`features`: folder of kept features, shared by runs.

        Raises `ValueError` for bad data or a bad bundle, `FileNotFoundError` for what is not there.
        """
        self.settings, self.work = settings, work
        work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.machine = machine(self.device)
        torch.manual_seed(settings.seed)
        self.photos = read_photos(settings, data)
        self.train_rows, self.val_rows = self.photos.of("train"), self.photos.of("val")
        self.references = [self.photos.all[row].captions for row in self.val_rows]
        seen_through = read_start(settings.seen_through) if settings.seen_through else None
        self.bundle = seen_through if settings.starts_from_bundle else None  # to go on from
        captions = [caption for row in self.train_rows for caption in self.photos.all[row].captions]
        self.vocabulary = (
            with_new_words(self.bundle.vocabulary, captions, settings.least_count)
            if self.bundle
            else Vocabulary.build(captions, settings.least_count)
        )
        self.regions = PhotoRegions(settings, self.photos, data, work, features, seen_through, self.device)
        words = len(self.vocabulary)
        config = (
            network_like(self.bundle.model.config, settings.model, words)
            if self.bundle
            else DeeCapConfig(vocabulary_size=words, feature_width=self.regions.feature_width, **settings.model)
        )
        self.model = DeeCap(config).to(self.device)
        if self.bundle:
            take_weights(self.model, self.bundle.model)
        if seen_through:
            keep_extractor(seen_through, work)
        self.reward: CiderReward | None = None
        self.own_captions: dict[str, list[list[int]]] = {}

    def run(self, until: str = "") -> None:
        """All stages, those already done left out, or those up to the one named.

        Raises `FileNotFoundError` when what it starts from is not there, `ValueError` for a stage that there is not.
        """
        if until and until not in (names := [stage.name for stage in self.settings.stages]):
            raise ValueError(f"{self.settings.name} has no stage {until!r}, but {', '.join(names)}")
        if self.settings.starts_from:
            start = self.work.parent / f"{self.settings.starts_from}.pt"
            if not start.exists():
                run, last = self.settings.starts_from.split("/")
                raise FileNotFoundError(f"{start} is not there: train {run} first, --until {last} is enough")
            self._load(torch.load(start, map_location=self.device, weights_only=True), other_run=True)
        for stage in self.settings.stages:
            if not (self.work / f"{stage.name}.pt").exists():
                self._run_stage(stage)
            self._load(torch.load(self.work / f"{stage.name}.pt", map_location=self.device, weights_only=True))
            if stage.name == until:
                return

    def _load(self, state: dict[str, Any], other_run: bool = False) -> None:
        """Raises `ValueError` where the state is of another vocabulary, or of another network than this run's."""
        if state["vocabulary"] != list(self.vocabulary.words):
            raise ValueError("the saved model has another vocabulary than this data gives: choose another work folder")
        try:
            saved = state["model"]
            if other_run:  # it may lack this one's exits, or have others, of another width
                saved = weights_that_fit(saved, self.model.state_dict())
            self.model.load_state_dict(saved, strict=not other_run)
            self.regions.load(state, other_run)
        except RuntimeError as error:
            raise ValueError(f"the saved model is not of this configuration: {error}") from error

    # One stage ----------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: StageSettings) -> None:
        self.regions.begin(stage)
        if stage.kind == "self_critical":
            self.reward = CiderReward({row: self._numbered(row) for row in self.train_rows})
            self._log(stage=stage.name, signature=sacreeos_signature(stage.captions_per_image))
        rows = self.train_rows
        if stage.own_captions:
            rows = self.photos.of("train", "unlabelled")
            self.own_captions = self._make_own_captions(rows, stage)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_exit_part(name) or not stage.freeze_backbone)
        trunk = self.regions.trunk if stage.tune_trunk_from >= 0 else None
        modules = self._modules(stage)
        beside = list(modules["cell_classes"].parameters()) if "cell_classes" in modules else []
        trunk_parameters = [] if trunk is None else trunk.top_parameters()
        optimiser = make_optimiser(self.model, trunk_parameters, stage, beside)
        average = WeightAverage(modules, self.settings.average_decay)
        progress: dict[str, Any] = {"epoch": 0, "best": -1.0, "best_epoch": -1}
        path = self.work / "checkpoint.pt"
        saved = torch.load(path, map_location=self.device, weights_only=True) if path.exists() else {}
        if saved.get("stage") == stage.name:
            self._load(saved)
            try:
                optimiser.load_state_dict(saved["optimiser"])
                average.load_state_dict(saved["average"])
            except ValueError as error:
                raise ValueError(
                    f"{path} is of another configuration, or version: remove it to begin {stage.name} anew"
                ) from error
            progress = saved["progress"]
        while progress["epoch"] < stage.epochs and progress["epoch"] - progress["best_epoch"] <= stage.patience:
            self._run_epoch(stage, progress["epoch"], rows, optimiser, average)
            average.swap()
            cider = self._validate(stage, progress["epoch"])
            if cider > progress["best"]:
                progress.update(best=cider, best_epoch=progress["epoch"])
                save_whole(self.work / f"{stage.name}.best.pt", self._state(stage, progress))
            average.swap()
            progress["epoch"] += 1
            save_whole(
                path,
                {**self._state(stage, progress), "optimiser": optimiser.state_dict(), "average": average.state_dict()},
            )
        (self.work / f"{stage.name}.best.pt").replace(self.work / f"{stage.name}.pt")

    def _modules(self, stage: StageSettings) -> dict[str, nn.Module]:
        """What a stage saves."""
        return {"model": self.model, **self.regions.modules(stage)}

    def _state(self, stage: StageSettings, progress: dict[str, Any]) -> dict[str, Any]:
        told = {"stage": stage.name, "progress": dict(progress), "vocabulary": list(self.vocabulary.words)}
        state = {**told, "model": self.model.state_dict(), **self.regions.state(stage)}
        if self.bundle:
            start = {"config": self.bundle.model.config.to_json(), "exit_policy": self.bundle.policy.to_json()}
            state["started_from"] = {"revision": self.bundle.revision, **start}
        return state

    def _run_epoch(
        self,
        stage: StageSettings,
        epoch: int,
        rows: Sequence[int],
        optimiser: torch.optim.Optimizer,
        average: WeightAverage,
    ) -> None:
        self.model.train()
        random = np.random.default_rng([self.settings.seed, epoch, zlib.crc32(stage.name.encode())])
        torch.manual_seed(int(random.integers(2**31)))
        steps = len(rows) // stage.batch_images
        tuning = 0 <= stage.tune_trunk_from <= epoch
        started, told, flops = time.monotonic(), [], 0
        batches = epoch_batches(len(rows), stage.batch_images, self.settings.seed, epoch)
        bar = tqdm(batches, total=steps, desc=f"{stage.name} {epoch + 1}/{stage.epochs}")
        for number, chosen in enumerate(bar):
            rate = rate_at(epoch * steps + number, steps, stage)
            set_rate(optimiser, rate)
            optimiser.zero_grad(set_to_none=True)
            learn = functools.partial(self._learn, stage, [rows[index] for index in chosen], tuning, random)
            if number:
                told.append(learn())
            else:  # counting takes a while, and the others do about as much
                of_first, flops = count_flops(learn)
                told.append(of_first)
            if stage.kind == "exits" and stage.freeze_layers:
                freeze_layers(self.model, random)
            clip_gradients(optimiser, stage.gradient_norm)
            optimiser.step()
            average.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in told[-1].items()})
            if number % LOG_EVERY == LOG_EVERY - 1:
                self._log(stage=stage.name, step=epoch * steps + number + 1, rate=rate, **_means(told[-LOG_EVERY:]))
        seconds = time.monotonic() - started
        self._log(
            stage=stage.name,
            epoch=epoch + 1,
            **_means(told),
            seconds=seconds,
            captions_per_s=steps * stage.batch_images * stage.captions_per_image / seconds,
            share_of_peak=steps * flops / seconds / self.machine.flops,
            computed_in=str(self.machine.dtype).removeprefix("torch."),
        )

    def _learn(
        self, stage: StageSettings, rows: Sequence[int], tuning: bool, random: np.random.Generator
    ) -> dict[str, float]:
        """The gradients of one batch. Returns what the log says of it: its loss, and what `_loss` tells besides."""
        loss, told = self._loss(stage, rows, tuning, random)
        loss.backward()
        return {"loss": loss.item(), **told}

    def _loss(
        self, stage: StageSettings, rows: Sequence[int], tuning: bool, random: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch of photos, and what the log says besides: the mean reward where captions were scored
        (else 0), and what of the loss is the cells' where they are taught."""
        views = [int(random.integers(self.regions.views(row))) for row in rows]
        told = {"reward": 0.0}
        cells_loss: Tensor | None = None
        mask: Tensor | None = None
        if tuning:
            assert self.regions.tuning is not None  # region files, and a bundle's extractor, leave no trunk to tune
            features, cells_loss = self.regions.tuning.look(stage, rows, views, random)
            boxes = boxes_for(len(rows)).to(self.device)
            if stage.cell_classes:
                told["cells_loss"] = cells_loss.item()
        else:
            with torch.no_grad():
                features, boxes, mask = self.regions(rows, views)
        if stage.hidden_regions:
            there = torch.ones(features.shape[:2], dtype=torch.bool, device=self.device) if mask is None else mask
            mask = hide_regions(there, stage.hidden_regions, random)
        if stage.kind == "self_critical":
            loss, told["reward"] = self._self_critical_loss(stage, rows, views, (features, boxes, mask), random)
            return loss, told
        captions = []
        for row, view in zip(rows, views, strict=True):
            photo = self.photos.all[row]
            texts: Sequence[Sequence[str]] = photo.captions
            if photo.name in self.own_captions and (not texts or random.random() < stage.own_captions):
                texts = [[self.vocabulary.words[number] for number in own] for own in self.own_captions[photo.name]]
            captions += pick_captions(texts, stage.captions_per_image, self.vocabulary, mirrored(view), random)
        inputs, targets = pad_captions(captions, self.model.config.max_words)
        batch = Batch(features, boxes, mask, inputs.to(self.device), targets.to(self.device))
        with self.machine.autocast(self.device):
            loss = (backbone_loss if stage.kind == "backbone" else exits_loss)(self.model, batch, stage, random)
        return loss if cells_loss is None else loss + cells_loss, told

    def _self_critical_loss(
        self,
        stage: StageSettings,
        rows: Sequence[int],
        views: Sequence[int],
        regions: tuple[Tensor, Tensor, Tensor | None],
        random: np.random.Generator,
    ) -> tuple[Tensor, float]:
        assert self.reward is not None  # made when the stage began
        features, boxes, mask = regions
        self.model.eval()  # for the loss too: dropout would make it one of other chances than were drawn by
        with torch.no_grad():
            memory = self.model.encode(features, boxes, mask)
        samples = sample_captions(self.model, memory, stage.captions_per_image, mask)
        # The references speak of the photo as it is: a mirrored view's samples are mirrored back before scoring.
        scored = [
            self.vocabulary.mirrored(sample) if mirrored(views[index // stage.captions_per_image]) else sample
            for index, sample in enumerate(samples)
        ]
        advantages, reward = self.reward.advantages(rows, scored)
        inputs, targets = (part.to(self.device) for part in pad_samples(samples))
        batch = Batch(features, boxes, mask, inputs, targets)
        weights = torch.from_numpy(advantages).float().to(self.device)
        # In float32, as the samples were drawn: in bfloat16 their chances would be others.
        return self_critical_loss(self.model, batch, weights, stage, random), reward

    def _numbered(self, row: int) -> list[list[int]]:
        return [self.vocabulary.encode(caption) for caption in self.photos.all[row].captions]

    def _make_own_captions(self, rows: Sequence[int], stage: StageSettings) -> dict[str, list[list[int]]]:
        """The model's own captions as it starts the stage, at full depth, by photo's name; kept in the work folder."""
        self.model.eval()

        def make(start: int, end: int) -> list[list[list[int]]]:
            with torch.no_grad():
                features, boxes, mask = self.regions(rows[start:end], [FULL] * (end - start))
                return beam_captions(self.model, self.model.encode(features, boxes, mask), mask)

        return made_once(self.work / f"{stage.name}.own.json", [self.photos.all[row].name for row in rows], make)

    def _validate(self, stage: StageSettings, epoch: int) -> float:
        """What the best epoch is chosen by: CIDEr-D x 100 of greedy captions of the val photos at full depth.

        Where exits are trained, the mean of that and of the same with every word leaving at layer 1.
        """
        thresholds = [0.0, math.inf] if stage.kind == "exits" and self.model.config.exits != "final" else [0.0]
        ciders, samples = [], []
        for tau in thresholds:
            batch = self.settings.validation_batch
            decoded = caption_rows(self.model, self.regions, self.val_rows, tau, batch)
            words = caption_words(decoded, self.vocabulary)
            ciders.append(mean_cider(words, self.references))
            samples.append(" ".join(words[0]))
        names = ("val_cider", "val_cider_layer_1")[: len(ciders)]
        self._log(stage=stage.name, epoch=epoch + 1, **dict(zip(names, ciders, strict=True)), samples=samples)
        return float(np.mean(ciders))

    def _log(self, **line: Any) -> None:
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        if "epoch" in line:
            print(json.dumps(line), flush=True)


def _means(told: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of what was told of several batches, name by name."""
    return {name: float(np.mean([each[name] for each in told])) for name in told[0]}


def weights_that_fit(saved: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of another network's state this one can start from.

    Where it reads more numbers of a region, those come after the ones that it knows: their weights start at zero.
    """
    found = {}
    for name, value in saved.items():
        if name in own and value.shape == own[name].shape:
            found[name] = value
        elif (
            name in ("feature_in.weight", "feature_norm.weight", "feature_norm.bias") and value.shape < own[name].shape
        ):
            grown = torch.zeros_like(own[name]) if name == "feature_in.weight" else own[name].clone()
            grown[..., : value.shape[-1]] = value
            found[name] = grown
    return found
