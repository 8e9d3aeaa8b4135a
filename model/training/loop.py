"""The training loop: stages in order, a checkpoint every epoch, and the same command goes on after a stop."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.bottom_up.embedded import write_extractor
from model.bottom_up.grid import cells
from model.bottom_up.quantise import quantise_extractor
from model.bottom_up.region_head import load_region_head
from model.bottom_up.region_selection import region_width
from model.bottom_up.trunk import HEAD_WIDTH, Trunk, imagenet_trunk
from model.bundle import EXTRACTOR
from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.training.augment import hide_regions
from model.training.average import WeightAverage
from model.training.cell_classes import CellClasses
from model.training.checkpoint import save_whole
from model.training.data import Photo, epoch_batches, pad_captions, pick_captions, read_captions
from model.training.features import FULL
from model.training.from_bundle import KEPT, keep_extractor, network_like, read_start, take_weights, with_new_words
from model.training.given_boxes import GivenBoxes, boxes_of_some, read_boxes
from model.training.memory_format import channels_last
from model.training.objectives import Batch, backbone_loss, exits_loss
from model.training.optimiser import clip_gradients, freeze_layers, is_exit_part, make_optimiser, rate_at, set_rate
from model.training.own_captions import beam_captions, made_once
from model.training.photos import iterate_photos, photo_names
from model.training.regions import (
    KeptRegions,
    PhotoList,
    PhotoRows,
    PhotoSource,
    RegionFiles,
    boxes_for,
    kept_rows,
    mirrored,
)
from model.training.sampling import sample_captions
from model.training.self_critical import CiderReward, pad_samples, sacreeos_signature, self_critical_loss
from model.training.settings import StageSettings, TrainSettings
from model.training.throughput import count_flops, machine
from model.training.tuning import TrunkTuning
from model.training.validation import caption_rows, caption_words, mean_cider
from model.vocabulary import Vocabulary

LOG_EVERY = 20  # steps between lines of the log
RANGE_PHOTOS = 100  # that the ranges of an int8 extractor are taken from


class Trainer:
    """One run in one work folder: `log.jsonl` to plot, `checkpoint.pt` to go on from, `<stage>.pt` of each stage."""

    def __init__(self, settings: TrainSettings, data: Path, work: Path, features: Path) -> None:
        """`features`: folder of kept features, shared by runs.

        Raises `ValueError` for bad data or a bad bundle, `FileNotFoundError` for what is not there.
        """
        self.settings, self.work, self.features = settings, work, features
        work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.machine = machine(self.device)
        torch.manual_seed(settings.seed)
        photos = [photo for photo in read_captions(data / settings.data.captions) if photo.split in ("train", "val")]
        extra = read_captions(data / settings.data.extra_captions) if settings.data.extra_captions else []
        extra = [photo for photo in extra if photo.split == "train"]
        self.photos: list[Photo] = [*photos, *extra]
        self.train_rows = [row for row, photo in enumerate(self.photos) if photo.split == "train"]
        self.val_rows = [row for row, photo in enumerate(self.photos) if photo.split == "val"]
        self.references = [self.photos[row].captions for row in self.val_rows]
        largest = max(stage.batch_images for stage in settings.stages)
        if not self.val_rows:
            raise ValueError(f"{data / settings.data.captions} has no photos in the split val")
        if len(self.train_rows) < largest:
            raise ValueError(f"{len(self.train_rows)} photos in the split train are fewer than a batch of {largest}")
        self.seen_through = read_start(settings.seen_through) if settings.seen_through else None
        self.bundle = self.seen_through if settings.starts_from_bundle else None  # to go on from
        captions = [caption for row in self.train_rows for caption in self.photos[row].captions]
        self.vocabulary = (
            with_new_words(self.bundle.vocabulary, captions, settings.least_count)
            if self.bundle
            else Vocabulary.build(captions, settings.least_count)
        )
        given = self._read_boxes(data)
        self.cell_classes: CellClasses | None = None  # beside the trunk, while that learns
        self.tuning: TrunkTuning | None = None
        self.trunk: Trunk | None = None
        self.region_head: dict[str, Any] | None = None  # what `deecap train-regions` saved
        self.sources: list[PhotoSource] = []
        self.files: RegionFiles | None = None
        feature_width = HEAD_WIDTH
        if settings.data.region_features:
            if any(stage.own_captions or stage.tune_trunk_from >= 0 for stage in settings.stages):
                raise ValueError("region_features leave no trunk to tune and no photos to draw own captions for")
            names, numbers = [photo.name for photo in self.photos], [photo.number for photo in self.photos]
            self.files = RegionFiles(data / settings.data.region_features, names, numbers)
            feature_width = self.files.feature_width
        else:
            self.sources = self._photo_sources(photos, extra, data)
            self.rows: PhotoRows | PhotoList
            if self.seen_through:
                self.rows = PhotoList(tuple(self.sources))
                feature_width = self.seen_through.model.config.feature_width
            else:
                self.trunk = channels_last(imagenet_trunk().to(self.device))
                self.rows = kept_rows(self.trunk, self.sources, features)
                beside = [row for row, photo in enumerate(self.photos) if photo.split == "unlabelled"]
                if given is not None:
                    self.cell_classes = CellClasses(given, HEAD_WIDTH).to(self.device)
                    beside = [row for row in beside if self.photos[row].name in given.of]
                    if len(beside) < (most := max(stage.cell_class_photos for stage in settings.stages)):
                        raise ValueError(
                            f"{len(beside)} photos without captions have boxes: cell_class_photos are {most}"
                        )
                self.tuning = TrunkTuning(self.trunk, self.rows, self.cell_classes, beside)
        if settings.data.region_head:
            feature_width = self._read_region_head(work.parent / settings.data.region_head / "head.pt")
        words = len(self.vocabulary)
        config = (
            network_like(self.bundle.model.config, settings.model, words)
            if self.bundle
            else DeeCapConfig(vocabulary_size=words, feature_width=feature_width, **settings.model)
        )
        self.model = DeeCap(config).to(self.device)
        if self.bundle:
            take_weights(self.model, self.bundle.model)
        if self.seen_through:
            keep_extractor(self.seen_through, work)
        self.kept: KeptRegions | None = None
        self.kept_quantised = False
        self.reward: CiderReward | None = None
        self.own_captions: dict[str, list[list[int]]] = {}

    def _read_boxes(self, data: Path) -> GivenBoxes | None:
        """Those that a stage teaches, if one does. Raises `ValueError` for a bad file, or one of no train photo."""
        if not any(stage.cell_classes for stage in self.settings.stages):
            return None
        path = data / self.settings.data.boxes
        given = read_boxes(path)
        names = [self.photos[row].name for row in self.train_rows]
        if not boxes_of_some(given, names):
            raise ValueError(f"{path} has boxes of none of the photos in the split train")
        return given

    def _read_region_head(self, path: Path) -> int:
        """The regions' F. Raises `FileNotFoundError`, or `ValueError` where a stage would tune the trunk under it."""
        if self.trunk is None or any(stage.tune_trunk_from >= 0 for stage in self.settings.stages):
            raise ValueError("a region head needs photos, and its trunk as it is: tune_trunk_from cannot be with it")
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: `deecap train-regions` first")
        self.region_head = torch.load(path, map_location="cpu", weights_only=True)
        head = load_region_head(self.region_head)
        self.trunk.load_state_dict(self.region_head["trunk"])
        return region_width(head.width, head.class_count)

    def _photo_sources(self, photos: Sequence[Photo], extra: Sequence[Photo], data: Path) -> list[PhotoSource]:
        """Where all photos are. Those without captions join the others where a stage wants them."""
        told, views = self.settings.data, self.settings.views
        groups = [(photos, told.photos, told.captions, views), (extra, told.extra_photos, told.extra_captions, views)]
        if told.unlabelled_photos and any(
            stage.own_captions or stage.cell_class_photos for stage in self.settings.stages
        ):
            unlabelled = [Photo(photo, "unlabelled", ()) for photo in photo_names(data / told.unlabelled_photos)]
            self.photos.extend(unlabelled)
            groups.append((unlabelled, told.unlabelled_photos, told.unlabelled_photos, 1))
        return [
            PhotoSource(data / folder, tuple(photo.name for photo in group), source, kept_views)
            for group, folder, source, kept_views in groups
            if group
        ]

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
            if (self.trunk is None) != ("trunk" not in state) and self.files is None:
                raise ValueError("the saved model saw its photos through another extractor than this run's")
            if self.trunk is not None and self.region_head is None:
                self.trunk.load_state_dict(state["trunk"])
            if self.cell_classes is not None and "cell_classes" in state and not other_run:
                if state["classes"] != list(self.cell_classes.given.classes):
                    raise ValueError("the saved run's boxes are of other classes: choose another work folder")
                self.cell_classes.load_state_dict(state["cell_classes"])
        except RuntimeError as error:
            raise ValueError(f"the saved model is not of this configuration: {error}") from error

    # Regions ------------------------------------------------------------------------------------------------------

    def regions(self, rows: Sequence[int], views: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, boxes and mask of photos, by the trunk as it is now."""
        if self.files is not None:
            features, boxes, mask = (part.to(self.device) for part in self.files(rows))
            return features, boxes, mask
        if self.kept is not None:
            features, boxes, kept_mask = self.kept(rows, views)
            return (
                features.to(self.device),
                boxes.to(self.device),
                None if kept_mask is None else kept_mask.to(self.device),
            )
        assert self.trunk is not None
        assert isinstance(self.rows, PhotoRows)
        features = cells(self.trunk.top(self.rows.bottom(rows, views).to(self.device)))
        return features, boxes_for(len(rows)).to(self.device), None

    # One stage ----------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: StageSettings) -> None:
        tuned = stage.tune_trunk_from >= 0
        if tuned or self.files is not None:
            self.kept = None
        elif self.kept is None or stage.quantised_extractor != self.kept_quantised:
            # Else they are the last stage's, which left the trunk alone as well.
            self.kept = self._keep_regions(stage)
            self.kept_quantised = stage.quantised_extractor
        if stage.kind == "self_critical":
            self.reward = CiderReward({row: self._numbered(row) for row in self.train_rows})
            self._log(stage=stage.name, signature=sacreeos_signature(stage.captions_per_image))
        rows = self.train_rows
        if stage.own_captions:
            rows = [row for row, photo in enumerate(self.photos) if photo.split in ("train", "unlabelled")]
            self.own_captions = self._make_own_captions(rows, stage)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_exit_part(name) or not stage.freeze_backbone)
        trunk_parameters = self.trunk.top_parameters() if tuned and self.trunk is not None else []
        modules = self._modules(stage)
        beside = list(modules["cell_classes"].parameters()) if "cell_classes" in modules else []
        optimiser = make_optimiser(self.model, trunk_parameters, stage, beside)
        average = WeightAverage(modules, self.settings.average_decay)
        progress: dict[str, Any] = {"epoch": 0, "best": -1.0, "best_epoch": -1}
        path = self.work / "checkpoint.pt"
        saved = torch.load(path, map_location=self.device, weights_only=True) if path.exists() else {}
        if saved.get("stage") == stage.name:
            self._load(saved)
            optimiser.load_state_dict(saved["optimiser"])
            average.load_state_dict(saved["average"])
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

    def _keep_regions(self, stage: StageSettings) -> KeptRegions:
        if self.seen_through or self.region_head or stage.quantised_extractor:
            path = self.work / KEPT if self.seen_through else self._extractor(stage.quantised_extractor)
            threads = torch.get_num_threads()
            return KeptRegions.through_extractor(self.rows, self.sources, path, self.features, threads)
        assert self.trunk is not None
        assert isinstance(self.rows, PhotoRows)
        return KeptRegions.through_trunk(self.rows, self.trunk, self.features)

    def _extractor(self, quantised: bool) -> Path:
        """The extractor as a file in the work folder, from where the bundle takes the one in int8."""
        assert self.trunk is not None
        path = self.work / (EXTRACTOR if quantised else f"float-{EXTRACTOR}")
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                whole = Path(folder) / EXTRACTOR
                write_extractor(self.trunk, self.region_head, self.settings.data.large_cells, whole)
                if quantised:
                    names = {self.photos[row].name for row in self.train_rows[:RANGE_PHOTOS]}
                    wanted = [(source.folder, names & set(source.names)) for source in self.sources]
                    pixels = [found for place, some in wanted if some for _, found in iterate_photos(place, some)]
                    quantise_extractor(whole, path, np.stack(pixels))
                else:
                    shutil.copyfile(whole, path)
        return path

    def _modules(self, stage: StageSettings) -> dict[str, nn.Module]:
        """What a stage saves; what is asked of the trunk's cells lives for the stages that teach it."""
        lessons = self.cell_classes if stage.cell_classes else None
        modules = {"model": self.model, "trunk": self.trunk, "cell_classes": lessons}
        return {name: module for name, module in modules.items() if module is not None}

    def _state(self, stage: StageSettings, progress: dict[str, Any]) -> dict[str, Any]:
        states = {name: module.state_dict() for name, module in self._modules(stage).items()}
        state = {"stage": stage.name, "progress": dict(progress), "vocabulary": list(self.vocabulary.words), **states}
        if self.cell_classes is not None and "cell_classes" in states:
            state["classes"] = list(self.cell_classes.given.classes)
        if self.bundle:
            start = {"config": self.bundle.model.config.to_json(), "exit_policy": self.bundle.policy.to_json()}
            state["started_from"] = {"revision": self.bundle.revision, **start}
        return state if self.region_head is None else {**state, "region_head": self.region_head}

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
        views = [int(random.integers(self._views(row))) for row in rows]
        told = {"reward": 0.0}
        cells_loss: Tensor | None = None
        mask: Tensor | None = None
        if tuning:
            assert self.tuning is not None  # region files, and a bundle's extractor, leave no trunk to tune
            features, cells_loss = self.tuning.look(stage, rows, views, random)
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
            photo = self.photos[row]
            texts: Sequence[Sequence[str]] = photo.captions
            if photo.name in self.own_captions and (not texts or random.random() < stage.own_captions):
                texts = [[self.vocabulary.words[number] for number in own] for own in self.own_captions[photo.name]]
            captions += pick_captions(texts, stage.captions_per_image, self.vocabulary, mirrored(view), random)
        inputs, targets = pad_captions(captions, self.model.config.max_words)
        batch = Batch(features, boxes, mask, inputs.to(self.device), targets.to(self.device))
        with self.machine.autocast(self.device):
            loss = (backbone_loss if stage.kind == "backbone" else exits_loss)(self.model, batch, stage, random)
        return loss if cells_loss is None else loss + cells_loss, told

    def _views(self, row: int) -> int:
        """How many views of the photo there are to draw from."""
        if self.files is not None:
            return 1
        kept = self.rows.views(row)
        return kept if self.kept is None else min(kept, 2)

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
        return [self.vocabulary.encode(caption) for caption in self.photos[row].captions]

    def _make_own_captions(self, rows: Sequence[int], stage: StageSettings) -> dict[str, list[list[int]]]:
        """The model's own captions as it starts the stage, at full depth, by photo's name; kept in the work folder."""
        self.model.eval()

        def make(start: int, end: int) -> list[list[list[int]]]:
            with torch.no_grad():
                features, boxes, mask = self.regions(rows[start:end], [FULL] * (end - start))
                return beam_captions(self.model, self.model.encode(features, boxes, mask), mask)

        return made_once(self.work / f"{stage.name}.own.json", [self.photos[row].name for row in rows], make)

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
