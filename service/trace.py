"""W3C Trace Context, level 1: the `traceparent` header that ties a request to its caller's trace."""

from __future__ import annotations

import re

_SHAPE = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


def trace_id(traceparent: str) -> str:
    """The trace's id, 32 hexadecimal digits; empty where the header is not valid, and must then be ignored (3.2.2)."""
    found = _SHAPE.fullmatch(traceparent)
    if found is None:
        return ""
    version, trace, parent, more = found.groups()
    if version == "ff" or (version == "00" and more) or not trace.strip("0") or not parent.strip("0"):
        return ""
    return trace
