"""What a run sees of its photos: regions by row, from files, through the run's own trunk, or a bundle's extractor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.bottom_up.embedded import write_extractor
from model.bottom_up.grid import cells
from model.bottom_up.quantise import quantise_extractor
from model.bottom_up.region_head import load_region_head
from model.bottom_up.region_selection import region_width
from model.bottom_up.trunk import HEAD_WIDTH, Trunk, imagenet_trunk
from model.bundle import EXTRACTOR, Bundle
from model.training.cell_classes import CellClasses
from model.training.data import Photo, read_captions
from model.training.from_bundle import KEPT
from model.training.given_boxes import GivenBoxes, count_with_boxes, read_boxes
from model.training.memory_format import channels_last
from model.training.photos import iterate_photos, photo_names
from model.training.regions import KeptRegions, PhotoList, PhotoRows, PhotoSource, RegionFiles, boxes_for, kept_rows
from model.training.settings import StageSettings, TrainSettings
from model.training.tuning import TrunkTuning

RANGE_PHOTOS = 100  # that the ranges of an int8 extractor are taken from
KEPT_VIEWS = 2  # whole and mirrored, where regions are kept and the trunk does not learn


@dataclass(frozen=True)
class RunPhotos:
    """The photos of a run and where they are: of the split train and val, extra ones of train, then, of the split
    `unlabelled`, those without captions."""

    all: tuple[Photo, ...]
    sources: tuple[PhotoSource, ...]  # of all, in their order

    def of(self, *splits: str) -> list[int]:
        """The rows of the photos of these splits."""
        return [row for row, photo in enumerate(self.all) if photo.split in splits]


def read_photos(settings: TrainSettings, data: Path) -> RunPhotos:
    """Those without captions join the others where a stage wants them.

    Raises `ValueError` for bad caption files, or splits that cannot be trained on, `FileNotFoundError` for what is not
    there.
    """
    told, views = settings.data, settings.views
    photos = [photo for photo in read_captions(data / told.captions) if photo.split in ("train", "val")]
    extra = read_captions(data / told.extra_captions) if told.extra_captions else []
    extra = [photo for photo in extra if photo.split == "train"]
    groups = [(photos, told.photos, told.captions, views), (extra, told.extra_photos, told.extra_captions, views)]
    if told.unlabelled_photos and any(stage.own_captions or stage.cell_class_photos for stage in settings.stages):
        unlabelled = [Photo(photo, "unlabelled", ()) for photo in photo_names(data / told.unlabelled_photos)]
        groups.append((unlabelled, told.unlabelled_photos, told.unlabelled_photos, 1))
    sources = tuple(
        PhotoSource(data / folder, tuple(photo.name for photo in group), source, kept_views)
        for group, folder, source, kept_views in groups
        if group
    )
    read = RunPhotos(tuple(photo for group, *_ in groups for photo in group), sources)
    largest = max(stage.batch_images for stage in settings.stages)
    if not read.of("val"):
        raise ValueError(f"{data / told.captions} has no photos in the split val")
    if (count := len(read.of("train"))) < largest:
        raise ValueError(f"{count} photos in the split train are fewer than a batch of {largest}")
    return read


class PhotoRegions:
    """Called with rows of photos and a view of each: features `(B, R, F)`, boxes `(B, R, 4)`, mask `(B, R)` or none."""

    def __init__(
        self,
        settings: TrainSettings,
        photos: RunPhotos,
        data: Path,
        work: Path,
        features: Path,
        seen_through: Bundle | None,
        device: torch.device,
    ) -> None:
        """`features`: folder of what is kept of photos, shared by runs. `seen_through`: whose extractor sees them; it
        is to be in the folder `work` (`keep_extractor`) when a stage begins.

        Raises `ValueError` for bad data or settings that do not go with it, `FileNotFoundError` for what is not there.
        """
        self.settings, self.photos, self.work, self.features, self.device = settings, photos, work, features, device
        self.seen_through = seen_through
        self.trunk: Trunk | None = None
        self.tuning: TrunkTuning | None = None
        self.cell_classes: CellClasses | None = None  # beside the trunk, while that learns
        self.region_head: dict[str, Any] | None = None  # what `deecap train-regions` saved
        self.kept: KeptRegions | None = None
        self._kept_quantised = False
        self._files: RegionFiles | None = None
        given = self._read_boxes(data)
        if settings.data.region_features:
            self.feature_width = self._read_files(data / settings.data.region_features)
        elif seen_through:
            self._rows: PhotoRows | PhotoList = PhotoList(photos.sources)
            self.feature_width = seen_through.model.config.feature_width
        else:
            self.trunk = channels_last(imagenet_trunk().to(device))
            self._rows = rows = kept_rows(self.trunk, photos.sources, features)
            self.feature_width = HEAD_WIDTH
            self.tuning = self._tuning(self.trunk, rows, given)
        if settings.data.region_head:
            self.feature_width = self._read_region_head(work.parent / settings.data.region_head / "head.pt")

    def __call__(self, rows: Sequence[int], views: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """By the trunk as it is now, where the run has one."""
        mask: Tensor | None
        if self._files is not None:
            features, boxes, mask = self._files(rows)
        elif self.kept is not None:
            features, boxes, mask = self.kept(rows, views)
        else:
            assert self.trunk is not None
            assert isinstance(self._rows, PhotoRows)
            features = cells(self.trunk.top(self._rows.bottom(rows, views).to(self.device)))
            boxes, mask = boxes_for(len(rows)), None
        return features.to(self.device), boxes.to(self.device), None if mask is None else mask.to(self.device)

    def views(self, row: int) -> int:
        """How many views of the photo there are to draw from."""
        if self._files is not None:
            return 1
        return self._rows.views(row) if self.kept is None else min(self._rows.views(row), KEPT_VIEWS)

    def begin(self, stage: StageSettings) -> None:
        """Regions of all photos are kept for a stage that leaves alone what they come from."""
        if stage.tune_trunk_from >= 0 or self._files is not None:
            self.kept = None
        elif self.kept is None or stage.quantised_extractor != self._kept_quantised:
            # Else they are the last stage's, which left the trunk alone as well.
            self.kept = self._keep(stage.quantised_extractor)
            self._kept_quantised = stage.quantised_extractor

    # What a run saves of it --------------------------------------------------------------------------------------

    def modules(self, stage: StageSettings) -> dict[str, nn.Module]:
        """What may learn here, by the name that it is saved under.

        What is asked of the trunk's cells lives for the stages that teach it.
        """
        lessons = self.cell_classes if stage.cell_classes else None
        modules = {"trunk": self.trunk, "cell_classes": lessons}
        return {name: module for name, module in modules.items() if module is not None}

    def state(self, stage: StageSettings) -> dict[str, Any]:
        """The state of the modules, and what it means."""
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules(stage).items()}
        if self.cell_classes is not None and "cell_classes" in state:
            state["classes"] = list(self.cell_classes.given.classes)
        if self.region_head is not None:
            state["region_head"] = self.region_head
        return state

    def load(self, state: dict[str, Any], other_run: bool = False) -> None:
        """Of another run only the trunk. Raises `ValueError` where the state was made of other photos' regions."""
        if (self.trunk is None) != ("trunk" not in state) and self._files is None:
            raise ValueError("the saved model saw its photos through another extractor than this run's")
        if self.trunk is not None and self.region_head is None:
            self.trunk.load_state_dict(state["trunk"])
        if self.cell_classes is not None and "cell_classes" in state and not other_run:
            if state.get("classes") != list(self.cell_classes.given.classes):
                raise ValueError("the saved run's boxes are of other classes: choose another work folder")
            self.cell_classes.load_state_dict(state["cell_classes"])

    # How it begins ------------------------------------------------------------------------------------------------

    def _read_boxes(self, data: Path) -> GivenBoxes | None:
        """Those that a stage teaches, if one does."""
        if not any(stage.cell_classes for stage in self.settings.stages):
            return None
        path = data / self.settings.data.boxes
        given = read_boxes(path)
        if not count_with_boxes(given, [self.photos.all[row].name for row in self.photos.of("train")]):
            raise ValueError(f"{path} has boxes of none of the photos in the split train")
        return given

    def _read_files(self, path: Path) -> int:
        """The regions' F."""
        names, numbers = [photo.name for photo in self.photos.all], [photo.number for photo in self.photos.all]
        self._files = RegionFiles(path, names, numbers)
        return self._files.feature_width

    def _tuning(self, trunk: Trunk, rows: PhotoRows, given: GivenBoxes | None) -> TrunkTuning:
        beside: list[int] = []
        if given is not None:
            with torch.random.fork_rng(devices=[]):  # the captioner begins as it would without these lessons
                self.cell_classes = CellClasses(given, HEAD_WIDTH).to(self.device)
            beside = [row for row in self.photos.of("unlabelled") if self.photos.all[row].name in given.of]
            if len(beside) < (most := max(stage.cell_class_photos for stage in self.settings.stages)):
                raise ValueError(f"{len(beside)} photos without captions have boxes: cell_class_photos are {most}")
        return TrunkTuning(trunk, rows, self.cell_classes, beside)

    def _read_region_head(self, path: Path) -> int:
        """The regions' F."""
        if self.trunk is None or any(stage.tune_trunk_from >= 0 for stage in self.settings.stages):
            raise ValueError("a region head needs photos, and its trunk as it is: tune_trunk_from cannot be with it")
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: `deecap train-regions` first")
        self.region_head = torch.load(path, map_location="cpu", weights_only=True)
        head = load_region_head(self.region_head)
        self.trunk.load_state_dict(self.region_head["trunk"])
        return region_width(head.width, head.class_count)

    def _keep(self, quantised: bool) -> KeptRegions:
        if self.seen_through or self.region_head or quantised:
            path = self.work / KEPT if self.seen_through else self._extractor(quantised)
            threads = torch.get_num_threads()
            return KeptRegions.through_extractor(self._rows, self.photos.sources, path, self.features, threads)
        assert self.trunk is not None
        assert isinstance(self._rows, PhotoRows)
        return KeptRegions.through_trunk(self._rows, self.trunk, self.features)

    def _extractor(self, quantised: bool) -> Path:
        """The extractor as a file in the work folder, from where the bundle takes the one in int8."""
        assert self.trunk is not None
        path = self.work / (EXTRACTOR if quantised else f"float-{EXTRACTOR}")
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                whole = Path(folder) / EXTRACTOR
                write_extractor(self.trunk, self.region_head, self.settings.data.large_cells, whole)
                if quantised:
                    names = {self.photos.all[row].name for row in self.photos.of("train")[:RANGE_PHOTOS]}
                    wanted = [(source.folder, names & set(source.names)) for source in self.photos.sources]
                    pixels = [found for place, some in wanted if some for _, found in iterate_photos(place, some)]
                    quantise_extractor(whole, path, np.stack(pixels))
                else:
                    shutil.copyfile(whole, path)
        return path
