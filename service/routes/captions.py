"""`POST /v1/captions`: many photos in, and for each a caption or the problem that it has."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service.errors import WENT_WRONG, Problem
from service.images import check_header_aside
from service.jobs import Job
from service.routes.asking import new_job, unless_gone
from service.routes.captions_docs import BATCH_OPENAPI, BATCH_RESPONSES
from service.routes.context import Context, context_of
from service.routes.reading_many import read_batch
from service.routes.telling import caption_document, since_arrival, told
from service.schemas import BatchOut

log = logging.getLogger(__name__)

SHARE = 4  # one in so many of the queue's places are the most that one request takes: others want some too

router = APIRouter()


@router.post(
    "/v1/captions",
    tags=["captions"],
    summary="Caption many photos in one request",
    response_model=BatchOut,
    responses=BATCH_RESPONSES,
    openapi_extra=BATCH_OPENAPI,
)
async def captions(request: Request) -> JSONResponse:
    """Send a form with a file `images` for each photo; the options hold for all of them.

    What became of each photo stands in `results`, in the order of the request: one that fails does not fail the others,
    and what is not ready by the deadline (`timeout_ms`) has the problem `deadline_exceeded`. So the status is 200 also
    where some, or all, could not be captioned.
    """
    context = context_of(request)
    model = context.front.check_ready()  # before the body: who cannot be served need not send it
    context.charge(request)
    settings = context.settings
    images, options = await read_batch(
        request, settings.max_batch_images, settings.max_batch_bytes, settings.timeout_ms / 1000
    )
    jobs = [new_job(request, model.speeds, image, options) for image in images]
    context.charge(request, len(jobs))
    places = asyncio.Semaphore(max(1, settings.depths[options.priority] // SHARE))
    batch = _Batch(request, context, places, options.regions)
    results = await unless_gone(request, batch.results(jobs))
    context.give_back(request, sum(item["status"] == 503 for item in results))
    return JSONResponse({"results": results, "request_id": request.state.request_id})


@dataclass(frozen=True)
class _Batch:
    """What the photos of one request share."""

    request: Request
    context: Context
    places: asyncio.Semaphore
    with_regions: bool

    async def results(self, jobs: list[Job]) -> list[dict[str, object]]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._result(index, job)) for index, job in enumerate(jobs)]
        return [task.result() for task in tasks]

    async def _result(self, index: int, job: Job) -> dict[str, object]:
        """A `BatchItemOut` as JSON. Raises nothing, or the neighbours would be stopped too."""
        request_id = self.request.state.request_id
        try:
            caption = await self._caption(job)
        except Problem as error:
            problem = error
        except Exception:
            log.exception("photo %d of a batch failed", index)
            problem = Problem("internal", WENT_WRONG)
        else:
            self.context.metrics.batch_image_done("ok")
            return {"index": index, "status": 200, "caption": caption, "problem": None, "retry_after": None}
        self.context.metrics.batch_image_done(problem.code)
        return {
            "index": index,
            "status": problem.kind.status,
            "caption": None,
            "problem": told(problem, request_id),
            "retry_after": problem.retry_after,
        }

    async def _caption(self, job: Job) -> dict[str, object]:
        """A `CaptionOut` as JSON. Raises `Problem`."""
        context = self.context
        if not job.image:
            raise Problem("missing_image", "The file is empty.")
        if len(job.image) > context.settings.max_body_bytes:
            raise Problem("body_too_large", f"At most {context.settings.max_body_bytes:,} bytes are taken for a photo.")
        await check_header_aside(job.image, context.limits)
        async with self.places:  # the others may hold all of them until the deadline
            answer = await context.front.caption(job)
        return caption_document(
            answer,
            self.request.state.request_id,
            with_regions=self.with_regions,
            seconds=since_arrival(self.request),
        )
