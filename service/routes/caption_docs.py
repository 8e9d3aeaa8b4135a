"""What the OpenAPI page says of `POST /v1/caption`: the three forms of a request, and its problems."""

from __future__ import annotations

from typing import Any

from service.errors import KINDS, PROBLEM_JSON, problem_document
from service.schemas import CaptionOptions, ProblemOut

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
    "invalid_request": "path.id: Field required",
    "body_timeout": "The body was not there after 30 seconds.",
    "body_too_large": "At most 20,000,000 bytes are taken.",
    "unsupported_media_type": "Content-Type text/plain is not taken.",
    "not_an_image": "The first bytes are of no known image format.",
    "missing_image": "There must be a file, not empty, in the field `image`.",
    "repeated_field": "The option speed was given more than once.",
    "bad_base64": "Incorrect padding",
    "undecodable_image": "The image is broken or incomplete: its pixels cannot be decoded.",
    "too_many_pixels": "The image is 50000 x 50000 pixels; at most 50,000,000 are taken.",
    "image_too_small": "The image is 1 x 1 pixels; each side must be at least 8.",
    "unknown_option": "Not known: sped.",
    "invalid_option": "options: give speed or tau, not both",
    "unknown_speed": "speed must be one of full, balanced, fast, turbo or a number from 1 to 4.20",
    "quota_exceeded": "This key may ask for 60 captions per minute; try again in 3 s.",
    "internal": "Something went wrong here; the request id finds it in the log.",
    "poison": "Each time a worker took the photo, the worker stopped: it was given up.",
    "not_ready": "The model is being loaded.",
    "overloaded": "64 photos are waiting already.",
    "stopping": "The service is stopping; another one will answer.",
    "no_worker": "No worker is there to caption.",
    "unavailable": "The queue cannot be reached at the moment.",
    "deadline_exceeded": "The caption was not ready by the deadline (timeout_ms).",
}
_OF_OTHERS = {"bad_request", "not_found", "invalid_request"}  # never told of a caption
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


def _query_parameters() -> list[dict[str, Any]]:
    parameters = []
    for name, schema in CaptionOptions.model_json_schema()["properties"].items():
        parameter = {"name": name, "in": "query", "required": False, "schema": schema}
        parameters.append({**parameter, "description": schema.get("description", "")})
    return parameters


def _with_image(image: dict[str, Any]) -> dict[str, Any]:
    """The schema of a body that holds the options and the image."""
    options = CaptionOptions.model_json_schema()["properties"]
    return {"type": "object", "required": ["image"], "properties": {"image": image, **options}}


OPENAPI: dict[str, Any] = {
    "parameters": _query_parameters(),
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

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The caption",
        "headers": {
            "Server-Timing": {
                "description": "The milliseconds of `timings_ms`, for a browser's tools.",
                "schema": {"type": "string"},
            },
        },
        "content": {
            "application/json": {
                "example": {
                    "caption": "a dog runs",
                    "confidence": 0.41,
                    "words": [
                        {"text": "a", "exit_layer": 1, "entropy": 0.9},
                        {"text": "dog", "exit_layer": 3, "entropy": 2.2},
                        {"text": "runs", "exit_layer": 2, "entropy": 1.7},
                    ],
                    "speed": {"requested": "fast", "tier": "fast", "tau": 3.1, "promised": 3.0},
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
            }
        },
    },
    **problem_responses(*(code for code in _DETAILS if code not in _OF_OTHERS)),
}


def add_problem_schema(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with the schema that `problem_responses` refer to, and with the problems of addresses that
    have a part to fill in: nothing may be there, and what FastAPI refuses is told in our shape, not in its own."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["ProblemOut"] = ProblemOut.model_json_schema()
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
