"""Writes the table of all settings: `python -m service.settings_docs > docs/settings.md` after any change to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from service.settings import PREFIX, Settings

HEAD = """# Settings

Every setting is a variable of the environment. A name that begins with `DEECAP_` and is not in this table stops the
start, and so does a value that cannot be; the message names it. What was read is logged at the start, without keys and
passwords. `DEECAP_CLIENT_URL` and `DEECAP_CLIENT_KEY` are no settings of the service: its clients read them
([api.md](api.md)).

| Name | Value | Default | What it does |
| --- | --- | --- | --- |
"""
_KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", SecretStr: "secret"}


def settings_table() -> str:
    """The whole page, in Markdown."""
    rows = [_row(name, field) for name, field in Settings.model_fields.items()]
    return HEAD + "\n".join(rows) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    words = (field.description or "").replace("|", "\\|")
    return f"| `{PREFIX}{name.upper()}` | {_kind(field.annotation)} | {_default(field)} | {words} |"


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    plain = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    return _KINDS[plain[0]]


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:  # a path of this machine, which its description names
        return ""
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(settings_table(), end="")
