"""`GET /v1/speeds` and `GET /v1/model`: what is served, and how fast it can be asked to be."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request

from model.exits import DEFAULT_SPEED, TIERS
from service.routes.caption_docs import NOT_READY, problem_responses
from service.routes.context import context_of
from service.schemas import ModelOut, RangeOut, SpeedRowOut, SpeedsOut, TierOut

router = APIRouter(tags=["model"], responses=problem_responses("unauthorized", *NOT_READY))


@router.get("/v1/speeds", summary="The speeds to choose from, as measured")
async def speeds(request: Request) -> SpeedsOut:
    """The tiers, the range of numbers, and the table behind both: threshold, SpeedUp, quality, milliseconds."""
    table = context_of(request).front.check_ready().speeds
    return SpeedsOut(
        default=DEFAULT_SPEED,
        tiers=[
            TierOut(name=name, target=target, tau=table.tiers[name], promised=table.resolve(name).promised)
            for name, target in TIERS.items()
        ],
        range=RangeOut(lowest=1.0, highest=table.fastest),
        table=[SpeedRowOut(**asdict(row)) for row in table.rows],
        measured=dict(table.measured),
    )


@router.get("/v1/model", summary="The model served")
async def model(request: Request) -> ModelOut:
    """Name, revision and sizes."""
    info = context_of(request).front.check_ready()
    return ModelOut(
        name=info.name,
        revision=info.revision,
        layers=info.layers,
        device=info.device,
        vocabulary_size=info.vocabulary_size,
    )
