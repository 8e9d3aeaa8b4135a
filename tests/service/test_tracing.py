"""Spans: what there is of a request, whose child it is, and that without them nothing of OpenTelemetry is loaded."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.app import create_app
from service.settings import Settings, SettingsError
from service.tracing import Tracing, start
from tests.service import pictures
from tests.service.fakes import EXITS, FakeBroker, FakeCaptioner, answer_to
from tests.service.running import running, until, until_ready
from tests.service.test_process import SERVE, run, wait_ready

URL = "/v1/caption"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
ROOT = Path(__file__).parents[2]


class Spans:
    """What was told so far."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        [found] = [span for span in self.all if span.name == name]
        return found

    @property
    def names(self) -> list[str]:
        return sorted(span.name for span in self.all)

    def clear(self) -> None:
        self._exporter.clear()


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def client(
    settings: Settings, captioner: FakeCaptioner, quick_stop: None, spans: Spans
) -> AsyncIterator[httpx.AsyncClient]:
    cached = settings.model_copy(update={"feature_cache_mb": 1})
    async with running(create_app(cached, load=lambda: captioner, tracing=spans.tracing)) as client:
        await until_ready(client)
        yield client


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


@pytest.mark.anyio
class TestARequest:
    async def test_the_tree_and_what_it_says(self, client: httpx.AsyncClient, spans: Spans) -> None:
        headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
        assert (await client.post(URL, params={"speed": "fast"}, content=pictures.jpeg(), headers=headers)).is_success
        assert spans.names == ["POST /v1/caption", "caption", "decode_image", "describe", "look", "queue"]
        front, worker = spans.named("POST /v1/caption"), spans.named("caption")
        assert {f"{span.context.trace_id:032x}" for span in spans.all if span.context} == {TRACE}
        assert f"{parent_of(front):016x}" == PARENT
        assert (front.kind, worker.kind) == (SpanKind.SERVER, SpanKind.CONSUMER)
        for name, parent in {"queue": front, "caption": front, "decode_image": worker, "look": worker}.items():
            assert parent_of(spans.named(name)) == id_of(parent), name
        describe = spans.named("describe")
        assert parent_of(describe) == id_of(worker)
        assert dict(describe.attributes or {}) == {
            "deecap.speed": "fast",
            "deecap.tau": 2.0,
            "deecap.beam": 1,
            "deecap.words": 3,
            "deecap.exit_depth_mean": sum(EXITS) / len(EXITS),
            "deecap.layers": 6,
            "deecap.model": "fake",
            "deecap.revision": "0123456789ab",
        }
        assert dict(front.attributes or {}) == {
            "http.request.method": "POST",
            "http.route": "/v1/caption",
            "http.response.status_code": 200,
            "deecap.outcome": "ok",
            "deecap.speed": "fast",
            "deecap.request_id": "mine",
        }
        assert worker.attributes is not None
        assert worker.attributes["deecap.request_id"] == "mine"
        assert (worker.attributes["deecap.outcome"], worker.attributes["deecap.attempt"]) == ("ok", 1)

    async def test_the_stages_follow_each_other_within_the_request(
        self, client: httpx.AsyncClient, spans: Spans
    ) -> None:
        begin = time.time_ns()
        await client.post(URL, content=pictures.jpeg())
        end = time.time_ns()
        order = ["queue", "decode_image", "look", "describe"]
        times = [moment for name in order for moment in (spans.named(name).start_time, spans.named(name).end_time)]
        # Two clocks are laid over each other, so that a step of either shows as microseconds.
        assert all(late >= early - 1_000_000 for early, late in pairwise(times)), times
        for span in spans.all:
            assert begin - 1_000_000 <= (span.start_time or 0) <= (span.end_time or 0) <= end + 1_000_000, span.name

    async def test_a_photo_that_is_known_is_neither_decoded_nor_looked_at(
        self, client: httpx.AsyncClient, spans: Spans
    ) -> None:
        await client.post(URL, content=pictures.jpeg())
        await until(lambda: "describe" in spans.names)
        spans.clear()
        for _ in range(100):  # until what was seen has been put into the cache
            await client.post(URL, params={"speed": "full"}, content=pictures.jpeg())
            if spans.names == ["POST /v1/caption", "caption", "describe", "queue"]:
                return
            spans.clear()
        raise AssertionError("it was looked at each time")

    async def test_without_a_parent_or_with_none_that_is_valid_it_is_a_root(
        self, client: httpx.AsyncClient, spans: Spans
    ) -> None:
        for header in ({}, {"traceparent": "00-" + "0" * 32 + "-" + PARENT + "-01"}, {"traceparent": "nonsense"}):
            spans.clear()
            await client.post(URL, content=pictures.jpeg(), headers=header)
            front = spans.named("POST /v1/caption")
            assert front.parent is None
            assert parent_of(spans.named("caption")) == id_of(front)

    async def test_who_does_not_sample_is_not_traced(self, client: httpx.AsyncClient, spans: Spans) -> None:
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert (await client.post(URL, content=pictures.jpeg(), headers=unsampled)).is_success
        assert spans.names == []

    async def test_refusals_say_their_code_and_only_our_own_faults_are_errors(
        self, client: httpx.AsyncClient, captioner: FakeCaptioner, spans: Spans
    ) -> None:
        await client.post(URL, content=b"no picture at all")
        front = spans.named("POST /v1/caption")
        assert front.attributes is not None
        assert front.attributes["deecap.outcome"] == "not_an_image"
        assert front.status.status_code is StatusCode.UNSET
        spans.clear()
        captioner.fails = RuntimeError("made up")
        await client.post(URL, content=pictures.jpeg())
        await until(lambda: "caption" in spans.names)
        assert spans.names == ["POST /v1/caption", "caption", "queue"]
        for span in (spans.named("POST /v1/caption"), spans.named("caption")):
            assert span.status.status_code is StatusCode.ERROR
            assert span.attributes is not None
            assert span.attributes["deecap.outcome"] == "internal"

    async def test_probes_are_not_traced_and_other_addresses_are(self, client: httpx.AsyncClient, spans: Spans) -> None:
        for url in ("/livez", "/readyz", "/metrics", "/v2/health/ready"):
            await client.get(url)
        assert spans.names == []
        await client.get("/v1/speeds")
        await client.get("/nowhere")
        assert spans.names == ["GET /v1/speeds", "GET unmatched"]


@pytest.mark.anyio
@pytest.mark.parametrize("traced", [True, False])
async def test_the_job_carries_the_fronts_span_or_without_one_the_callers(traced: bool, spans: Spans) -> None:
    broker = FakeBroker()
    tracing = spans.tracing if traced else None
    async with running(create_app(Settings(), broker=broker, tracing=tracing)) as client:
        await until_ready(client)
        headers = {"traceparent": TRACEPARENT}
        asking = asyncio.create_task(client.post(URL, content=pictures.jpeg(), headers=headers))
        await until(lambda: bool(broker.submitted))
        [job] = broker.submitted
        broker.say(answer_to(job))
        assert (await asking).is_success
    if traced:
        assert job.traceparent == f"00-{TRACE}-{id_of(spans.named('POST /v1/caption')):016x}-01"
    else:
        assert job.traceparent == TRACEPARENT


class TestSettings:
    def test_off_is_none(self) -> None:
        assert start(Settings(), "deecap") is None

    def test_a_protocol_that_is_not_spoken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        with pytest.raises(SettingsError, match="http/protobuf, not by grpc"):
            create_app(Settings(tracing="otlp"))

    def test_without_the_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
        with pytest.raises(SettingsError, match=r"pip install '\.\[tracing\]'"):
            start(Settings(tracing="otlp"), "deecap")

    @pytest.mark.parametrize("tracing", ["off", "otlp"])
    def test_off_loads_nothing_that_makes_or_sends_spans(self, tracing: str) -> None:
        """FastAPI and redis-py load other parts by themselves, where they are installed."""
        code = (
            "import sys, service.worker_process; from service.app import create_app\n"
            f"from service.settings import Settings\ncreate_app(Settings(tracing={tracing!r}))\n"
            "print(sorted({'opentelemetry.sdk.trace', 'opentelemetry.exporter.otlp'} & set(sys.modules)))"
        )
        expected = [] if tracing == "off" else ["opentelemetry.exporter.otlp", "opentelemetry.sdk.trace"]
        assert run(code).stdout.strip() == str(expected)

    def test_nothing_of_ours_imports_it_before_it_is_asked_for(self) -> None:
        guilty = [
            path.name
            for path in (ROOT / "service").rglob("*.py")
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom) and "opentelemetry" in ast.unparse(node)
        ]
        assert guilty == []


class Collector(ThreadingHTTPServer):
    """Takes spans as a collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[ExportTraceServiceRequest] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_real_process_sends_its_last_spans_before_it_ends(collector: Collector) -> None:
    environment = {**os.environ, "DEECAP_TRACING": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(load="FakeCaptioner", port=0)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].split(" ")[0]
        with httpx.Client(base_url=address, timeout=10) as client:
            wait_ready(client)
            assert client.post(URL, content=pictures.jpeg()).is_success
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()
    resources = [resource for request in collector.requests for resource in request.resource_spans]
    names = [span.name for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/caption", "caption", "decode_image", "describe", "look", "queue"]
    said = {each.key: each.value.string_value for each in resources[0].resource.attributes}
    assert said["service.name"] == "deecap"


@pytest.mark.anyio
async def test_a_collector_that_is_gone_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.tracing.CLOSE_SECONDS", 0.05)
    provider, begun, go = TracerProvider(shutdown_on_exit=False), threading.Event(), threading.Event()

    def hangs() -> None:
        begun.set()
        go.wait(10)

    monkeypatch.setattr(provider, "shutdown", hangs)
    try:
        async with asyncio.timeout(5):
            await Tracing(provider).close()
        assert begun.is_set()
    finally:
        go.set()
