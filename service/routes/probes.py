"""What an orchestrator asks: `/livez`, `/startupz`, `/readyz`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.errors import Problem
from service.routes.caption_docs import NOT_READY, problem_responses
from service.routes.context import context_of
from service.schemas import StatusOut

router = APIRouter(tags=["operations"])


@router.get("/livez", summary="Does the process answer")
async def livez() -> StatusOut:
    """Says nothing of the model: a restart would not load it any faster."""
    return StatusOut()


@router.get("/startupz", summary="Has it started", responses=problem_responses("not_ready"))
async def startupz(request: Request) -> StatusOut:
    """Good once the model of this process has been loaded, or, for a front alone, its queue was reached; and from then
    on."""
    if not context_of(request).front.started:
        raise Problem("not_ready", "The service is starting.", retry_after=2)
    return StatusOut()


@router.get("/readyz", summary="Can it caption now", responses=problem_responses(*NOT_READY))
async def readyz(request: Request) -> StatusOut:
    """Good while captions, or the canaries between them, go through at a worker, and captions are taken."""
    context_of(request).front.check_ready()
    return StatusOut()
