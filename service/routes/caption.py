"""`POST /v1/caption`: a photo in, a caption out: at once, word by word, or later."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.images import check_header_aside
from service.jobs import Job
from service.routes.asking import new_job, unless_gone
from service.routes.caption_docs import OPENAPI, RESPONSES
from service.routes.context import Context, context_of
from service.routes.jobs import answer_later, new_id, owner_of
from service.routes.preferences import idempotency_key, prefers_later, wants_events
from service.routes.reading import read_request
from service.routes.streams import answer_in_words
from service.routes.telling import caption_document, since_arrival
from service.schemas import CaptionOptions, CaptionOut

router = APIRouter()

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
async def caption(request: Request) -> Response:
    """Send the photo as the body, as the file `image` of a form, or in base64 in JSON.

    The options are the same in all three; a query string works with each of them.

    With `Accept: text/event-stream` the words come as they are decided, as server-sent events; with
    `Prefer: respond-async` the answer is 202, and the caption is at `/v1/jobs/{id}` later.
    """
    context = context_of(request)
    model = context.front.check_ready()  # before the body: who cannot be served need not send it
    key, events = idempotency_key(request), wants_events(request)
    later = prefers_later(request) and not events  # a preference may be passed over, and `Accept` not
    if later and key is not None:
        request.state.named_job = new_id(owner_of(request), key)
    context.charge(request)
    settings = context.settings
    image, options = await read_request(request, settings.max_body_bytes, settings.timeout_ms / 1000)
    longest_ms = settings.job_timeout_s * 1000 if later else None
    job = new_job(request, model.speeds, image, options, longest_ms=longest_ms)
    await check_header_aside(image, context.limits)  # before it takes a place in the queue
    if later:
        return await answer_later(request, job, options, key)
    if events:
        return await answer_in_words(request, job, options)
    return await _answer_at_once(request, context, job, options)


async def _answer_at_once(request: Request, context: Context, job: Job, options: CaptionOptions) -> JSONResponse:
    answer = await unless_gone(request, context.front.caption(job))
    document = caption_document(
        answer, request.state.request_id, with_regions=options.regions, seconds=since_arrival(request)
    )
    timing = ", ".join(f"{_STAGES.get(name, name)};dur={ms}" for name, ms in document["timings_ms"].items())
    return JSONResponse(document, headers={"Server-Timing": timing})
