"""The network and the exit policy that the checkpoint of a finished stage holds, as the configuration has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.exits import ExitPolicy
from model.training.from_bundle import network_like
from model.training.settings import TrainSettings


def read_stage(path: Path) -> dict[str, Any]:
    """Raises `FileNotFoundError` where training has not come so far."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the run has not finished; `deecap train` goes on with it")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def trained_network(settings: TrainSettings, state: dict[str, Any]) -> tuple[DeeCap, ExitPolicy]:
    """Where the configuration says no policy: the one of the bundle that the run went on from, or the paper's, every
    layer tested and nothing copied. Raises `ValueError` for a stage that was trained by another configuration."""
    words = len(state["vocabulary"])
    try:
        if start := state.get("started_from"):
            config = network_like(DeeCapConfig.from_json(start["config"]), settings.model, words)
        else:
            width = len(state["model"]["feature_norm.weight"])
            config = DeeCapConfig.from_json({**settings.model, "vocabulary_size": words, "feature_width": width})
        model = DeeCap(config)
        model.load_state_dict(state["model"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"what was trained is not of this configuration: {error}") from error
    own = ExitPolicy(()) if model.config.exits == "final" else ExitPolicy.every_layer(model.layers)
    policy = settings.exit_policy or (ExitPolicy.from_json(start["exit_policy"]) if start else own)
    policy.validate(model.layers)
    return model, policy
