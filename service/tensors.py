"""Tensors of the Open Inference Protocol v2 on the wire: in JSON, and as the binary tensor data extension has them.

https://github.com/kserve/open-inference-protocol, `specification/protocol/inference_rest.md` and
`extension_binary_data.md` (the latter is Triton's).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import Problem, printable

HEADER_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON, after which the binary data begins
# Little-endian, whatever the machine.
_NUMBERS = {
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
}
_WRITTEN = {**_NUMBERS, "BOOL": np.dtype("?")}
_LONGEST_HEADER = 20  # digits
Value = bytes | str | float | int


class InferInput(BaseModel):
    """A list that came with a request. Its data is here, or after the JSON, `binary_data_size` bytes of it."""

    model_config = ConfigDict(strict=True)

    name: str
    shape: list[int] = Field(min_length=1, max_length=1)
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class InferOutputRequest(BaseModel):
    """A tensor that is asked for."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(BaseModel):
    """What a client sends to `infer`."""

    model_config = ConfigDict(strict=True)

    id: str | None = Field(None, description="Comes back with the answer.")
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InferInput] = Field(max_length=16)
    outputs: list[InferOutputRequest] | None = Field(
        None, max_length=16, description="All of them where this is left out."
    )


@dataclass(frozen=True)
class Tensor:
    """A tensor, flat in row-major order. BYTES hold `bytes` where they came in binary and `str` where in JSON."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Value]


def read_infer(body: bytes, header_length: str | None, longest: int) -> tuple[InferRequest, list[Tensor]]:
    """The request and its inputs, each of `longest` values at most. `header_length` is the header of that name, None
    where there is none.

    Raises `Problem`: `malformed_json`, `bad_request` (lengths that do not add up), `invalid_request`.
    """
    end = len(body) if header_length is None else _length(header_length, len(body))
    try:
        document = json.loads(body[:end])
    except (ValueError, RecursionError) as error:
        raise Problem("malformed_json", printable(str(error), 200)) from error
    try:
        request = InferRequest.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)[:5]
        said = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in errors)
        raise Problem("invalid_request", printable(said, 500)) from error
    tensors = []
    for each in request.inputs:
        if not 1 <= each.shape[0] <= longest:  # before anything is done that takes as long
            raise Problem("invalid_request", f"{_named(each)}: from 1 to {longest} values are taken.")
        size = each.parameters.get("binary_data_size")
        if size is None:
            tensors.append(_from_json(each))
            continue
        if type(size) is not int or not 0 <= size <= len(body) - end:
            raise Problem("bad_request", f"{_named(each)}: binary_data_size goes beyond the body.")
        tensors.append(_from_binary(each, body[end : end + size]))
        end += size
    if end != len(body):
        raise Problem("bad_request", f"The body goes on for {len(body) - end} bytes after its last tensor.")
    return request, tensors


def write_infer(
    document: dict[str, Any], tensors: Sequence[Tensor], binary: Callable[[str], bool]
) -> tuple[bytes, int]:
    """The answer's body, and the length of the JSON at its start. `binary` tells by name which are not in it."""
    outputs, raw = [], []
    for tensor in tensors:
        output: dict[str, Any] = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype}
        if binary(tensor.name):
            raw.append(_to_binary(tensor))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = list(tensor.values)
        outputs.append(output)
    header = json.dumps({**document, "outputs": outputs}, allow_nan=False).encode()
    return b"".join([header, *raw]), len(header)


def _length(said: str, whole: int) -> int:
    if not (said.isascii() and said.isdecimal() and len(said) <= _LONGEST_HEADER and int(said) <= whole):
        raise Problem("bad_request", f"{HEADER_LENGTH} {printable(said)} is no length within the body.")
    return int(said)


def _from_json(tensor: InferInput) -> Tensor:
    if tensor.data is None:
        # Shared memory among them: a server that others reach over a network has none with them.
        raise Problem("invalid_request", f"{_named(tensor)}: there must be data, here or in binary after the JSON.")
    _check_count(tensor, len(tensor.data))
    if not all(map(_kind(tensor), tensor.data)):
        raise Problem("invalid_request", f"{_named(tensor)}: not all of its data is {printable(tensor.datatype)}.")
    return Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), tensor.data)


def _kind(tensor: InferInput) -> Callable[[Any], bool]:
    """Whether a JSON value is one of the tensor's datatype. Raises `Problem` for a datatype that no input has."""
    if tensor.datatype == "BYTES":
        return lambda value: isinstance(value, str)
    if tensor.datatype not in _NUMBERS:
        raise Problem("invalid_request", f"{_named(tensor)}: the datatype {printable(tensor.datatype)} is not taken.")
    whole = _NUMBERS[tensor.datatype].kind != "f"
    return lambda value: type(value) is int or (type(value) is float and not whole)


def _from_binary(tensor: InferInput, raw: bytes) -> Tensor:
    if tensor.data is not None:
        raise Problem("invalid_request", f"{_named(tensor)}: its data is here and in binary too.")
    _kind(tensor)
    values: list[Any]
    if tensor.datatype == "BYTES":
        values = _bytes_elements(tensor, raw)
    else:
        number = _NUMBERS[tensor.datatype]
        if len(raw) % number.itemsize:
            raise Problem("bad_request", f"{_named(tensor)}: {len(raw)} bytes are no {tensor.datatype} numbers.")
        values = np.frombuffer(raw, number).tolist()
    _check_count(tensor, len(values))
    return Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), values)


def _bytes_elements(tensor: InferInput, raw: bytes) -> list[bytes]:
    """Each element as its length, four bytes, little-endian, and then itself."""
    values: list[bytes] = []
    at = 0
    while at < len(raw) and len(values) <= tensor.shape[0]:
        begin = at + 4
        at = begin + int.from_bytes(raw[at:begin], "little")
        if begin > len(raw) or at > len(raw):
            raise Problem("bad_request", f"{_named(tensor)}: the length of an element goes beyond its data.")
        values.append(raw[begin:at])
    return values


def _to_binary(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return np.array(tensor.values, _WRITTEN[tensor.datatype]).tobytes()
    elements = [value if isinstance(value, bytes) else str(value).encode() for value in tensor.values]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _named(tensor: InferInput) -> str:
    return f"input {printable(tensor.name)}"


def _check_count(tensor: InferInput, count: int) -> None:
    if count != tensor.shape[0]:
        raise Problem("invalid_request", f"{_named(tensor)}: its shape is {tensor.shape}, and that is not its data's.")
