"""Reads pickles of dictionaries, lists, texts, numbers and NumPy arrays, and refuses all others: it runs no code.

A pickle is a program that may call any function it names. Here the few names that an array's pickle uses stand for
classes of ours that only take notes, and every other name is an error. Bytes become arrays after they were checked.
"""

from __future__ import annotations

import codecs
import io
import pickle
from typing import Any

import numpy as np

NUMBER_TYPES = ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")


class UnsafePickleError(ValueError):
    """The file names something other than arrays and plain values, or is no whole pickle. Nothing of it was run."""


class _Type:
    """What a `numpy.dtype` is called with, and its byte order."""

    def __init__(self, name: object, *_: object) -> None:
        if name not in NUMBER_TYPES:
            raise UnsafePickleError(f"an array of {name!r}, not of numbers")
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise UnsafePickleError("an array type that cannot be read")
        self.order = state[1]

    def real(self) -> np.dtype:
        return np.dtype(self.order + self.name)


class _Array:
    """An array's state; `array` is there once it is complete."""

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnsafePickleError("an array that cannot be read")
        _, shape, kind, columns_first, content = state
        self.array = _to_array(content, kind, shape, "F" if columns_first else "C")


class _ArrayType:
    """Stands for the name `numpy.ndarray`."""


def _to_array(content: object, kind: object, shape: object, order: object) -> np.ndarray:
    if isinstance(content, str):  # from Python 2
        content = content.encode("latin-1")
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, _Type):
        raise UnsafePickleError("an array of other things than numbers")
    if not isinstance(shape, tuple) or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise UnsafePickleError(f"an array of shape {shape!r}")
    values = np.frombuffer(bytes(content), kind.real()) if content else np.zeros(0, kind.real())
    if values.size != int(np.prod(shape, dtype=object)):
        raise UnsafePickleError(f"{values.size} numbers for an array of shape {shape}")
    return values.reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(content: object, kind: object, shape: object, order: object) -> _Array:
    made = _Array()
    made.array = _to_array(content, kind, shape, order)
    return made


def _scalar(kind: object, content: object = b"") -> object:
    return _to_array(content, kind, (), "C").item()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How Python 3 writes bytes into a pickle that Python 2 can read."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError("text that is no bytes")
    return codecs.encode(text, "latin-1")


def _no_bytes() -> bytes:
    """How Python 3 writes that there are none."""
    return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Type,
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[_core + ".multiarray", "scalar"] = _scalar
    _ALLOWED[_core + ".numeric", "_frombuffer"] = _from_buffer


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise UnsafePickleError(f"it names {module}.{name}, which weights have no need of")
        return found


def read_pickle(content: bytes) -> Any:
    """The plain values and arrays of a pickle. Raises `UnsafePickleError` for one with anything else in it."""
    try:
        return _arrays(_Reader(io.BytesIO(content), encoding="latin1").load())
    except UnsafePickleError:
        raise
    except Exception as error:  # a broken pickle fails in any of a dozen ways
        raise UnsafePickleError(f"no whole pickle ({type(error).__name__}: {error})") from error


def _arrays(value: Any, depth: int = 0) -> Any:
    """The value with finished arrays in place of their notes. Raises `UnsafePickleError` for other objects."""
    if depth > 8:
        raise UnsafePickleError("values within values within values")
    if isinstance(value, dict):
        return {key: _arrays(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_arrays(each, depth + 1) for each in value]
    if isinstance(value, _Array):
        if not hasattr(value, "array"):
            raise UnsafePickleError("an array without content")
        return value.array
    if value is None or isinstance(value, str | bytes | bytearray | int | float):
        return value
    raise UnsafePickleError(f"a {type(value).__name__.strip('_')}, which is no weight")
