"""What the OpenAPI page says of `POST /v1/captions`."""

from __future__ import annotations

from typing import Any

from service.errors import problem_document
from service.routes.caption_docs import CAPTION_EXAMPLE, problem_responses, query_parameters
from service.schemas import CaptionOptions

_FILE = {"type": "string", "format": "binary"}

BATCH_OPENAPI: dict[str, Any] = {
    "parameters": query_parameters(),
    "requestBody": {
        "required": True,
        "description": "JPEG, PNG, WebP, GIF, BMP or TIFF, as many as DEECAP_MAX_BATCH_IMAGES and, together, "
        "DEECAP_MAX_BATCH_BYTES. From a shell: "
        "`curl -F images=@a.jpg -F images=@b.jpg -F speed=fast http://127.0.0.1:8000/v1/captions`",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {
                        "images": {
                            "type": "array",
                            "minItems": 1,
                            "items": _FILE,
                            "description": "A file each; the name `image` is taken too.",
                        },
                        **CaptionOptions.model_json_schema()["properties"],
                    },
                },
                "examples": {"fast": {"summary": "Files, and a form field for all", "value": {"speed": "fast"}}},
            },
        },
    },
}

BATCH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What became of each photo",
        "content": {
            "application/json": {
                "example": {
                    "results": [
                        {"index": 0, "status": 200, "caption": CAPTION_EXAMPLE, "problem": None, "retry_after": None},
                        {
                            "index": 1,
                            "status": 415,
                            "caption": None,
                            "problem": problem_document(
                                "not_an_image",
                                "The first bytes are of no known image format.",
                                CAPTION_EXAMPLE["request_id"],
                            ),
                            "retry_after": None,
                        },
                    ],
                    "request_id": CAPTION_EXAMPLE["request_id"],
                }
            }
        },
    },
    **problem_responses(
        "empty_body",
        "malformed_multipart",
        "unauthorized",
        "body_timeout",
        "body_too_large",
        "unsupported_media_type",
        "missing_image",
        "too_many_images",
        "repeated_field",
        "unknown_option",
        "invalid_option",
        "unknown_speed",
        "quota_exceeded",
        "internal",
        "not_ready",
        "overloaded",
        "stopping",
        "no_worker",
        "unavailable",
    ),
}
