"""What a training run is told: one TOML file, read into these classes, unknown names refused."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bottom_up.region_limits import BACKGROUND_SIDE
from model.config import DeeCapConfig
from model.exits import ExitPolicy

KINDS = ("backbone", "self_critical", "exits")
SHIPPED = Path(__file__).parent / "configs"
# Folders of the configurations that the paper's tables compare, and of those that are `small` with one choice changed.
COMPARED = ("systems", "ablations")


@dataclass(frozen=True)
class DataSettings:
    """Where the photos and captions are, relative to the data folder given on the command line."""

    captions: str  # Karpathy's JSON, or COCO's own
    photos: str  # folder of image files or tar archives, looked through with its sub-folders
    extra_captions: str = ""  # more captioned photos for the train split, in the same form
    extra_photos: str = ""
    unlabelled_photos: str = ""  # photos without captions, for `own_captions` and `cell_class_photos`
    region_head: str = ""  # run of `deecap train-regions` in the same work folder: its regions instead of grid cells
    large_cells: int = (
        BACKGROUND_SIDE  # with a region head: so many cells a side follow the regions; 9: all of the grid
    )
    boxes: str = ""  # of things found in the photos beforehand, for `cell_classes`; see docs/regions.md
    region_features: str = ""  # in place of photos: folder of `.npz`, M2's `.hdf5`, or bottom-up attention's `.tsv`


@dataclass(frozen=True)
class StageSettings:
    """One stage of training. What a kind does not use is left at its default."""

    name: str
    kind: str
    epochs: int
    learning_rate: float
    backbone_learning_rate: float = 0.0  # exits: of all but exits, imitators and gate; 0: the same
    final_learning_rate: float = 0.0  # end of the cosine; with `decay_every` not used
    decay_every: int = 0  # epochs; 0: cosine. The paper: times 0.9 every five epochs
    decay: float = 0.9
    warmup_steps: int = 0
    batch_images: int = 16
    captions_per_image: int = 5
    label_smoothing: float = 0.0
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    patience: int = 3  # epochs without a better validation CIDEr until the stage ends
    tune_trunk_from: int = -1  # epoch from which the upper trunk learns too; -1: never
    trunk_learning_rate: float = 0.0
    smallest_window: float = 1.0  # while the trunk learns: side of the part of a photo's map that is zoomed into
    cell_classes: float = 0.0  # while the trunk learns: weight of telling the classes of `boxes` in each cell
    cell_class_photos: int = 0  # photos without captions that are asked for these beside the batch's own
    hidden_regions: float = 0.0  # the largest share of a photo's regions that are hidden, drawn photo by photo
    shallow_exit_weight: float = 0.0  # backbone, self_critical: of one sampled exit m < N, read as h_m
    lambda_: float = 0.5  # exits: equation 11
    distillation: float = 0.0  # exits: weight of the KL divergence from the final exit, which it does not move
    own_captions: float = 0.0  # exits: share of the targets that are the starting model's own beam captions
    copied_states: float = 0.0  # exits: share of captions with words whose h_1 stands in for their deeper states
    freeze_layers: bool = True  # exits: section 3.4's per-step freezing
    freeze_backbone: bool = False  # exits: nothing but exits, imitators and gate learns
    quantised_extractor: bool = False  # exits: on regions as the int8 extractor sees them, which then ships


@dataclass(frozen=True)
class TrainSettings:
    """A whole run: data, model, stages in order."""

    name: str
    seed: int
    data: DataSettings
    model: dict[str, Any]  # `DeeCapConfig` without vocabulary and feature sizes, which come from the data
    stages: tuple[StageSettings, ...]
    exit_policy: ExitPolicy | None = None  # of the bundle; None: every layer tested, nothing copied
    budget: str = ""  # what the run may be compared with: runs of one budget saw the same data for as long
    starts_from: str = ""  # `<run>/<stage>` in the same work folder, whose model and trunk this run goes on from
    starts_from_bundle: str = ""  # folder, or name of one that ships: this run goes on from its model, words, extractor
    extractor_of_bundle: str = ""  # folder, or name of one that ships: whose extractor sees the photos, and stays
    views: int = 4  # of each photo: whole, mirrored, cropped, cropped and mirrored
    average_decay: float = 0.999  # of the exponential moving average of the weights, which is what is kept
    least_count: int = 5  # times a word must be seen
    validation_batch: int = 100

    @property
    def seen_through(self) -> str:
        """The bundle whose extractor sees the photos; "" where the run has its own, or reads regions from files."""
        return self.starts_from_bundle or self.extractor_of_bundle


def _build(kind: type, data: dict[str, Any], where: str) -> Any:
    names = {item.name.rstrip("_"): item.name for item in dataclasses.fields(kind)}
    unknown = set(data) - set(names)
    if unknown:
        raise ValueError(f"{where}: unknown setting {', '.join(sorted(unknown))}")
    try:
        return kind(**{names[name]: value for name, value in data.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _shipped(name: str) -> tuple[Path, ...]:
    """Where a configuration of this name may be among those that ship."""
    return SHIPPED / f"{name}.toml", *(SHIPPED / folder / f"{name}.toml" for folder in COMPARED)


def _read_with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Tables are merged name by name; all else, a list of stages too, stands in place of the base's.

    `[change.NAME]` is merged into the base's stage NAME.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    base = raw.pop("base", None)
    if base is None:
        if "change" in raw:
            raise ValueError(f"{path}: without a base there is no stage to change")
        return raw
    beside = path.parent / f"{base}.toml"
    found = next((place for place in (beside, *_shipped(base)) if place.is_file()), None)
    if found is None:
        raise ValueError(f"{path}: there is no {beside.name} beside it to be its base, nor among those that ship")
    if found in (*above, path):
        raise ValueError(f"{path}: base {base!r} goes round in a circle")
    if "name" not in raw:
        raise ValueError(f"{path}: a name of its own is needed, or it would work in its base's folder")
    merged = _read_with_base(found, (*above, path))
    if "change" in raw and "stage" in raw:
        raise ValueError(f"{path}: [change.NAME] and [[stage]] are two ways to say the same: one of them")
    changed = raw.pop("change", {})
    if not isinstance(changed, dict) or not all(isinstance(value, dict) for value in changed.values()):
        raise ValueError(f"{path}: what is to change of a stage stands under [change.NAME]")
    stages = {stage.get("name"): stage for stage in merged.get("stage", [])}
    for name, value in changed.items():
        if name not in stages:
            raise ValueError(f"{path}: the base has no stage {name!r} to change")
        stages[name].update(value)
    for name, value in raw.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def read_settings(path: Path) -> TrainSettings:
    """A TOML file's settings. With `base = "other"` they are those of `other.toml`, but for what it says.

    The base is beside the file, or else one that ships.

    Raises `ValueError` naming what is wrong in the file, `FileNotFoundError` when it is not there.
    """
    raw = _read_with_base(path, ())
    stages = []
    for number, stage in enumerate(raw.pop("stage", []), start=1):
        built = _build(StageSettings, stage, f"{path}, stage {number}")
        if built.kind not in KINDS:
            raise ValueError(f"{path}, stage {number}: kind must be one of {', '.join(KINDS)}")
        try:
            _check_stage(built)
        except ValueError as error:
            raise ValueError(f"{path}, stage {number}: {error}") from error
        stages.append(built)
    if not stages:
        raise ValueError(f"{path}: no [[stage]]")
    names = [stage.name for stage in stages]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: two stages of the same name: {', '.join(sorted(twice))}")
    if counted := {"vocabulary_size", "feature_width"} & set(raw.get("model", {})):
        raise ValueError(f"{path}, [model]: {', '.join(sorted(counted))}: what the data has is not to be told")
    try:
        DeeCapConfig.from_json({**raw.get("model", {}), "vocabulary_size": 1, "feature_width": 1})
    except ValueError as error:
        raise ValueError(f"{path}, [model]: {error}") from error
    data = _build(DataSettings, raw.pop("data", {}), f"{path}, [data]")
    if policy := raw.pop("exit_policy", None):
        try:
            raw["exit_policy"] = ExitPolicy.from_json(policy)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, [exit_policy]: {error}") from error
    if any(stage.cell_classes for stage in stages) != bool(data.boxes):
        raise ValueError(f"{path}, [data]: boxes are for stages with cell_classes, which need them")
    if data.region_features and any(stage.own_captions or stage.tune_trunk_from >= 0 for stage in stages):
        raise ValueError(f"{path}: region_features leave no trunk to tune and no photos to draw own captions for")
    if any(stage.cell_class_photos for stage in stages) and not data.unlabelled_photos:
        raise ValueError(f"{path}, [data]: cell_class_photos need unlabelled_photos")
    for name in ("starts_from_bundle", "extractor_of_bundle"):
        if raw.get(name):
            _check_seen_through_bundle(path, name, raw, data, stages)
    if raw.get("starts_from_bundle"):
        raw.setdefault("model", {})
    return _build(TrainSettings, {**raw, "data": data, "stages": tuple(stages)}, str(path))


def _check_stage(stage: StageSettings) -> None:
    """Raises `ValueError` for what a stage cannot be told, or not together."""
    tunes = stage.tune_trunk_from >= 0
    if not 0 <= stage.lambda_ <= 1:
        raise ValueError("lambda must be from 0 to 1")
    if stage.patience < 1 or stage.epochs < 1:
        raise ValueError("patience and epochs must be 1 or more")
    if stage.kind == "self_critical" and stage.captions_per_image < 2:
        raise ValueError("captions_per_image must be 2 or more, one being the others' bar")
    if stage.quantised_extractor and tunes:
        raise ValueError("a quantised extractor cannot be tuned")
    if not 0 < stage.smallest_window <= 1 or not 0 <= stage.hidden_regions < 1:
        raise ValueError("smallest_window must be above 0 and at most 1, hidden_regions from 0 to below 1")
    if stage.cell_classes < 0 or stage.cell_class_photos < 0:
        raise ValueError("cell_classes and cell_class_photos cannot be below 0")
    if (stage.cell_classes or stage.smallest_window < 1) and not tunes:
        raise ValueError("cell_classes and smallest_window are for a trunk that learns")
    if stage.tune_trunk_from >= stage.epochs:
        raise ValueError("tune_trunk_from is an epoch, counted from 0, that the stage does not have")
    if stage.cell_class_photos and not stage.cell_classes:
        raise ValueError("cell_class_photos are for cell_classes")
    if stage.kind == "self_critical" and stage.cell_classes:
        raise ValueError("a self-critical stage teaches no cell_classes")


def _check_seen_through_bundle(
    path: Path, told: str, raw: dict[str, Any], data: DataSettings, stages: Sequence[StageSettings]
) -> None:
    """Raises `ValueError` for what cannot be with a bundle's extractor, which is a graph and does not learn."""
    other = [name for name in ("region_features", "region_head") if getattr(data, name)]
    if told == "starts_from_bundle":
        other += [name for name in ("starts_from", "extractor_of_bundle") if raw.get(name)]
    if other:
        raise ValueError(f"{path}: {told} and {other[0]}: one of them")
    for stage in stages:
        if stage.tune_trunk_from >= 0 or stage.quantised_extractor:
            raise ValueError(f"{path}, stage {stage.name}: a bundle's extractor stays as it is")


def find_settings(config: Path) -> TrainSettings:
    """`read_settings` of a file, or of a configuration that ships, by its name.

    Raises `ValueError` for a file with mistakes, `FileNotFoundError` naming those that ship when there is none.
    """
    for path in (config, *_shipped(str(config))):
        if path.is_file():
            return read_settings(path)
    names = ", ".join(sorted(path.stem for path in SHIPPED.rglob("*.toml")))
    raise FileNotFoundError(f"no configuration {config}: give a TOML file or one of {names}")
