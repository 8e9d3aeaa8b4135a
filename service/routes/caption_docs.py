"""What the OpenAPI page says of `POST /v1/caption`: the forms of a request and of an answer, and its problems."""

from __future__ import annotations

from typing import Any

from service.errors import KINDS, PROBLEM_JSON, WENT_WRONG, problem_document
from service.routes.preferences import LONGEST_KEY
from service.schemas import CaptionOptions, ProblemOut, RestartEventOut, WordEventOut

# The smallest PNG that is not too small: eight by eight grey pixels.
TINY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR4nGNsYIAAJgaKGAAmCACQXTClHgAAAABJRU5ErkJggg=="
# Headers that come with a status, whatever the problem.
_HEADERS = {
    401: {"WWW-Authenticate": {"description": "RFC 6750.", "schema": {"type": "string"}}},
    429: {"Retry-After": {"description": "Seconds until the quota allows it.", "schema": {"type": "integer"}}},
    503: {"Retry-After": {"description": "Seconds until it is worth another try.", "schema": {"type": "integer"}}},
}
_RAW = {"schema": {"type": "string", "format": "binary"}}
_DETAILS = {
    "bad_request": "input image: binary_data_size goes beyond the body.",
    "empty_body": "Send an image as the body, or as the file `image` of a form, or in base64 in JSON.",
    "malformed_json": "Expecting value: line 1 column 1 (char 0)",
    "malformed_multipart": "Missing boundary in multipart.",
    "unauthorized": "There is none in this request: send Authorization: Bearer <key>, or X-API-Key: <key>.",
    "not_found": "No problem has this code; there are bad_request, empty_body and more.",
    "unknown_job": "No job has this id: it was cancelled, or is no longer kept, or never was.",
    "invalid_request": "path.id: Field required",
    "body_timeout": "The body was not there after 30 seconds.",
    "body_too_large": "At most 20,000,000 bytes are taken.",
    "unsupported_media_type": "Content-Type text/plain is not taken.",
    "not_an_image": "The first bytes are of no known image format.",
    "missing_image": "There must be a file, not empty, in the field `image`.",
    "too_many_images": "At most 32 photos are taken in one request.",
    "repeated_field": "The option speed was given more than once.",
    "bad_base64": "Incorrect padding",
    "undecodable_image": "The image is broken or incomplete: its pixels cannot be decoded.",
    "too_many_pixels": "The image is 50000 x 50000 pixels; at most 50,000,000 are taken.",
    "image_too_small": "The image is 1 x 1 pixels; each side must be at least 8.",
    "unknown_option": "Not known: sped.",
    "invalid_option": "options: give speed or tau, not both",
    "unknown_speed": "speed must be one of full, balanced, fast, turbo or a number from 1 to 4.20",
    "key_reused": "Idempotency-Key: it named a request with another photo or other options before.",
    "quota_exceeded": "This key may ask for 60 captions per minute; try again in 3 s.",
    "internal": WENT_WRONG,
    "poison": "Each time a worker took the photo, the worker stopped: it was given up.",
    "not_ready": "The model is being loaded.",
    "overloaded": "64 photos are waiting already.",
    "stopping": "The service is stopping; another one will answer.",
    "no_worker": "No worker is there to caption.",
    "unavailable": "The queue cannot be reached at the moment.",
    "deadline_exceeded": "The caption was not ready by the deadline (timeout_ms).",
}
_OF_OTHERS = {"bad_request", "not_found", "unknown_job", "too_many_images", "invalid_request"}  # not of one caption
NOT_READY = ("not_ready", "no_worker", "unavailable", "stopping")  # why no caption can be had, for now


def problem_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for problems with these codes, each with an example."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = KINDS[code]
        example = {"summary": kind.title, "value": problem_document(code, _DETAILS[code], "6f9619ff8b86d011")}
        response = responses.setdefault(
            kind.status,
            {
                # The schema as a reference: FastAPI's own `model` would declare application/json beside it.
                "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemOut"}, "examples": {}}},
                "description": "",
                **({"headers": _HEADERS[kind.status]} if kind.status in _HEADERS else {}),
            },
        )
        response["content"][PROBLEM_JSON]["examples"][code] = example
        response["description"] = "; ".join(filter(None, [response["description"], f"{kind.title} (`{code}`)"]))
    return responses


def query_parameters() -> list[dict[str, Any]]:
    """The options, as parameters of the query."""
    parameters = []
    for name, schema in CaptionOptions.model_json_schema()["properties"].items():
        parameter = {"name": name, "in": "query", "required": False, "schema": schema}
        parameters.append({**parameter, "description": schema.get("description", "")})
    return parameters


def _with_image(image: dict[str, Any]) -> dict[str, Any]:
    """The schema of a body that holds the options and the image."""
    options = CaptionOptions.model_json_schema()["properties"]
    return {"type": "object", "required": ["image"], "properties": {"image": image, **options}}


_HEADER_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "Prefer",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "`respond-async` (RFC 7240): answer 202 with the address of a job, and caption later. Every "
        "other preference is passed over, and so is this one with `Accept: text/event-stream`.",
        "examples": {"later": {"summary": "Answer at once, caption later", "value": "respond-async"}},
    },
    {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "minLength": 1, "maxLength": LONGEST_KEY, "pattern": "^[!-~]+$"},
        "description": "With `Prefer: respond-async`, a name of the client's own for this request: sent again, it "
        "is the same job. Without, it has no effect, since a caption may be asked for as often as one likes. One that "
        "does not fit the schema is refused (422) either way.",
        "examples": {"uuid": {"summary": "Anything unique", "value": "8e03978e-40d5-43e8-bc93-6894a57f9324"}},
    },
]

OPENAPI: dict[str, Any] = {
    "parameters": [*query_parameters(), *_HEADER_PARAMETERS],
    "requestBody": {
        "required": True,
        "description": "JPEG, PNG, WebP, GIF, BMP or TIFF; of an animation the first frame. From a shell: "
        "`curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/caption?speed=fast'` or "
        "`curl -F image=@photo.jpg -F speed=fast http://127.0.0.1:8000/v1/caption`",
        "content": {
            "multipart/form-data": {
                "schema": _with_image({"type": "string", "format": "binary"}),
                "examples": {"fast": {"summary": "A file and a form field", "value": {"speed": "fast"}}},
            },
            "application/json": {
                "schema": _with_image({"type": "string", "contentEncoding": "base64"}),
                "examples": {
                    "tier": {"summary": "A named speed", "value": {"image": TINY_PNG, "speed": "fast"}},
                    "number": {"summary": "A number", "value": {"image": TINY_PNG, "speed": 2.5, "regions": True}},
                    "beam": {"summary": "Full depth, beam 3", "value": {"image": TINY_PNG, "speed": "full", "beam": 3}},
                },
            },
            "image/jpeg": _RAW,
            "image/png": _RAW,
            "image/webp": _RAW,
            "application/octet-stream": _RAW,
        },
    },
}

# A caption, as the examples show it.
CAPTION_EXAMPLE: dict[str, Any] = {
    "caption": "a dog runs",
    "confidence": 0.41,
    "words": [
        {"text": "a", "exit_layer": 1, "entropy": 0.9},
        {"text": "dog", "exit_layer": 3, "entropy": 2.2},
        {"text": "runs", "exit_layer": 2, "entropy": 1.7},
    ],
    "speed": {"requested": "fast", "tier": "fast", "tau": 3.1, "promised": 3.0, "moved_by_load": False},
    "speedup": 3.43,
    "timings_ms": {
        "queue": 0.1,
        "decode_image": 2.4,
        "look": 31.0,
        "describe": 12.5,
        "total": 47.2,
    },
    "model": {"name": "deecap-flickr8k", "revision": "0123456789ab"},
    "request_id": "6f9619ff8b86d011",
}
_STREAM_EXAMPLE = """event: word
data: {"index": 0, "text": "a", "exit_layer": 1, "entropy": 0.9, "attempt": 1}

event: word
data: {"index": 1, "text": "dog", "exit_layer": 3, "entropy": 2.2, "attempt": 1}

: keep-alive

event: word
data: {"index": 2, "text": "runs", "exit_layer": 2, "entropy": 1.7, "attempt": 1}

event: caption
data: {"caption": "a dog runs", "confidence": 0.41, ...}

"""
_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "One event.",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["word", "restart", "caption", "problem"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "anyOf": [
                    {"$ref": f"#/components/schemas/{name}"}
                    for name in ("WordEventOut", "RestartEventOut", "CaptionOut", "ProblemOut")
                ]
            },
        },
        "retry": {"type": "integer", "description": "Milliseconds until it is worth another try."},
    },
}
_STREAM = (
    "With `Accept: text/event-stream`, server-sent events. `word` (`WordEventOut`) for each word as it is decided "
    "(with a `beam` of 2 or more, all at the end); `restart` (`RestartEventOut`) where another worker has to begin the "
    "caption again: the words so far are void; and one at the end: `caption` (`CaptionOut`), or `problem` "
    "(`ProblemOut`), with `retry`, in milliseconds, where another try is worth it. A comment every 10 seconds keeps "
    "the connection open. A problem before anything was sent is answered as any other, with its status. To hang up "
    "stops the work."
)

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": f"The caption. {_STREAM}",
        "headers": {
            "Server-Timing": {
                "description": "The milliseconds of `timings_ms`, for a browser's tools; not of a stream.",
                "schema": {"type": "string"},
            },
        },
        "content": {
            "application/json": {"example": CAPTION_EXAMPLE},
            "text/event-stream": {"schema": _EVENT, "example": _STREAM_EXAMPLE},
        },
    },
    202: {
        "description": "With `Prefer: respond-async`: the job is taken, and is to be found at `Location`.",
        "headers": {
            "Location": {"description": "`/v1/jobs/{id}`", "schema": {"type": "string"}},
            "Preference-Applied": {"description": "RFC 7240.", "schema": {"type": "string"}},
            "Retry-After": {
                "description": "Seconds until it is worth a look; not where the job is done already.",
                "schema": {"type": "integer"},
            },
        },
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/JobOut"},
                "example": {
                    "id": "4f3d2c1b0a99887766554433" + "0123456789abcdef",
                    "state": "queued",
                    "position": 3,
                    "result": None,
                    "problem": None,
                },
            }
        },
    },
    **problem_responses(*(code for code in _DETAILS if code not in _OF_OTHERS)),
}


def add_problem_schema(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with the schema that `problem_responses` refer to, and with the problems of addresses that
    have a part to fill in: nothing may be there, and what FastAPI refuses is told in our shape, not in its own."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for each in (ProblemOut, WordEventOut, RestartEventOut):
        schemas[each.__name__] = each.model_json_schema()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                responses["422"] = problem_responses("invalid_request")[422]
            if "{" in path:
                responses.setdefault("404", problem_responses("not_found")[404])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document


def add_key_schemes(document: dict[str, Any]) -> None:
    """Says in the OpenAPI document that a key is needed, in either of two headers."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    document["security"] = [{"bearer": []}, {"header": []}]
