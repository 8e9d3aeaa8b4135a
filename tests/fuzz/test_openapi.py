"""The OpenAPI document against the service: whatever the document allows or forbids, the answer is one it tells of."""

from __future__ import annotations

import base64
import time
from collections import Counter
from functools import cache
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.schemas import BaseSchema
from starlette.types import Receive, Scope, Send

from service.app import create_app
from service.errors import KINDS
from service.schemas import CaptionOptions
from service.settings import Settings
from service.tensors import HEADER_LENGTH
from tests.fuzz.server import problem_fault
from tests.service import pictures
from tests.service.fakes import FakeCaptioner

QUICK, LONG = 150, 2_000  # examples of each operation in each mode
# Not among them: `positive_data_acceptance`, since no schema can say which bytes are a picture, and
# `not_a_server_error`, since a `timeout_ms` of 1 is rightly answered with 504: `told_as_a_problem` looks at those.
CHECKED = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
# What the service of this test takes; a document cannot tell what the model's table has.
RANGES = {"speed": (1, 4.5), "min_speed": (1, 4.5), "max_speed": (1, 4.5), "timeout_ms": (500, 5_000)}
CAPTION = "/v1/caption"
HOW = {"at once": None, "in words": {"Accept": "text/event-stream"}, "later": {"Prefer": "respond-async"}}
INFER = "/v2/models/{name}/infer"
SPEEDS = {"speed", "min_speed", "max_speed"}
DOCUMENTED_SERVER_ERRORS = {"overloaded", "stopping", "not_ready", "no_worker", "unavailable", "deadline_exceeded"}


class Application:
    """The app, a new one for each lifespan: schemathesis begins one whenever it needs one, and ours live once."""

    def __init__(self) -> None:
        self.current = self.new()

    def new(self) -> FastAPI:
        limits = {"max_body_bytes": 200_000, "max_pixels": 100_000, "timeout_ms": 5_000, "feature_cache_mb": 0}
        return create_app(Settings(**limits), load=FakeCaptioner)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.current = self.new()
        await self.current(scope, receive, send)


@cache
def schema() -> BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", Application())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each operation that the document names, so that a new one is fuzzed without a word here.

    Where nothing but text in a path is asked for, there is nothing that is not allowed.
    """
    if "operation" not in metafunc.fixturenames:
        return
    cases = []
    for path, operations in Application().current.openapi()["paths"].items():
        for method, operation in operations.items():
            typed = [each for each in operation.get("parameters", []) if each["in"] != "path"]
            modes = list(GenerationMode) if typed or "requestBody" in operation else [GenerationMode.POSITIVE]
            cases += [pytest.param((path, method), mode, id=f"{mode} {method} {path}") for mode in modes]
    metafunc.parametrize(("operation", "mode"), cases)


def wait_ready() -> None:
    """Else a documented 503 would be the answer to everything."""
    probe = schema()["/readyz"]["GET"].Case()
    end = time.monotonic() + 10
    while probe.call().status_code != 200:
        assert time.monotonic() < end, "not ready in ten seconds"
        time.sleep(0.01)


def test_an_operation(operation: tuple[str, str], mode: GenerationMode) -> None:
    fuzz(operation, mode, QUICK)


def test_the_document_names_all_that_answers() -> None:
    """What is not in it is not fuzzed: the page, the documentation itself, and the second names of addresses."""
    app = Application().current
    routes = {getattr(route, "path", "") for route in app.routes}
    assert len(app.openapi()["paths"]) >= 8
    assert routes - set(app.openapi()["paths"]) <= {
        "/",
        "/caption",
        *(f"/v2/models/{{name}}/versions/{{version}}{what}" for what in ("", "/ready", "/infer")),
        "/docs",
        "/docs/oauth2-redirect",
        "/openapi.json",
        "",
    }


def test_the_bounds_of_options_are_told_in_json_schema() -> None:
    """pydantic writes `ge` where a bound stands beside a validator, and no client knows that word."""
    parameters = Application().current.openapi()["paths"]["/v1/caption"]["post"]["parameters"]
    schemas = {each["name"]: each["schema"] for each in parameters}
    assert {"minimum": 0, "type": "number"} in schemas["tau"]["anyOf"]
    assert {"minimum": 1, "type": "integer"} in schemas["timeout_ms"]["anyOf"]


@pytest.mark.long
def test_an_operation_at_length(operation: tuple[str, str], mode: GenerationMode) -> None:
    fuzz(operation, mode, LONG)


def fuzz(operation: tuple[str, str], mode: GenerationMode, examples: int) -> None:
    path, method = operation
    wait_ready()
    seen: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    found = schema()[path][method.upper()]
    # Put into a case that is to be good, a photo can make good what schemathesis meant to be bad.
    names = [name for name in CHECKED if mode.is_negative or name != "negative_data_rejection"]
    checks = [CHECKS.get_one(name) for name in names]

    # Derandomized: the same examples in each run, and a failure prints its request as a curl command.
    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=found.as_strategy(generation_mode=mode), good=st.booleans(), how=st.sampled_from(sorted(HOW)))
    def one(case: schemathesis.Case, good: bool, how: str) -> None:
        if case.path == INFER:
            case.path_parameters["name"] = "fake"  # else nothing of the body would be looked at
        if good and mode.is_positive:
            put_a_photo_in(case)
        # No schema says which values of these headers mean something.
        response = case.call(headers=HOW[how] if case.path == CAPTION else None)
        seen[response.status_code] += 1
        kinds[response.headers.get("content-type", [""])[0]] += 1
        case.validate_response(response, checks=[*checks, told_as_a_problem])

    one()
    # Were all of one kind refused, the options would never have met a picture, or nothing would have been wrong.
    if mode.is_positive:
        # No example knows what there is at an address, but for the model's.
        assert seen[200] > 0 or ("{" in path and not path.startswith("/v2")), seen
        if path == CAPTION:
            assert seen[202] > 0, seen
            assert kinds["text/event-stream"] > 0, kinds
    else:
        assert sum(count for status, count in seen.items() if 400 <= status < 500) > examples / 2, seen


def put_a_photo_in(case: schemathesis.Case) -> None:
    """Random bytes are no picture, and options would never be looked at. Nor would they be with two thresholds at once,
    an option twice, or a speed that nothing has. Under `/v2` the model must be ours too.
    """
    if "name" in case.path_parameters:
        case.path_parameters["name"] = "fake"
    if case.path == INFER:
        if case.media_type == "application/json":
            case.headers.pop(HEADER_LENGTH, None)
            encoded = base64.b64encode(pictures.jpeg()).decode()
            case.body["inputs"] = [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [encoded]}]
            case.body.pop("parameters", None)
            case.body.pop("outputs", None)
        return
    named = set(CaptionOptions.model_fields)
    for options in (case.query, case.body):
        if isinstance(options, dict):
            for name in set(options) - named - {"image", "images"}:
                del options[name]
            for name, (lowest, highest) in RANGES.items():
                if name in options and not in_range(options[name], lowest, highest):
                    del options[name]
            named -= set(options)  # what the query says, the body may not say again
            if "tau" in options:
                for name in SPEEDS:
                    options.pop(name, None)
                named -= SPEEDS
            elif found := [name for name in sorted(SPEEDS) if name in options]:
                for name in found[1:]:  # one at a time: they could contradict each other
                    del options[name]
                named -= SPEEDS | {"tau"}
    if isinstance(case.body, dict) and "images" in case.body:
        case.body["images"] = [pictures.jpeg()] * 2
    elif isinstance(case.body, dict) and "image" in case.body:
        whole = pictures.jpeg()
        case.body["image"] = base64.b64encode(whole).decode() if case.media_type == "application/json" else whole
    elif str(case.media_type).startswith(("image/", "application/octet-stream")):
        case.body = pictures.jpeg()


def in_range(value: object, lowest: float, highest: float) -> bool:
    """Also of a number as text, which is what a query has."""
    try:
        return lowest <= float(value) <= highest
    except (TypeError, ValueError):
        return False


def told_as_a_problem(ctx: Any, response: Any, case: Any) -> None:
    """Every error is an RFC 9457 problem in our shape, or, under `/v2`, has that protocol's; and none is a failure of
    ours."""
    if response.status_code < 400:
        return
    headers = {name.lower(): ", ".join(values) for name, values in response.headers.items()}
    if case.path.startswith("/v2"):
        said = response.json()
        assert headers["content-type"] == "application/json"
        assert set(said) == {"error"}
        code = said["error"].split(":")[0]
        assert KINDS[code].status == response.status_code
        assert response.status_code < 500 or code in DOCUMENTED_SERVER_ERRORS
        return
    assert not (fault := problem_fault(response.status_code, headers, response.content)), fault
    if response.status_code >= 500:
        assert response.json()["code"] in DOCUMENTED_SERVER_ERRORS, response.json()
