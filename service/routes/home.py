"""The pages: the playground at `/`, the API's at `/docs`, their files in `/web`; and what a problem's `type` means."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.errors import KINDS, Problem, printable
from service.schemas import ProblemKindOut

router = APIRouter()

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Everything from here and nothing from elsewhere; `blob:` is the user's own photo, shown before it is sent.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Code is asked after each time, which costs a 304: no page meets scripts of another version. Photos stay.
_ASK_AGAIN, _KEEP = "no-cache", "public, max-age=86400"


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    headers: Mapping[str, str]


@cache
def page_files() -> Mapping[str, PageFile]:
    """All that the pages are made of, by name relative to `service/web`. Read once: they do not change while we run."""
    folder = Path(str(files("service"))) / "web"
    return {
        path.relative_to(folder).as_posix(): _page_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _page_file(path: Path) -> PageFile:
    content = path.read_bytes()
    headers = {
        "Content-Type": _TYPES[path.suffix],
        "Cache-Control": _KEEP if path.suffix == ".jpg" else _ASK_AGAIN,
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:24]}"',
        **_HEADERS,
    }
    return PageFile(content, headers)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def home(request: Request) -> Response:
    return _answer(request, "index.html")


@router.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
async def api_page(request: Request) -> Response:
    return _answer(request, "api.html")


@router.api_route("/web/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def page_file(request: Request, name: str) -> Response:
    return _answer(request, name)


@router.get("/problems/{code}", tags=["operations"], summary="What a problem's `type` stands for")
async def problem(code: str) -> ProblemKindOut:
    """RFC 9457, section 3.1.1: the type's address leads to what it means."""
    if code not in KINDS:
        raise Problem("not_found", f"No problem has this code; there are {', '.join(KINDS)}.")
    kind = KINDS[code]
    return ProblemKindOut(code=code, status=kind.status, title=kind.title)


def _answer(request: Request, name: str) -> Response:
    """The file, or 304 where the client has it already (RFC 9110, 13.1.2)."""
    found = page_files().get(name)
    if found is None:
        raise Problem("not_found", f"The pages have no file {printable(name)}.")
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if "*" in known or found.headers["ETag"] in known:
        unchanged = {name: value for name, value in found.headers.items() if name != "Content-Type"}
        return Response(status_code=304, headers=unchanged)
    return Response(found.content, headers=dict(found.headers))
