"""Why there is no answer: one exception per kind, each with the problem's code where the service told one."""

from __future__ import annotations


class ClientError(Exception):
    """There is no answer."""


class UnreachableError(ClientError):
    """No connection, or one that broke, until the deadline."""


class UnexpectedAnswerError(ClientError):
    """Whatever answered at the address, it was not this service."""


class ProblemError(ClientError):
    """The service told a problem (RFC 9457), or something before it an error without one: then `code` is empty."""

    def __init__(
        self, status: int, code: str, detail: str, request_id: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(f"{detail} ({code})" if code else detail)
        self.status = status
        self.code = code  # of the table in docs/api.md; never changes
        self.detail = detail
        self.request_id = request_id  # by which it is found in the service's log
        self.retry_after = retry_after  # seconds, None where the service does not say


class ImageRefusedError(ProblemError):
    """The photo is none, or too large, too small, broken: sending it again does not help."""


class OptionRefusedError(ProblemError):
    """A speed or another option that the service does not offer. The caller's fault."""


class UnauthorizedError(ProblemError):
    """A key is needed, or the one that was sent is not known."""


class QuotaError(ProblemError):
    """The key's captions are used up until `retry_after`."""


class UnknownJobError(ProblemError):
    """No job of this key has the id: it was cancelled, or is no longer kept, or never was."""


class BusyError(ProblemError):
    """The service has no place, no worker or no model, and had none until the deadline."""


class DeadlineError(ProblemError):
    """The caption was not ready in time: by `timeout_ms` at the service, or by the client's own clock."""


class ServiceFailedError(ProblemError):
    """The service failed on this photo."""


_IMAGE = {
    "not_an_image", "undecodable_image", "too_many_pixels", "image_too_small", "body_too_large", "empty_body",
    "missing_image",
}  # fmt: skip
_OPTION = {"unknown_option", "invalid_option", "unknown_speed", "repeated_field", "key_reused"}
_BY_STATUS: dict[int, type[ProblemError]] = {
    401: UnauthorizedError,
    403: UnauthorizedError,  # of a gateway
    413: ImageRefusedError,
    429: QuotaError,
    500: ServiceFailedError,
    502: BusyError,
    503: BusyError,
    504: DeadlineError,
}


def problem_error(
    status: int, code: str, detail: str, request_id: str = "", retry_after: float | None = None
) -> ProblemError:
    """The exception that fits, by the code and, for one that is not known, by the status."""
    kind = _BY_STATUS.get(status, ProblemError)
    if code in _IMAGE:
        kind = ImageRefusedError
    elif code in _OPTION:
        kind = OptionRefusedError
    elif code == "unknown_job":
        kind = UnknownJobError
    return kind(status, code, detail, request_id, retry_after)
