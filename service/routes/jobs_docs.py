"""What the OpenAPI page says of `/v1/jobs/{id}`."""

from __future__ import annotations

from typing import Any

from service.routes.caption_docs import CAPTION_EXAMPLE, problem_responses

_ID = "4f3d2c1b0a998877665544330123456789abcdef"
_PROBLEMS = problem_responses("unauthorized", "unknown_job", "internal", "unavailable")

GET_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What is known of the job",
        "headers": {
            "Retry-After": {
                "description": "Seconds until it is worth another look, where it is not done.",
                "schema": {"type": "integer"},
            },
        },
        "content": {
            "application/json": {
                "examples": {
                    "queued": {
                        "summary": "Three photos before it",
                        "value": {"id": _ID, "state": "queued", "position": 3, "result": None, "problem": None},
                    },
                    "done": {
                        "summary": "Captioned",
                        "value": {
                            "id": _ID,
                            "state": "done",
                            "position": None,
                            "result": CAPTION_EXAMPLE,
                            "problem": None,
                        },
                    },
                }
            }
        },
    },
    **_PROBLEMS,
}

DELETE_RESPONSES: dict[int | str, dict[str, Any]] = {204: {"description": "It is gone"}, **_PROBLEMS}
