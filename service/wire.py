"""Reads what another version may have written: known fields with their types checked, unknown ones passed over.

So fronts and workers of neighbouring versions work together, as long as a field that is added has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints


class Record(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=Record)


def read(kind: type[T], said: object) -> T:
    """A dataclass of JSON values. Fields may be of `str`, `bytes`, `int`, `float`, `bool`, `Any`, literals, tuples,
    `dict`, unions of these, and dataclasses.

    Raises `ValueError` where a field without a default is missing, and where one has a value of another type.
    """
    if not isinstance(said, Mapping):
        raise ValueError(f"{kind.__name__} must be an object, not {type(said).__name__}")
    values = {}
    for name, hint, optional in _fields(kind):
        if name in said:
            value = said[name]  # most are numbers and words, of the very type
            values[name] = value if type(value) is hint else _value(hint, value, f"{kind.__name__}.{name}")
        elif not optional:
            raise ValueError(f"{kind.__name__}.{name} is missing")
    return kind(**values)


def changed(record: Record) -> dict[str, Any]:
    """The fields that are not at their default: an older version is spared those that it does not know."""
    values = {each.name: (getattr(record, each.name), each.default) for each in fields(record)}
    return {name: value for name, (value, default) in values.items() if value != default}


@cache
def _fields(kind: type[Record]) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type and whether there is a default, of each field."""
    hints = get_type_hints(kind)
    return tuple(
        (each.name, hints[each.name], each.default is not MISSING or each.default_factory is not MISSING)
        for each in fields(kind)
    )


def _value(hint: Any, said: Any, where: str) -> Any:
    """`said` as the type `hint`. `where` is for the error."""
    origin, parts = _parts(hint)
    if origin in (Union, UnionType):
        return _one_of(parts, said, where)
    if origin is tuple and isinstance(said, list | tuple):
        return _tuple(parts, said, where)
    if origin is dict and isinstance(said, dict):
        key, value = parts
        return {_value(key, name, where): _value(value, each, f"{where}.{name}") for name, each in said.items()}
    if origin is Literal and isinstance(said, str) and said in parts:
        return said
    if hint is Any or (hint in (str, bytes, bool, int, NoneType) and type(said) is hint):
        return said
    if hint is float and type(said) in (int, float):
        return _float(said, where)
    if is_dataclass(hint):
        return read(cast("type[Record]", hint), said)
    raise ValueError(f"{where}: {said!r:.60} is no {getattr(hint, '__name__', hint)}")


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


def _one_of(hints: tuple[Any, ...], said: Any, where: str) -> Any:
    for hint in hints:
        try:
            return _value(hint, said, where)
        except ValueError:
            continue
    raise ValueError(f"{where}: {said!r:.60} is none of {', '.join(str(hint) for hint in hints)}")


def _tuple(hints: tuple[Any, ...], said: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if tuple(map(type, said)) == hints:
        return tuple(said)  # a box: there are dozens in a reply
    if len(hints) == 2 and hints[1] is ...:
        return tuple(_value(hints[0], each, where) for each in said)
    if len(hints) != len(said):
        raise ValueError(f"{where}: {len(said)} values, not {len(hints)}")
    return tuple(_value(hint, each, where) for hint, each in zip(hints, said, strict=True))


def _float(said: int | float, where: str) -> float:
    try:
        return float(said)
    except OverflowError:
        raise ValueError(f"{where}: too large a number") from None
