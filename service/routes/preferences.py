"""How a client wants to be answered, by its headers: at once, word by word, or later."""

from __future__ import annotations

import re

from fastapi import Request

from service.errors import Problem

EVENT_STREAM = "text/event-stream"
RESPOND_ASYNC = "respond-async"
LONGEST_KEY = 255  # characters
_KEY = re.compile(rf"[!-~]{{1,{LONGEST_KEY}}}")


def wants_events(request: Request) -> bool:
    """Whether `Accept` (RFC 9110, 12.5.1) names `text/event-stream`, and no less gladly than JSON.

    Ranges with `*` mean JSON: who can take anything has not asked for a stream.
    """
    named = {EVENT_STREAM: 0.0, "application/json": 0.0}
    for entry in ",".join(request.headers.getlist("accept")).split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        if kind in named:
            named[kind] = max(named[kind], _quality(parameters))
    return 0.0 < named[EVENT_STREAM] >= named["application/json"]


def _quality(parameters: list[str]) -> float:
    """The weight, from 0 to 1; 1 where there is none, and 0 for what is none."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0.0 <= weight <= 1.0 else 0.0
    return 1.0


def prefers_later(request: Request) -> bool:
    """Whether `Prefer` (RFC 7240, 4.1) has `respond-async`. Other preferences are passed over, as they may be."""
    entries = ",".join(request.headers.getlist("prefer")).split(",")
    return any(entry.split(";")[0].strip().lower() == RESPOND_ASYNC for entry in entries)


def idempotency_key(request: Request) -> str | None:
    """The client's own name for the request (`Idempotency-Key`), with or without the quotes of a structured field.

    Raises `Problem` `invalid_option` for one that is empty, too long or not plain ASCII, and for more than one.
    """
    said = request.headers.getlist("idempotency-key")
    if not said:
        return None
    key = said[0].strip()
    if len(said) > 1 or not _KEY.fullmatch(key):
        raise Problem("invalid_option", f"Idempotency-Key: one, of 1 to {LONGEST_KEY} visible ASCII characters")
    return key[1:-1] if len(key) > 2 and key[0] == key[-1] == '"' else key
