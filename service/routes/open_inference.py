"""`/v2`: the Open Inference Protocol, so that clients of KServe and Triton can caption without one of ours."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from service.errors import Problem, printable
from service.front import Front
from service.images import check_header
from service.jobs import Answer, Job, ModelInfo
from service.requirements_check import installed_version
from service.routes.asking import new_job, unless_gone
from service.routes.context import Context, context_of
from service.routes.open_inference_docs import (
    INFER,
    INFER_RESPONSES,
    NOT_READY_ERRORS,
    LiveOut,
    ModelMetadataOut,
    ModelReadyOut,
    ReadyOut,
    ServerMetadataOut,
    TensorMetadataOut,
    error_responses,
)
from service.routes.reading import from_base64, read_body, refuse_encoded
from service.schemas import CaptionOptions, read_options
from service.tensors import HEADER_LENGTH, InferOutputRequest, InferRequest, Tensor, Value, read_infer, write_infer

VERSION = "1"  # of what goes in and out; which weights answered is in the answer's parameters
ALIAS = "deecap"  # whatever model is served: a client that says so goes on across a change of models
IMAGE = "image"
# Name, datatype and shape, as the metadata tell them; -1 is the number of photos, or of words.
INPUTS = (
    TensorMetadataOut(name=IMAGE, datatype="BYTES", shape=[-1]),
    TensorMetadataOut(name="speed", datatype="BYTES", shape=[-1], parameters={"optional": True}),
    TensorMetadataOut(name="tau", datatype="FP32", shape=[-1], parameters={"optional": True}),
    TensorMetadataOut(name="beam", datatype="INT32", shape=[-1], parameters={"optional": True}),
)
OUTPUTS = (
    TensorMetadataOut(name="caption", datatype="BYTES", shape=[-1]),
    TensorMetadataOut(name="confidence", datatype="FP32", shape=[-1]),
    TensorMetadataOut(name="speedup", datatype="FP32", shape=[-1]),
    TensorMetadataOut(name="promised", datatype="FP32", shape=[-1]),
    TensorMetadataOut(name="moved_by_load", datatype="BOOL", shape=[-1]),
    TensorMetadataOut(name="words", datatype="BYTES", shape=[-1, -1]),
    TensorMetadataOut(name="exit_layers", datatype="INT32", shape=[-1, -1]),
)
# What clients and gateways put among the parameters by themselves. It says nothing of how to caption.
_OF_THE_PROTOCOL = {
    "binary_data_output", "content_type", "headers", "sequence_id", "sequence_start", "sequence_end",
}  # fmt: skip
# No output tells of these.
_OPTIONS = [name for name in CaptionOptions.model_fields if name not in ("regions", "attention")]


def _version(request: Request) -> str:
    """Of the path, where it has one. As a plain parameter with a default it would be one of the query."""
    return str(request.path_params.get("version", VERSION))


Version = Annotated[str, Depends(_version)]

router = APIRouter(prefix="/v2", tags=["open inference protocol"])


@router.get("/health/live", summary="Does the server answer")
async def live() -> LiveOut:
    """As `/livez`."""
    return LiveOut()


@router.get("/health/ready", summary="Can the server caption now", responses=NOT_READY_ERRORS)
async def ready(request: Request) -> ReadyOut:
    """As `/readyz`."""
    context_of(request).front.check_ready()
    return ReadyOut()


@router.get("", summary="The server", responses=error_responses("unauthorized"))
async def server() -> ServerMetadataOut:
    """Name, version and extensions."""
    return ServerMetadataOut(
        name="deecap", version=installed_version("deecap") or "unknown", extensions=["binary_tensor_data"]
    )


_OF_A_MODEL = {**NOT_READY_ERRORS, **error_responses("unauthorized", "not_found")}


@router.get("/models/{name}", summary="The model's tensors", responses=_OF_A_MODEL)
@router.get("/models/{name}/versions/{version}", include_in_schema=False)
async def metadata(request: Request, name: str, version: Version) -> ModelMetadataOut:
    """Its inputs and outputs. The name is that of `/v1/model`, or `deecap` for whatever model is served."""
    front = context_of(request).front
    info = _found(front.info or front.check_ready(), name, version)  # known of a model that is not ready, too
    return ModelMetadataOut(
        name=info.name, versions=[VERSION], platform="deecap", inputs=list(INPUTS), outputs=list(OUTPUTS)
    )


@router.get("/models/{name}/ready", summary="Can the model caption now", responses=_OF_A_MODEL)
@router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
async def model_ready(request: Request, name: str, version: Version) -> ModelReadyOut:
    """As `/readyz`."""
    return ModelReadyOut(name=_found(context_of(request).front.check_ready(), name, version).name)


@router.post("/models/{name}/infer", summary="Caption photos", responses=INFER_RESPONSES, openapi_extra=INFER)
@router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
async def infer(request: Request, name: str, version: Version) -> Response:
    """One photo or several; if one of them cannot be captioned, none is.

    In JSON an element of `image` is base64; in binary (Inference-Header-Content-Length) it is the file itself.
    `speed`, `tau` and `beam` are tensors of one value for all photos or of one for each, or parameters of the request.
    """
    context = context_of(request)
    model = _found(context.front.check_ready(), name, version)  # before the body: see /v1/caption
    context.charge(request)
    settings = context.settings
    refuse_encoded(request)
    body = await read_body(request, settings.max_body_bytes, settings.timeout_ms / 1000)
    asked, jobs = await asyncio.to_thread(_read, request, model, body)
    context.charge(request, len(jobs))
    answers = await unless_gone(request, _all(context.front, jobs))
    return await asyncio.to_thread(_respond, asked, answers)


def _found(info: ModelInfo, name: str, version: str) -> ModelInfo:
    """Raises `Problem` `not_found` unless this is the model that is asked for."""
    if name not in (info.name, ALIAS):
        raise Problem("not_found", f"No model {printable(name)} is served; there is {info.name}, also called {ALIAS}.")
    if version != VERSION:
        raise Problem("not_found", f"The model has no version {printable(version)}; there is {VERSION}.")
    return info


def _read(request: Request, model: ModelInfo, body: bytes) -> tuple[InferRequest, list[Job]]:
    """What is asked for, and a job for each photo. Raises `Problem`."""
    context = context_of(request)
    asked, tensors = read_infer(body, request.headers.get(HEADER_LENGTH), context.settings.max_images)
    inputs = _by_name(tensors)
    _check_outputs(asked.outputs or [])
    shared = _shared_options(asked.parameters)
    images = inputs.pop(IMAGE)
    jobs = []
    for number, value in enumerate(images.values):
        options = read_options(shared + [(name, _one(tensor, number)) for name, tensor in inputs.items()])
        image = _image(value, number, context, alone=len(images.values) == 1)
        jobs.append(new_job(request, model.speeds, image, options))
    return asked, jobs


def _by_name(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs, `image` among them, each of one value or of one for each photo. Raises `Problem`."""
    inputs: dict[str, Tensor] = {}
    known = {each.name: each.datatype for each in INPUTS}
    for tensor in tensors:
        if tensor.name not in known:
            name, names = printable(tensor.name), ", ".join(known)
            raise Problem("unknown_option", f"The model has no input {name}; it has {names}.")
        if tensor.name in inputs:
            raise Problem("repeated_field", f"The input {tensor.name} was given more than once.")
        if tensor.datatype == "BYTES" and known[tensor.name] != "BYTES":  # while a speed may be a number
            raise Problem("invalid_request", f"input {tensor.name}: it must be {known[tensor.name]}.")
        inputs[tensor.name] = tensor
    if IMAGE not in inputs:
        raise Problem("missing_image", f"There must be an input `{IMAGE}`.")
    if inputs[IMAGE].datatype != "BYTES":
        raise Problem("invalid_request", f"input {IMAGE}: it must be BYTES, each element a whole file.")
    count = len(inputs[IMAGE].values)
    for tensor in inputs.values():
        if len(tensor.values) not in (1, count):
            raise Problem("invalid_request", f"input {tensor.name}: one value, or one for each of {count} photos.")
    return inputs


def _check_outputs(outputs: Sequence[InferOutputRequest]) -> None:
    names = [each.name for each in outputs]
    known = [each.name for each in OUTPUTS]
    for name in names:
        if name not in known:
            raise Problem("unknown_option", f"The model has no output {printable(name)}; it has {', '.join(known)}.")
        if names.count(name) > 1:
            raise Problem("repeated_field", f"The output {name} was asked for more than once.")


def _shared_options(parameters: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The options of all photos. `timeout` and `priority` also as Triton has them: microseconds, and a number that is
    the more urgent the lower it is. Raises `Problem`.
    """
    options: list[tuple[str, object]] = []
    for name, value in parameters.items():
        if name == "timeout":
            if type(value) is not int or value < 1:
                raise Problem("invalid_option", "timeout: must be a whole number of microseconds, 1 or more")
            options.append(("timeout_ms", math.ceil(value / 1000) if value < 10**15 else value))
        elif name == "priority" and type(value) is int:
            options.append((name, "interactive" if value <= 1 else "batch"))
        elif name in _OPTIONS:
            options.append((name, value))
        elif name not in _OF_THE_PROTOCOL:
            raise Problem("unknown_option", f"Not known: {printable(name)}. Known: {', '.join(_OPTIONS)}, timeout.")
    return options


def _one(tensor: Tensor, number: int) -> Value:
    """The value for that photo, text as such."""
    value = tensor.values[number if len(tensor.values) > 1 else 0]
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _image(value: Value, number: int, context: Context, alone: bool) -> bytes:
    """The photo's bytes, its header looked at. Raises `Problem` that says which one it is about."""
    try:
        image = value if isinstance(value, bytes) else from_base64(str(value))
        if not image:
            raise Problem("missing_image", "It is empty.")
        check_header(image, context.limits)
    except Problem as problem:
        raise problem if alone else _about(number, problem) from problem
    return image


async def _all(front: Front, jobs: Sequence[Job]) -> list[Answer]:
    """The answers in order. As soon as one job fails, the others are given up and its `Problem` is raised."""
    tasks = [asyncio.ensure_future(front.caption(job)) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for number, task in enumerate(tasks):
            error = task.exception() if task.done() else None
            if error is not None:
                raise _about(number, error) if isinstance(error, Problem) and len(jobs) > 1 else error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _about(number: int, problem: Problem) -> Problem:
    return Problem(problem.code, f"image[{number}]: {problem.detail}", retry_after=problem.retry_after)


def _respond(asked: InferRequest, answers: Sequence[Answer]) -> Response:
    wanted = [each.name for each in asked.outputs or OUTPUTS]
    in_binary = {each.name for each in asked.outputs or [] if each.parameters.get("binary_data") is True}
    others = {each.name for each in asked.outputs or [] if "binary_data" in each.parameters}
    by_default = asked.parameters.get("binary_data_output") is True

    def binary(name: str) -> bool:
        return name in in_binary or (by_default and name not in others)

    document = {
        **({} if asked.id is None else {"id": asked.id}),
        "model_name": answers[0].model,
        "model_version": VERSION,
        "parameters": {"revision": answers[0].revision},
    }
    tensors = _outputs(answers)
    body, header = write_infer(document, [tensors[name] for name in wanted], binary)
    if len(body) == header and not any(map(binary, wanted)):
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header)})


def _outputs(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """By name. Captions shorter than the longest of them end in empty words that left at layer 0."""
    captions = [answer.caption for answer in answers]
    longest = max(len(caption.words) for caption in captions)
    texts: list[Value] = []
    exits: list[Value] = []
    for caption in captions:
        missing = longest - len(caption.words)
        texts += [word.text for word in caption.words] + [""] * missing
        exits += [word.exit_layer for word in caption.words] + [0] * missing
    values: dict[str, Sequence[Value]] = {
        "caption": [caption.text for caption in captions],
        "confidence": [caption.confidence for caption in captions],
        "speedup": [caption.speedup for caption in captions],
        "promised": [caption.speed.promised for caption in captions],
        "moved_by_load": [answer.asked is not None for answer in answers],
        "words": texts,
        "exit_layers": exits,
    }
    shapes = {1: (len(captions),), 2: (len(captions), longest)}
    return {each.name: Tensor(each.name, each.datatype, shapes[len(each.shape)], values[each.name]) for each in OUTPUTS}
