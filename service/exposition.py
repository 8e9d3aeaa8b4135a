"""Metrics as a scraper asks for them: plain text, or OpenMetrics with exemplars."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response


def expose(registry: CollectorRegistry, accept: str) -> Response:
    """The answer of `/metrics` to a request with this Accept header."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number
        encode, content_type = choose_encoder("")
    return Response(encode(registry), headers={"Content-Type": content_type})
