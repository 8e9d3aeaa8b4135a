"""From a request and its options to the job that it asks for, and waiting for that as long as the client does."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from model.exits import DEFAULT_SPEED, TIERS, ResolvedSpeed, SpeedTable, UnknownSpeedError
from service.errors import Problem
from service.jobs import Job
from service.routes.context import context_of
from service.schemas import CaptionOptions
from service.worker_metrics import speed_label

T = TypeVar("T")


def new_job(
    request: Request, table: SpeedTable, image: bytes, options: CaptionOptions, *, longest_ms: float | None = None
) -> Job:
    """The job that the request asks for, its speed told to the metrics. Raises `Problem` for options that cannot be.

    `longest_ms` is what it may take, by default what a request may.
    """
    context = context_of(request)
    longest = context.settings.timeout_ms if longest_ms is None else longest_ms
    if options.timeout_ms is not None and options.timeout_ms > longest:
        raise Problem("invalid_option", f"timeout_ms: at most {longest:.0f}")
    speed = within_bounds(options)
    resolved = _resolve(table, speed, options.tau)
    lowest = None if options.min_speed is None else _speedup(table, options.min_speed)
    highest = None if options.max_speed is None else _speedup(table, options.max_speed)
    request.state.speed = speed_label(resolved)
    left = request.state.arrived + (options.timeout_ms or longest) / 1000 - time.monotonic()
    return Job(
        id=uuid.uuid4().hex,
        image=image,
        speed=speed,
        tau=options.tau,
        beam=options.beam,
        attention=options.attention,
        regions=options.regions,
        priority=options.priority,
        deadline=context.front.clock() + left,
        request_id=request.state.request_id,
        traceparent=request.state.traceparent,
        # A tier is calibrated to its number and promises a little more or less: what was asked for is in its bounds.
        min_speed=None if lowest is None else min(lowest, resolved.promised),
        max_speed=None if highest is None else max(highest, resolved.promised),
    )


def within_bounds(options: CaptionOptions) -> str | float | None:
    """The speed to ask for: what is asked for, and where nothing is, the default moved into the bounds.

    Raises `Problem` `invalid_option` where the bounds cross, or where the asked speed is beyond one of them.
    """
    lowest, highest = options.min_speed, options.max_speed
    if lowest is not None and highest is not None and _target(lowest) > _target(highest):
        raise Problem("invalid_option", "min_speed: must not be above max_speed")
    if options.tau is not None or (lowest is None and highest is None):
        return options.speed
    asked = DEFAULT_SPEED if options.speed is None else options.speed
    if lowest is not None and _target(asked) < _target(lowest):
        if options.speed is not None:
            raise Problem("invalid_option", "speed: must not be below min_speed")
        return lowest
    if highest is not None and _target(asked) > _target(highest):
        if options.speed is not None:
            raise Problem("invalid_option", "speed: must not be above max_speed")
        return highest
    return asked


def _target(speed: str | float) -> float:
    """The SpeedUp that a speed stands for, so that `fast` and 3 are the same bound; NaN for what is no speed, which is
    on neither side of anything and is told by `_resolve`.
    """
    if isinstance(speed, str) and speed in TIERS:
        return TIERS[speed]
    try:
        return float(speed)
    except (ValueError, OverflowError):
        return float("nan")


def _resolve(table: SpeedTable, speed: str | float | None, tau: float | None) -> ResolvedSpeed:
    """Raises `Problem` `unknown_speed`."""
    try:
        return table.resolve(speed, tau)
    except UnknownSpeedError as error:
        raise Problem("unknown_speed", str(error)) from error


def _speedup(table: SpeedTable, bound: str | float) -> float:
    """What a bound comes to, as a number that every worker's table understands. Raises `Problem` `unknown_speed`."""
    return _resolve(table, bound, None).promised


async def unless_gone(request: Request, doing: Coroutine[Any, Any, T]) -> T:
    """What `doing` comes to. Cancels it and raises `Problem` `client_gone` when the client closes the connection.

    The body must have been read.
    """
    work = asyncio.ensure_future(doing)
    gone = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise Problem("client_gone", "The client closed the connection.")
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def until_gone(request: Request) -> None:
    """Returns when the client closes the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
