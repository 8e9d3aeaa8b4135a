"""What every route needs of its app, in one typed place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fastapi import FastAPI, Request

from service.errors import Problem
from service.images import ImageLimits
from service.inference import Engine, ModelInfo
from service.metrics import Metrics
from service.settings import Settings


@dataclass(frozen=True)
class Context:
    """One app's parts."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    limits: ImageLimits

    def install(self, app: FastAPI) -> None:
        app.state.context = self

    def ready_model(self) -> ModelInfo:
        """Raises `Problem` `not_ready` unless the engine can caption now."""
        info = self.engine.info
        if info is None:
            raise Problem("not_ready", "The model is being loaded.", retry_after=2)
        if not self.engine.ready:
            raise Problem("not_ready", "The model is loaded, but cannot caption at the moment.", retry_after=2)
        return info


def context_of(request: Request) -> Context:
    return cast(Context, request.app.state.context)
