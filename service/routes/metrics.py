"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.routes.context import context_of

router = APIRouter(tags=["operations"])


@router.get("/metrics", summary="Counters and histograms, for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """As text, or, where the Accept header asks for it, as OpenMetrics, with request ids as exemplars."""
    try:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
    except (TypeError, ValueError):  # a version that is no number
        encode, content_type = choose_encoder("")
    return Response(encode(context_of(request).metrics.registry), headers={"Content-Type": content_type})
