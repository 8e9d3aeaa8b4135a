"""Every way a request can fail, and the one shape it is told in: RFC 9457 `application/problem+json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

PROBLEM_JSON = "application/problem+json"
OPEN_INFERENCE = "/v2"  # below it, errors have the shape of the Open Inference Protocol
WENT_WRONG = "Something went wrong here; the request id finds it in the log."  # the detail of an `internal`


@dataclass(frozen=True)
class Kind:
    """What all problems with one code have in common."""

    status: int
    title: str


# The code is what a program tests for; the status follows from it, here and nowhere else.
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "bad_request": Kind(400, "The request is not understood"),
        "empty_body": Kind(400, "The request has no body"),
        "malformed_json": Kind(400, "The body is not valid JSON"),
        "malformed_multipart": Kind(400, "The body is not valid multipart/form-data"),
        "unauthorized": Kind(401, "The request needs an API key"),
        "not_found": Kind(404, "There is nothing at this address"),
        "unknown_job": Kind(404, "There is no such job"),
        "method_not_allowed": Kind(405, "This address does not take this method"),
        "body_timeout": Kind(408, "The body did not arrive in time"),
        "body_too_large": Kind(413, "The body is too large"),
        "unsupported_media_type": Kind(415, "The body's type is not accepted"),
        "not_an_image": Kind(415, "The data is not an image of a known format"),
        "missing_image": Kind(422, "The request holds no image"),
        "too_many_images": Kind(422, "The request holds too many images"),
        "repeated_field": Kind(422, "A field was given more than once"),
        "bad_base64": Kind(422, "The image is not valid base64"),
        "undecodable_image": Kind(422, "The image cannot be decoded"),
        "too_many_pixels": Kind(422, "The image has too many pixels"),
        "image_too_small": Kind(422, "The image is too small"),
        "unknown_option": Kind(422, "An option is not known"),
        "invalid_option": Kind(422, "An option has a value that is not allowed"),
        "unknown_speed": Kind(422, "The speed is not one that the model offers"),
        "key_reused": Kind(422, "The Idempotency-Key was used for another request"),
        "invalid_request": Kind(422, "The request is not as it should be"),
        "quota_exceeded": Kind(429, "The key's quota is used up"),
        "head_too_large": Kind(431, "The head of the request is too large"),
        # No one reads it; it keeps requests whose client hung up apart in logs and metrics (nginx's number).
        "client_gone": Kind(499, "The client has gone"),
        "internal": Kind(500, "The service failed"),
        "poison": Kind(500, "The photo made workers fail; do not send it again"),
        "not_ready": Kind(503, "The model is not ready"),
        "overloaded": Kind(503, "The service is busy"),
        "stopping": Kind(503, "The service is stopping"),
        "no_worker": Kind(503, "No worker is there"),
        "unavailable": Kind(503, "The queue cannot be reached"),
        "deadline_exceeded": Kind(504, "No answer in time"),
    }
)
_CODE_OF_STATUS = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 422: "invalid_request"}


class Problem(Exception):
    """Raised anywhere in the service to end the request with the problem `code` of `KINDS`.

    `detail` is for the person who sent the request: what is wrong and what would be right.
    `retry_after` in whole seconds becomes the Retry-After header (RFC 9110, 10.2.3); `headers` go with it.
    """

    def __init__(
        self, code: str, detail: str, *, retry_after: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.kind = KINDS[code]
        self.retry_after = retry_after
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self.headers.update(headers or {})


def printable(text: str, limit: int = 60) -> str:
    """What a client sent, safe to say back in a `detail`: shortened, and without lone surrogates."""
    shown = text if len(text) <= limit else text[:limit] + "…"
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def problem_document(code: str, detail: str, request_id: str, status: int | None = None) -> dict[str, Any]:
    """The members of RFC 9457, section 3.1, and our two extensions `code` and `request_id`."""
    kind = KINDS[code]
    return {
        "type": f"/problems/{code}",
        "title": kind.title,
        "status": status or kind.status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }


def problem_response(
    request: Request, code: str, detail: str, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer for a problem, under `/v2` in that protocol's own shape; the request's state remembers its code for
    the metrics.
    """
    request.state.outcome = code
    path = request.scope["path"]
    if path == OPEN_INFERENCE or path.startswith(OPEN_INFERENCE + "/"):
        return JSONResponse({"error": f"{code}: {detail}"}, status or KINDS[code].status, headers=dict(headers or {}))
    document = problem_document(code, detail, request.state.request_id, status)
    return JSONResponse(document, document["status"], headers=dict(headers or {}), media_type=PROBLEM_JSON)


def install_handlers(app: FastAPI) -> None:
    """Makes the app tell its own and the framework's errors as problems."""

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return problem_response(request, error.code, error.detail, headers=error.headers)

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = error.status_code
        code = _CODE_OF_STATUS.get(status, "internal" if status >= 500 else "bad_request")
        detail = f"{request.method} {printable(request.url.path)}: {error.detail or HTTPStatus(status).phrase}"
        return problem_response(request, code, detail, status=status, headers=error.headers)

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return problem_response(request, "invalid_request", printable(said, 500))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
