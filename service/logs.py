"""Logs for machines and people: one JSON object per line, or text, each with the ids of the request it is about."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TextIO

from service.settings import Settings

ACCESS = "service.access"  # one line per request


@dataclass(frozen=True)
class RequestIds:
    """By what a request is found again."""

    request_id: str = ""
    trace_id: str = ""  # of W3C Trace Context


# Set while a request, or a job of one, is being worked on: whatever is logged meanwhile is about it.
current: ContextVar[RequestIds] = ContextVar("current", default=RequestIds())  # noqa: B039  # frozen


def set_up(settings: Settings, stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream`, by default stderr, in the settings' format and from their level on.

    Replaces what was set up before, uvicorn's own handlers too.
    """
    stream = stream or sys.stderr
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.addFilter(_add_ids)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a picture is its sender's to hear
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # the access line is ours


def fields(**values: object) -> dict[str, object]:
    """The `extra` of a log call: members of their own in JSON, `name=value` in text."""
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """`time`, `level`, `logger`, `message`, then ids and fields, and `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_said(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message name=value ...` in local time."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        said = " ".join(f"{name}={value}" for name, value in _said(record).items())
        return f"{super().formatMessage(record)} {said}".rstrip()


def _add_ids(record: logging.LogRecord) -> bool:
    record.ids = current.get()
    return True


def _said(record: logging.LogRecord) -> dict[str, object]:
    """The ids, those that there are, and the fields of a record."""
    ids = asdict(getattr(record, "ids", RequestIds()))
    return {name: value for name, value in ids.items() if value} | getattr(record, "fields", {})
