"""Writes the reference of all addresses: `python -m service.api_reference > docs/api-reference.md` after any change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from service.app import create_app
from service.settings import Settings

HEAD = """# API reference

Written by `python -m service.api_reference` from the service's OpenAPI document, which a running service has at
`/openapi.json`; not to be edited. [The HTTP API](api.md) is the page to read first.
"""
_METHODS = ("get", "post", "put", "patch", "delete")

Schema = dict[str, Any]


def api_reference() -> str:
    """The whole page, in Markdown: every operation by its tag, then every schema."""
    document = create_app(Settings.model_construct()).openapi()
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if method in operations:
                operation = operations[method]
                tag = operation.get("tags", ["other"])[0]
                groups.setdefault(tag, []).append("\n".join(_operation(method, path, operation)))
    parts = [HEAD]
    for tag, told in groups.items():
        parts += [f"## {tag.capitalize()}\n", *told]
    parts.append("## Schemas\n")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append("\n".join(_schema(name, schema)))
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}\n"
    yield f"{_line(operation.get('summary'))}.\n"
    if operation.get("description"):
        yield operation["description"].strip() + "\n"
    rows = [
        (f"`{each['name']}`", each["in"], _kind(each.get("schema", {})), _line(each.get("description")))
        for each in operation.get("parameters", [])
    ]
    if rows:
        yield from _table(("Parameter", "In", "Value", "What it is"), rows)
    bodies = operation.get("requestBody", {}).get("content", {})
    known = {each["name"] for each in operation.get("parameters", [])}
    for types, schema in _alike(bodies):
        members = schema.get("properties", {})
        also = known & set(members)
        told = f"{_kind(schema)}, with the parameters above as members too" if also else _kind(schema)
        yield f"Body as {types}: {told}.\n"
        own = {name: each for name, each in members.items() if name not in also}
        yield from _properties({**schema, "properties": own})
    answers = []
    for status, answer in operation.get("responses", {}).items():
        holds = "; ".join(f"{types}: {_kind(schema)}" for types, schema in _alike(answer.get("content", {})))
        answers.append((status, _line(answer.get("description")), holds))
    yield from _table(("Status", "When", "Answer"), answers)


def _schema(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}\n"
    if schema.get("description"):
        yield schema["description"].strip() + "\n"
    if schema.get("properties"):
        yield from _properties(schema)
    else:
        yield f"{_kind(schema)}\n"


def _properties(schema: Schema) -> Iterator[str]:
    required = set(schema.get("required", ()))
    rows = [
        (f"`{name}`", _kind(each), "yes" if name in required else "", _line(each.get("description")))
        for name, each in schema.get("properties", {}).items()
    ]
    if rows:
        yield from _table(("Member", "Value", "Always there", "What it is"), rows)


def _alike(content: dict[str, Any]) -> Iterator[tuple[str, Schema]]:
    """Media types that hold the same are told of once."""
    told: dict[str, list[str]] = {}
    for media_type, each in content.items():
        told.setdefault(json.dumps(each.get("schema", {}), sort_keys=True), []).append(f"`{media_type}`")
    for schema, types in told.items():
        yield ", ".join(types), json.loads(schema)


def _kind(schema: Schema) -> str:
    """What a value can be, in few words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in schema["enum"])
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices:
        return " or ".join(_kind(choice) for choice in choices)
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if schema.get("items") else "list"
    kind = "file" if schema.get("format") == "binary" else schema.get("type", "anything")
    limits = [
        f"{word} {schema[name]:g}" for name, word in (("minimum", "at least"), ("maximum", "at most")) if name in schema
    ]
    return ", ".join([kind, *limits])


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _line(text: str | None) -> str:
    """One line that is safe in a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(api_reference().rstrip())
