"""What an orchestrator asks: `/livez`, `/startupz`, `/readyz`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.errors import Problem
from service.routes.caption_docs import problem_responses
from service.routes.context import context_of
from service.schemas import StatusOut

router = APIRouter(tags=["operations"])


@router.get("/livez", summary="Does the process answer")
async def livez() -> StatusOut:
    """Says nothing of the model: a restart would not load it any faster."""
    return StatusOut()


@router.get("/startupz", summary="Has the model been loaded", responses=problem_responses("not_ready"))
async def startupz(request: Request) -> StatusOut:
    """Good once the first caption went through, and from then on."""
    if context_of(request).engine.info is None:
        raise Problem("not_ready", "The model is being loaded.", retry_after=2)
    return StatusOut()


@router.get("/readyz", summary="Can it caption now", responses=problem_responses("not_ready"))
async def readyz(request: Request) -> StatusOut:
    """Good while captions go through."""
    context_of(request).ready_model()
    return StatusOut()
