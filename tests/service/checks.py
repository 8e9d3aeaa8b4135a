"""What holds for every problem, whatever went wrong."""

from __future__ import annotations

import httpx

from service.errors import KINDS


def assert_problem(response: httpx.Response, status: int, code: str, says: str = "") -> None:
    """The answer is this problem, in the one shape, and its detail says `says`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "code", "request_id"}
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["title"] == KINDS[code].title
    assert problem["type"] == f"/problems/{code}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert says in problem["detail"], problem["detail"]
