"""The exponential moving average of the weights: what is validated and kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages the state of modules; the decay rises from 0 in the first steps, so that the start is forgotten."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules = modules
        self.decay = decay
        self.steps = 0
        self.values = {name: _copy(module) for name, module in modules.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, module in self.modules.items():
            kept = self.values[name]
            now = module.state_dict()
            torch._foreach_lerp_(list(kept.values()), [now[key].float() for key in kept], 1 - decay)

    def swap(self) -> None:
        """Puts the average into the modules and what was there here; call it twice to have things as they were."""
        for name, module in self.modules.items():
            current = _copy(module)
            module.load_state_dict(self.values[name])
            self.values[name] = current

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ValueError` for an average of other modules."""
        if set(state["values"]) != set(self.values):
            raise ValueError(f"the average is of {sorted(state['values'])}, not {sorted(self.values)}")
        self.steps = int(state["steps"])
        for name, values in state["values"].items():
            for key, value in values.items():
                self.values[name][key].copy_(value)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone().float() for key, value in module.state_dict().items()}
