"""From a finished training run to a bundle: weights and extractor as they ship."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from model.bottom_up.embedded import write_extractor
from model.bottom_up.trunk import Trunk
from model.bundle import EXTRACTOR, SPEEDS, save_model, write_json
from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.exits import TIERS, ExitPolicy, SpeedRow, SpeedTable
from model.training.settings import TrainSettings
from model.vocabulary import Vocabulary

UNMEASURED = "not measured: run `deecap calibrate`"


def write_bundle(settings: TrainSettings, work: Path, folder: Path) -> None:
    """Writes the last stage of the run in `work` as a bundle, whole but for a measured speed table and a model card.

    Until it is calibrated every tier runs at full depth. Raises `FileNotFoundError` when the run is not finished,
    `ValueError` when it was trained on region features and so has no extractor.
    """
    last = work / f"{settings.stages[-1].name}.pt"
    if not last.exists():
        raise FileNotFoundError(f"{last} is not there: the run has not finished; `deecap train` goes on with it")
    state = torch.load(last, map_location="cpu", weights_only=True)
    if settings.data.region_features:
        raise ValueError(f"{settings.name} was trained on region features: it has no extractor to put into a bundle")
    vocabulary = Vocabulary(state["vocabulary"])
    model = DeeCap(DeeCapConfig.from_json(state["config"]))
    model.load_state_dict(state["model"])
    policy = settings.exit_policy or ExitPolicy.from_json(state["exit_policy"])
    policy.validate(model.layers)
    save_model(folder, folder.name, model, vocabulary, policy)
    if settings.stages[-1].quantised_extractor or settings.starts_from_bundle:
        shutil.copyfile(work / EXTRACTOR, folder / EXTRACTOR)
    else:
        trunk = Trunk()
        trunk.load_state_dict(state["trunk"])
        write_extractor(trunk, state.get("region_head"), settings.data.large_cells, folder / EXTRACTOR)
    only_row = SpeedRow(tau=0.0, speedup=1.0, executed_speedup=1.0, cider=0.0, describe_ms=0.0)
    table = SpeedTable((only_row,), dict.fromkeys(TIERS, 0.0), {"note": UNMEASURED})
    write_json(folder / SPEEDS, table.to_json())
