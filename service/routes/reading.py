"""From a request's body to the image's bytes and the options: raw, multipart/form-data (RFC 7578) and JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.errors import Problem, printable
from service.jobs import PRIORITIES, Priority
from service.routes.context import Context, context_of
from service.schemas import CaptionOptions, read_options

IMAGE = "image"
# curl --data-binary says x-www-form-urlencoded unless told otherwise; many clients say octet-stream, or nothing.
_RAW_TYPES = {"", "application/octet-stream", "application/x-www-form-urlencoded"}
_MAX_FIELDS = 32  # as many as there are options, and some to tell people what is wrong with theirs
_MAX_FIELD_BYTES = 10_000
_INLINE_JSON = 50_000  # bytes: 0.3 ms, and a thread costs 0.1 and its turn; larger bodies would make others wait

_TYPE_HELP = "Send an image as the body, multipart/form-data with a file `image`, or JSON with `image` in base64."
Pairs = list[tuple[str, object]]


@dataclass(frozen=True)
class FormLimits:
    """What a form may hold."""

    names: tuple[str, ...]  # of its files; the first is the one that people are told of
    max_files: int
    too_many: Problem  # for more files than that
    max_bytes: int  # of the whole body
    seconds: float  # until all of it must be there
    help: str  # how to send one


async def read_request(request: Request, max_bytes: int, seconds: float) -> tuple[bytes, CaptionOptions]:
    """The image as it came and the options of the query and the body together.

    `seconds` bounds the body's arrival. Raises `Problem` for everything that is wrong but the image itself.
    """
    kind = _media_type(request)
    pairs: Pairs = list(request.query_params.multi_items())
    if kind == "multipart":
        image, more = await _from_multipart(request, max_bytes, seconds)
        return image, read_options(pairs + more)
    default: Priority | None = "interactive" if kind == "raw" else None  # others may say it in the body
    body = await read_body(request, max_bytes, seconds, priority_asked(request, default))
    if not body:
        raise Problem("empty_body", _TYPE_HELP)
    if kind == "raw":
        return body, read_options(pairs)
    image, more = _from_json(body) if len(body) <= _INLINE_JSON else await asyncio.to_thread(_from_json, body)
    return image, read_options(pairs + more)


def priority_asked(request: Request, otherwise: Priority | None = None) -> Priority | None:
    """Of the query; the body, which may say it too, is not there yet."""
    asked = request.query_params.get("priority")
    return next((priority for priority in PRIORITIES if priority == asked), otherwise)


async def read_body(request: Request, max_bytes: int, seconds: float, priority: Priority | None = None) -> bytes:
    """The whole body. Raises `Problem`: `body_timeout`, and as `chunks` does."""
    body = bytearray()
    async with body_within(seconds):
        async for chunk in chunks(request, max_bytes, priority):
            body += chunk
    return bytes(body)


@asynccontextmanager
async def body_within(seconds: float) -> AsyncGenerator[None, None]:
    """Raises `Problem` `body_timeout` where what is done within takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Problem("body_timeout", f"The body was not there after {seconds:g} seconds.") from error


async def chunks(request: Request, max_bytes: int, priority: Priority | None = None) -> AsyncGenerator[bytes, None]:
    """The body as it comes, none of it empty. `priority`: of the photos in it, where that is known already.

    Its bytes count as held until the request is over. Raises `Problem`: `overloaded` where there is no place in the
    queue or no room for the body, before it is sent if that can be known; `body_too_large` as soon as more than
    `max_bytes` are announced or counted; `client_gone`.
    """
    context = context_of(request)
    length = request.headers.get("content-length", "")
    announced = int(length[:20]) if length.isdecimal() else 0
    too_large = Problem("body_too_large", f"At most {max_bytes:,} bytes are taken.")
    if announced > max_bytes:
        raise too_large
    await _check_room(request, context, priority)
    upload = request.state.upload = context.uploads.begin(announced)
    count = 0
    try:
        async for chunk in request.stream():
            count += len(chunk)
            if count > max_bytes:  # the announcement spares the upload; the count is what holds
                raise too_large
            upload.add(len(chunk))
            if chunk:
                yield chunk
    except ClientDisconnect as error:
        raise Problem("client_gone", "The connection closed before the body was complete.") from error


async def _check_room(request: Request, context: Context, priority: Priority | None) -> None:
    """Raises `Problem` as the front's `check_room` does, but for a job that is known by its `Idempotency-Key`: it waits
    already, or is done.
    """
    try:
        await context.front.check_room(context.settings.depths, priority)
    except Problem as problem:
        job = getattr(request.state, "named_job", None)
        if problem.code != "overloaded" or job is None or await context.front.find(job) is None:
            raise


def refuse_encoded(request: Request) -> None:
    """Raises `Problem` `unsupported_media_type` for a compressed body: photos are compressed already."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise Problem("unsupported_media_type", f"Content-Encoding {printable(coding)} is not taken: send it plain.")


def _media_type(request: Request) -> str:
    """`raw`, `multipart` or `json`. Raises `Problem` `unsupported_media_type`."""
    refuse_encoded(request)
    declared = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if declared == "multipart/form-data":
        return "multipart"
    if declared == "application/json":
        return "json"
    if declared in _RAW_TYPES or declared.startswith("image/"):
        return "raw"
    raise Problem("unsupported_media_type", f"Content-Type {printable(declared)} is not taken. {_TYPE_HELP}")


async def parse_form(request: Request, limits: FormLimits) -> tuple[list[bytes], Pairs]:
    """The photos of a form, as they came, and its other fields.

    Parsed as it comes, a millisecond at a time at most, so that the bytes are there once and nobody else waits. Raises
    `Problem` for what is wrong with it, and as `chunks` does; no photo, and an empty one, are for the caller to judge.
    """
    empty = True

    async def body() -> AsyncGenerator[bytes, None]:
        nonlocal empty
        async for chunk in chunks(request, limits.max_bytes, priority_asked(request)):
            empty = False
            yield chunk
        if empty:
            raise Problem("empty_body", limits.help)

    parser = MultiPartParser(
        request.headers,
        body(),
        max_files=limits.max_files + 1,  # the parser's own words for too many are no help
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    parser.spool_max_size = limits.max_bytes + 1  # stays in memory: the disk may be read-only
    try:
        async with body_within(limits.seconds):
            form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise limits.too_many from error
        raise Problem("malformed_multipart", printable(error.message, 200)) from error
    except ValueError as error:  # an odd charset or boundary
        raise Problem("malformed_multipart", "The header Content-Type is broken.") from error
    images: list[bytes] = []
    pairs: Pairs = []
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            if name in limits.names:
                raise Problem("missing_image", f"The field `{name}` must be a file: curl -F {name}=@photo.jpg")
            pairs.append((name, value))
        elif name in limits.names:
            images.append(await value.read())
            await value.close()  # one copy is enough
        else:
            only = limits.names[0]
            raise Problem("unknown_option", f"No file is taken in the field {printable(name)}; only in `{only}`.")
    if len(images) > limits.max_files:
        raise limits.too_many
    return images, pairs


async def _from_multipart(request: Request, max_bytes: int, seconds: float) -> tuple[bytes, Pairs]:
    too_many = Problem("repeated_field", "One `image` per request.")
    images, pairs = await parse_form(request, FormLimits((IMAGE,), 1, too_many, max_bytes, seconds, _TYPE_HELP))
    if not images or not images[0]:
        raise Problem("missing_image", "There must be a file, not empty, in the field `image`.")
    return images[0], pairs


def _from_json(body: bytes) -> tuple[bytes, Pairs]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem("malformed_json", printable(str(error), 200)) from error
    if not isinstance(document, dict):
        raise Problem("missing_image", "The body must be a JSON object with `image`.")
    encoded = document.pop(IMAGE, None)
    if not isinstance(encoded, str) or not encoded:
        raise Problem("missing_image", "`image` must be there and be a string of base64.")
    return from_base64(encoded), list(document.items())


def from_base64(encoded: str) -> bytes:
    """Standard base64 (RFC 4648, section 4), also as a data URL (RFC 2397) and with line breaks.

    Raises `Problem`: `bad_base64`, `missing_image`.
    """
    if encoded.startswith("data:"):
        head, _, encoded = encoded.partition(",")
        if not head.endswith(";base64"):
            raise Problem("bad_base64", "A data URL must say ;base64 before its comma.")
    try:
        image = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem("bad_base64", printable(str(error))) from error
    if not image:
        raise Problem("missing_image", "`image` is empty.")
    return image
