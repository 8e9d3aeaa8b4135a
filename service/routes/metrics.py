"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.routes.context import context_of

router = APIRouter(tags=["operations"])


@router.get("/metrics", summary="Counters and histograms, for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """In the text format, or as OpenMetrics where the Accept header asks for it."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(context_of(request).metrics.registry), headers={"Content-Type": content_type})
