"""`POST /v1/caption`: a photo in, a caption out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from model.exits import ResolvedSpeed, SpeedTable, UnknownSpeedError
from service.errors import Problem
from service.images import check_header
from service.jobs import Answer, Job
from service.routes.caption_docs import OPENAPI, RESPONSES
from service.routes.context import context_of
from service.routes.reading import read_request
from service.schemas import CaptionOptions, CaptionOut, ModelName, RegionOut, SpeedOut, TimingsOut, WordOut
from service.worker_metrics import speed_label

router = APIRouter()

T = TypeVar("T")

_STAGES = {"decode_image": "decode"}  # in Server-Timing, where browsers show the names


@router.post("/caption", include_in_schema=False)
@router.post(
    "/v1/caption",
    tags=["captions"],
    summary="Caption a photo at a chosen speed",
    response_model=CaptionOut,
    responses=RESPONSES,
    openapi_extra=OPENAPI,
)
async def caption(request: Request) -> JSONResponse:
    """Send the photo as the body, as the file `image` of a form, or in base64 in JSON.

    The options are the same in all three; a query string works with each of them.
    """
    context = context_of(request)
    model = context.front.check_ready()  # before the body: who cannot be served need not send it
    context.charge(request)
    settings = context.settings
    image, options = await read_request(request, settings.max_body_bytes, settings.timeout_ms / 1000)
    job = new_job(request, model.speeds, image, options)
    await asyncio.to_thread(check_header, image, context.limits)  # before it takes a place in the queue
    answer = await unless_gone(request, context.front.caption(job))
    document = _document(request, answer, options.regions)
    timing = ", ".join(f"{_STAGES.get(name, name)};dur={ms}" for name, ms in document.timings_ms)
    left_out = None if options.regions else {"regions"}
    return JSONResponse(document.model_dump(mode="json", exclude=left_out), headers={"Server-Timing": timing})


def new_job(request: Request, table: SpeedTable, image: bytes, options: CaptionOptions) -> Job:
    """The job that the request asks for, its speed told to the metrics. Raises `Problem` for options that cannot be."""
    context = context_of(request)
    longest = context.settings.timeout_ms
    if options.timeout_ms is not None and options.timeout_ms > longest:
        raise Problem("invalid_option", f"timeout_ms: at most {longest}")
    request.state.speed = speed_label(resolve(table, options))
    left = request.state.arrived + (options.timeout_ms or longest) / 1000 - time.monotonic()
    return Job(
        id=uuid.uuid4().hex,
        image=image,
        speed=options.speed,
        tau=options.tau,
        beam=options.beam,
        priority=options.priority,
        deadline=context.front.clock() + left,
        request_id=request.state.request_id,
        traceparent=request.state.traceparent,
    )


def resolve(table: SpeedTable, options: CaptionOptions) -> ResolvedSpeed:
    """What the asked speed comes to. Raises `Problem` `unknown_speed` or `invalid_option` (the bounds crossed)."""
    try:
        asked = table.resolve(options.speed, options.tau)
        # τ and not the promise: two speeds beyond a plateau of the table promise the same.
        lowest = 0.0 if options.min_speed is None else table.resolve(options.min_speed).tau
        if options.max_speed is not None and table.resolve(options.max_speed).tau < lowest:
            raise Problem("invalid_option", "min_speed: must not be above max_speed")
    except UnknownSpeedError as error:
        raise Problem("unknown_speed", str(error)) from error
    return asked


async def unless_gone(request: Request, doing: Coroutine[Any, Any, T]) -> T:
    """What `doing` comes to. Cancels it and raises `Problem` `client_gone` when the client closes the connection.

    The body must have been read.
    """
    work = asyncio.ensure_future(doing)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise Problem("client_gone", "The client closed the connection.")
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    """Returns when the client closes the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _document(request: Request, answer: Answer, with_regions: bool) -> CaptionOut:
    caption, times = answer.caption, answer.timings
    return CaptionOut(
        caption=caption.text,
        confidence=caption.confidence,
        words=[WordOut(text=word.text, exit_layer=word.exit_layer, entropy=word.entropy) for word in caption.words],
        speed=SpeedOut(
            requested=caption.speed.requested,
            tier=caption.speed.tier,
            tau=caption.speed.tau,
            promised=caption.speed.promised,
        ),
        speedup=caption.speedup,
        timings_ms=TimingsOut(
            queue=_ms(times.queue),
            decode_image=_ms(times.decode_image),
            look=_ms(times.look),
            describe=_ms(times.describe),
            total=_ms(time.monotonic() - request.state.arrived),
        ),
        model=ModelName(name=answer.model, revision=answer.revision),
        request_id=request.state.request_id,
        regions=[RegionOut(box=box) for box in answer.boxes] if with_regions else None,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
