"""From a finished training run to a bundle: weights and extractor as they ship."""

from __future__ import annotations

import shutil
from pathlib import Path

from model.bottom_up.embedded import write_extractor
from model.bottom_up.trunk import Trunk
from model.bundle import EXTRACTOR, SPEEDS, save_model, write_json
from model.exits import TIERS, SpeedRow, SpeedTable
from model.training.from_bundle import KEPT
from model.training.settings import TrainSettings
from model.training.trained import read_stage, trained_network
from model.vocabulary import Vocabulary

UNMEASURED = "not measured: run `deecap calibrate`"


def write_bundle(settings: TrainSettings, work: Path, folder: Path) -> None:
    """Writes the last stage of the run in `work` as a bundle, whole but for a measured speed table and a model card.

    Until it is calibrated every tier runs at full depth. Raises `FileNotFoundError` when the run is not finished,
    `ValueError` when it was trained by another configuration, or on region features and so has no extractor.
    """
    state = read_stage(work / f"{settings.stages[-1].name}.pt")
    if settings.data.region_features:
        raise ValueError(f"{settings.name} was trained on region features: it has no extractor to put into a bundle")
    model, policy = trained_network(settings, state)
    save_model(folder, folder.name, model, Vocabulary(state["vocabulary"]), policy)
    if settings.seen_through:
        shutil.copyfile(work / KEPT, folder / EXTRACTOR)
    elif settings.stages[-1].quantised_extractor:
        shutil.copyfile(work / EXTRACTOR, folder / EXTRACTOR)
    else:
        trunk = Trunk()
        trunk.load_state_dict(state["trunk"])
        write_extractor(trunk, state.get("region_head"), settings.data.large_cells, folder / EXTRACTOR)
    only_row = SpeedRow(tau=0.0, speedup=1.0, executed_speedup=1.0, cider=0.0, describe_ms=0.0)
    table = SpeedTable((only_row,), dict.fromkeys(TIERS, 0.0), {"note": UNMEASURED})
    write_json(folder / SPEEDS, table.to_json())
