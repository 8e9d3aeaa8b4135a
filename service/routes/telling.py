"""From what a worker answered to the documents that a client gets."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request

from service.errors import Problem, problem_document
from service.jobs import Answer


def caption_document(
    answer: Answer, request_id: str, *, with_regions: bool, seconds: float | None = None
) -> dict[str, Any]:
    """A `CaptionOut` as JSON. `seconds` is what all of it took; None: the sum of its parts, where nobody waited."""
    caption, times = answer.caption, answer.timings
    parts = times.queue + times.decode_image + times.look + times.describe
    asked = answer.asked or caption.speed
    # By hand, since checking what was just made costs as much as the rest of the answer; a test compares it with the
    # schema.
    document: dict[str, Any] = {
        "caption": caption.text,
        "confidence": caption.confidence,
        "words": [
            {"text": word.text, "exit_layer": word.exit_layer, "entropy": word.entropy} for word in caption.words
        ],
        "speed": {
            "requested": asked.requested,
            "tier": asked.tier if answer.asked is None else None,
            "tau": caption.speed.tau,
            "promised": caption.speed.promised,
            "moved_by_load": answer.asked is not None,
        },
        "speedup": caption.speedup,
        "timings_ms": {
            "queue": _ms(times.queue),
            "decode_image": _ms(times.decode_image),
            "look": _ms(times.look),
            "describe": _ms(times.describe),
            "total": _ms(parts if seconds is None else seconds),
        },
        "model": {"name": answer.model, "revision": answer.revision},
        "request_id": request_id,
    }
    if with_regions:
        document["regions"] = [{"box": box} for box in answer.boxes]
    if answer.attention is not None:
        document["attention"] = [[round(part, 5) for part in row] for row in answer.attention]
    return document


def since_arrival(request: Request) -> float:
    """Seconds."""
    return float(time.monotonic() - request.state.arrived)


def told(problem: Problem, request_id: str) -> dict[str, Any]:
    """A `ProblemOut` as JSON, within another document."""
    return problem_document(problem.code, problem.detail, request_id)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
