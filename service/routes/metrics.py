"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.exposition import expose
from service.routes.context import context_of

router = APIRouter(tags=["operations"])


@router.get("/metrics", summary="Counters and histograms, for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """As text, or, where the Accept header asks for it, as OpenMetrics, with request ids as exemplars."""
    return expose(context_of(request).metrics.registry, request.headers.get("accept", ""))
