"""What the OpenAPI page says of `/v2`, the Open Inference Protocol: its answers, its one shape of errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from service.errors import KINDS
from service.routes.caption_docs import NOT_READY, TINY_PNG, problem_responses
from service.tensors import HEADER_LENGTH, InferRequest

_REFS = "#/components/schemas/{model}"


class LiveOut(BaseModel):
    """The server answers."""

    live: bool = True


class ReadyOut(BaseModel):
    """The server captions."""

    ready: bool = True


class ModelReadyOut(BaseModel):
    """The model captions."""

    name: str
    ready: bool = True


class ServerMetadataOut(BaseModel):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadataOut(BaseModel):
    """One input or output."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 for any number.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="`optional`: it may be left out.")


class ModelMetadataOut(BaseModel):
    """The model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadataOut]
    outputs: list[TensorMetadataOut]


class InferOutput(BaseModel):
    """A tensor that is answered. `data` is left out where it comes in binary after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] = Field(default_factory=list)


class InferOut(BaseModel):
    """The answer of `infer`."""

    id: str = Field("", description="As it was sent; not there where there was none.")
    model_name: str
    model_version: str
    parameters: dict[str, Any] = Field(description="`revision`: of the model that answered.")
    outputs: list[InferOutput]


class InferErrorOut(BaseModel):
    """Every error under `/v2`."""

    error: str = Field(description="The problem's code as elsewhere, a colon, and what is wrong with this request.")


def error_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """As `problem_responses`, with the same headers, in the protocol's shape."""
    responses = problem_responses(*codes)
    for response in responses.values():
        [problems] = response["content"].values()
        examples = {
            code: {"summary": KINDS[code].title, "value": {"error": f"{code}: {example['value']['detail']}"}}
            for code, example in problems["examples"].items()
        }
        schema = {"$ref": _REFS.format(model=InferErrorOut.__name__)}
        response["content"] = {"application/json": {"schema": schema, "examples": examples}}
    return responses


def add_infer_schemas(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with the schemas that are referred to here, and without FastAPI's own 422 under `/v2`: a
    path's name may be any text."""
    schemas = document["components"]["schemas"]
    for model in (InferRequest, InferOut, InferErrorOut):
        schema = model.model_json_schema(ref_template=_REFS)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for path, operations in document["paths"].items():
        for operation in operations.values() if path.startswith("/v2") else ():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    return document


NOT_READY_ERRORS = error_responses(*NOT_READY)

INFER: dict[str, Any] = {
    "parameters": [
        {
            "name": HEADER_LENGTH,
            "in": "header",
            "required": False,
            "description": "Bytes of JSON at the body's begin, where tensors follow in binary.",
            "schema": {"type": "integer", "minimum": 0},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _REFS.format(model=InferRequest.__name__)},
                "examples": {
                    "tier": {
                        "summary": "One photo, a named speed",
                        "value": {
                            "inputs": [
                                {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TINY_PNG]},
                                {"name": "speed", "shape": [1], "datatype": "BYTES", "data": ["fast"]},
                            ]
                        },
                    },
                },
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}

INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The captions",
        "headers": {
            HEADER_LENGTH: {
                "description": "Bytes of JSON, where tensors follow in binary.",
                "schema": {"type": "integer"},
            },
        },
        "content": {
            "application/json": {"schema": {"$ref": _REFS.format(model=InferOut.__name__)}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    **error_responses(
        "bad_request",
        "malformed_json",
        "unauthorized",
        "not_found",
        "body_timeout",
        "body_too_large",
        "unsupported_media_type",
        "not_an_image",
        "missing_image",
        "repeated_field",
        "bad_base64",
        "undecodable_image",
        "too_many_pixels",
        "image_too_small",
        "unknown_option",
        "invalid_option",
        "unknown_speed",
        "invalid_request",
        "quota_exceeded",
        "internal",
        "poison",
        *NOT_READY,
        "overloaded",
        "deadline_exceeded",
    ),
}
