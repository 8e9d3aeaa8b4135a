"""OpenTelemetry spans of a request at the front and of what a worker did for its job. Off by default: then nothing of
OpenTelemetry is imported here, and nobody asks for more than whether there is a `Tracing`.

One trace, as a backend shows it:

    POST /v1/caption          the front, from headers to answer; its parent is the caller's, by `traceparent`
    ├── queue                 from the front's submission to the worker
    └── caption               the worker, from there to the outcome
        ├── decode_image      not there, like `look`, where the photo was known
        ├── look
        └── describe          with speed, tau, words and how deep they went
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from service.errors import printable
from service.jobs import Answer, Job, Refusal
from service.requirements_check import installed_version
from service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

CLOSE_SECONDS = 3.0  # that the last spans may take to be sent: a collector that is gone must not keep a process
Attributes = Mapping[str, str | int | float]
Stage = tuple[str, tuple[float, float] | None]  # its name, and when it was, by time.monotonic()


def start(settings: Settings, service_name: str) -> Tracing | None:
    """What the settings want; None for no tracing. `service_name` is told unless `OTEL_SERVICE_NAME` says another.

    Raises `SettingsError` where the packages are missing, or a protocol is wanted that this does not speak.
    """
    if settings.tracing == "off":
        return None
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next(filter(None, map(os.environ.get, names)), "http/protobuf")
    if protocol != "http/protobuf":
        raise SettingsError(f"DEECAP_TRACING: spans are sent by http/protobuf, not by {protocol} (OTEL_..._PROTOCOL)")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise SettingsError(f"DEECAP_TRACING=otlp needs {error.name}: pip install '.[tracing]'") from error
    named = {"service.version": installed_version("deecap") or "unknown"}
    # What is given here goes before the environment's.
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        named["service.name"] = service_name
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes spans. Sampler, endpoint and batches are the provider's, from the `OTEL_` environment."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("deecap")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, method: str, traceparent: str, tracestate: str) -> RequestSpan:
        """Begins the span of a request. `traceparent`: that of the caller, "" for none that is valid."""
        from opentelemetry.trace import SpanKind

        parent = self._parent(traceparent, tracestate)
        return RequestSpan(self._tracer.start_span(method, parent, SpanKind.SERVER), method, traceparent)

    def worked(
        self,
        job: Job,
        outcome: Answer | Refusal,
        *,
        worker: str,
        attempt: int,
        waited: float,
        since: float,
        stages: Sequence[Stage],
    ) -> None:
        """The spans of a job that has just ended. `waited`: seconds in the queue until `since`, by time.monotonic()."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        to_epoch = time.time_ns() - time.monotonic_ns()

        def span(name: str, when: tuple[float, float], parent: Context, attributes: Attributes, kind: SpanKind) -> Span:
            begin, end = (round(second * 1e9) + to_epoch for second in when)
            made = self._tracer.start_span(name, parent, kind, attributes, start_time=begin)
            made.end(end)
            return made

        now = time.monotonic()
        parent = self._parent(job.traceparent, "")
        span("queue", (since - waited, since), parent, {}, SpanKind.INTERNAL)
        code = "ok" if isinstance(outcome, Answer) else outcome.code
        said: Attributes = {
            "deecap.outcome": code,
            "deecap.request_id": job.request_id,
            "deecap.worker": worker,
            "deecap.attempt": attempt,
        }
        begin = round(since * 1e9) + to_epoch
        whole = self._tracer.start_span("caption", parent, SpanKind.CONSUMER, said, start_time=begin)
        within = set_span_in_context(whole)
        for name, when in stages:
            if when is not None:
                # A job that joined another's has its part of it only, as in its timings.
                when = (max(when[0], since), max(when[1], since))
                span(name, when, within, _of_words(job, outcome) if name == "describe" else {}, SpanKind.INTERNAL)
        if isinstance(outcome, Refusal) and outcome.code in ("internal", "poison"):  # the rest is no fault of ours
            whole.set_status(StatusCode.ERROR, outcome.detail)
        whole.end(round(now * 1e9) + to_epoch)

    async def close(self) -> None:
        """Sends what there is left, as far as that goes in `CLOSE_SECONDS`."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_SECONDS)

    def _parent(self, traceparent: str, tracestate: str) -> Context:
        from opentelemetry.context import Context

        # A context of its own, so that nothing that another library left in the current one becomes the parent.
        return self._propagator.extract({"traceparent": traceparent, "tracestate": tracestate}, Context())


class RequestSpan:
    """The span of one request, begun."""

    def __init__(self, span: Span, method: str, incoming: str) -> None:
        self._span = span
        self._method = printable(method, 16)
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}" if context.is_valid else ""
        self.traceparent = (  # for those that come after; the caller's, where the SDK is switched off
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            if context.is_valid
            else incoming
        )

    def end(self, route: str, status: int, outcome: str, speed: str, request_id: str) -> None:
        """`status` is 0 where no answer was begun."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": self._method,
                "http.route": route,
                "http.response.status_code": status,
                "deecap.outcome": outcome,
                "deecap.speed": speed,
                "deecap.request_id": request_id,
            }
        )
        if status >= 500 or outcome == "internal":
            self._span.set_status(StatusCode.ERROR, outcome)
        self._span.end()


def _of_words(job: Job, outcome: Answer | Refusal) -> Attributes:
    """What was asked for and what the words took."""
    if isinstance(outcome, Refusal):
        return {}
    caption = outcome.caption
    exits = [step.exit_layer for step in caption.steps]
    return {
        "deecap.speed": "" if caption.speed.requested is None else str(caption.speed.requested),
        "deecap.tau": caption.speed.tau,
        "deecap.beam": job.beam,
        "deecap.words": len(caption.words),
        "deecap.exit_depth_mean": sum(exits) / len(exits) if exits else 0.0,  # layers, the end of sentence's too
        "deecap.layers": caption.layers,
        "deecap.model": outcome.model,
        "deecap.revision": outcome.revision,
    }
