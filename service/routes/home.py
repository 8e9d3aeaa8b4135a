"""The plain page at `/`, and the page behind a problem's `type`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.errors import KINDS, Problem
from service.schemas import ProblemKindOut

router = APIRouter()

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>DeeCap</title>
<h1>DeeCap</h1>
<p>Captions photos at the speed you choose. <a href="docs">How to ask</a>, <a href="v1/speeds">the speeds</a>.</p>
<pre>curl -F image=@photo.jpg -F speed=fast http://127.0.0.1:8000/v1/caption</pre>
</html>
"""


@router.get("/", include_in_schema=False)
async def home() -> HTMLResponse:
    return HTMLResponse(PAGE)


@router.get("/problems/{code}", tags=["operations"], summary="What a problem's `type` stands for")
async def problem(code: str) -> ProblemKindOut:
    """RFC 9457, section 3.1.1: the type's address leads to what it means."""
    if code not in KINDS:
        raise Problem("not_found", f"No problem has this code; there are {', '.join(KINDS)}.")
    kind = KINDS[code]
    return ProblemKindOut(code=code, status=kind.status, title=kind.title)
