"""Asynchronous jobs (RFC 7240 `respond-async`): 202 with an address, and what is to be found there, later."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.broker.base import Found
from service.errors import Problem
from service.jobs import Answer, Job
from service.routes.context import context_of
from service.routes.jobs_docs import DELETE_RESPONSES, GET_RESPONSES
from service.routes.preferences import RESPOND_ASYNC
from service.routes.telling import caption_document, told
from service.schemas import CaptionOptions, JobOut

ASK_AGAIN_SECONDS = 1  # Retry-After of a job that is not done

router = APIRouter(tags=["jobs"])

_ID = re.compile(r"[0-9a-f]{40}")
_OWN, _MARK = 24, 16  # digits of an id: the first are the job's own, the last say whose it is


@dataclass(frozen=True)
class _Note:
    """What is kept with the job, and found again with it."""

    fingerprint: str = ""  # of the request; "" where it is not known
    request_id: str = ""  # under which the caption is in the logs
    regions: bool = False  # whether they were asked for

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> _Note:
        """Of the note of a front of another version: what is known of it."""
        try:
            said = json.loads(text)
            return cls(str(said["fingerprint"]), str(said["request_id"]), bool(said["regions"]))
        except (ValueError, KeyError, TypeError):
            return cls()


async def answer_later(request: Request, job: Job, options: CaptionOptions, key: str | None) -> JSONResponse:
    """Enqueues the job and answers 202. `key` is the client's own name for it: the job of a key is made once.

    Raises `Problem`: those of the queue, and `key_reused` where the key was given to another request.
    """
    context = context_of(request)
    owner = owner_of(request)
    note = _Note(_fingerprint(job.image, options), request.state.request_id, options.regions)
    job = replace(job, id=new_id(owner, key), kept=context.settings.job_kept_s, note=note.to_text())
    found = None if key is None else await context.front.find(job.id)
    if found is None:
        # Of two requests of one key at the same time, the queue takes one, and it is found by both.
        await context.front.enqueue(job)
        with suppress(Problem):  # it is taken, whether or not the store still answers
            found = await context.front.find(job.id)
    found = found or Found("queued", note=job.note)
    if key is not None and _Note.read(found.note).fingerprint not in ("", note.fingerprint):
        raise Problem("key_reused", "Idempotency-Key: it named a request with another photo or other options before.")
    request.state.outcome = "accepted"  # told apart from captions, which take longer
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": RESPOND_ASYNC}
    return _told(job.id, found, request, 202, headers)


@router.get(
    "/v1/jobs/{id}",
    summary="What became of an asynchronous job",
    response_model=JobOut,
    responses=GET_RESPONSES,
)
async def find_job(request: Request, id: str) -> JSONResponse:
    """A job is `queued`, `running`, `done` (with its `result`) or `failed` (with its `problem`).

    It can be found for DEECAP_JOB_KEPT_S after it ended. A job of one API key is nothing to any other.
    """
    _check_owner(request, id)
    found = await context_of(request).front.find(id)
    if found is None:
        raise _unknown()
    return _told(id, found, request)


@router.delete(
    "/v1/jobs/{id}",
    summary="Cancel an asynchronous job, or forget it",
    status_code=204,
    response_class=Response,
    responses=DELETE_RESPONSES,
)
async def delete_job(request: Request, id: str) -> Response:
    """One that waits is not captioned, one that is being captioned is stopped, and one that is done is forgotten."""
    _check_owner(request, id)
    front = context_of(request).front
    if await front.find(id) is None:
        raise _unknown()
    await front.give_up(id)
    return Response(status_code=204)


def owner_of(request: Request) -> str:
    """The name of the request's API key; "" where nobody needs one."""
    return getattr(request.state, "key", None) or ""


def new_id(owner: str, key: str | None = None) -> str:
    """An id that nobody can guess, or, with a `key`, the one of that key and owner; 160 bits in hexadecimal.

    Whose it is can be told from the id, so that a front that never heard of the job knows it too.
    """
    own = uuid.uuid4().hex[:_OWN] if key is None else _digest("key", owner, key)[:_OWN]
    return own + _mark(own, owner)


def is_of(owner: str, id: str) -> bool:
    """Whether a job with this id can be the owner's."""
    return bool(_ID.fullmatch(id)) and id[_OWN:] == _mark(id[:_OWN], owner)


def _mark(own: str, owner: str) -> str:
    return _digest("owner", owner, own)[:_MARK]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _fingerprint(image: bytes, options: CaptionOptions) -> str:
    """Equal for equal requests, also at a front that knows more options, or has them in another order."""
    said = json.dumps(options.model_dump(exclude_defaults=True), sort_keys=True)
    digest = hashlib.sha256(said.encode() + b"\0")
    digest.update(image)
    return digest.hexdigest()[:32]


def _check_owner(request: Request, id: str) -> None:
    """Raises `Problem` `unknown_job` for another's job, and for what is none."""
    if not is_of(owner_of(request), id):
        raise _unknown()


def _unknown() -> Problem:
    return Problem("unknown_job", "No job has this id: it was cancelled, or is no longer kept, or never was.")


def _told(
    id: str, found: Found, request: Request, status: int = 200, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A `JobOut`."""
    note = _Note.read(found.note)
    said: dict[str, Any] = {"id": id, "state": found.state, "position": found.position, "result": None, "problem": None}
    more = dict(headers or {})
    if found.reply is None:
        more["Retry-After"] = str(ASK_AGAIN_SECONDS)
    elif isinstance(found.reply.outcome, Answer):
        request_id = note.request_id or request.state.request_id
        said["result"] = caption_document(found.reply.outcome, request_id, with_regions=note.regions)
    else:
        request_id = note.request_id or request.state.request_id
        said |= {"state": "failed", "problem": told(found.reply.outcome.to_problem(), request_id)}
    return JSONResponse(said, status, headers=more)
