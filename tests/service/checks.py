"""What holds for every problem, whatever went wrong."""

from __future__ import annotations

from typing import Any

import httpx

from service.errors import KINDS


def assert_problem(response: httpx.Response, status: int, code: str, says: str = "") -> None:
    """The answer is this problem, in the one shape, and its detail says `says`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == code, problem
    assert_problem_document(problem, status, response.headers["x-request-id"])
    assert says in problem["detail"], problem["detail"]


def assert_problem_document(problem: dict[str, Any], status: int, request_id: str) -> None:
    """In the one shape, also where it stands within another document."""
    assert set(problem) == {"type", "title", "status", "detail", "code", "request_id"}
    code = problem["code"]
    assert problem["status"] == status
    assert problem["title"] == KINDS[code].title
    assert problem["type"] == f"/problems/{code}"
    assert problem["request_id"] == request_id
    assert problem["detail"]
