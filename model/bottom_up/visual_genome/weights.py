"""Weight files of the Visual Genome detector that people have, read into ours, every tensor accounted for.

Three namings are known: the Caffe layers' of the release, and those of its two PyTorch ports on detectron2. `naming.py`
has them; here files are opened, without running anything in them, and the tensors brought into one form.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.bottom_up.visual_genome.config import DetectorConfig
from model.bottom_up.visual_genome.detector import Detector
from model.bottom_up.visual_genome.naming import Names, Naming, naming_of
from model.bottom_up.visual_genome.safe_pickle import UnsafePickleError, read_pickle
from model.bottom_up.visual_genome.tensors import Tensors, WeightsError

BATCH_NORM_EPSILON = 1e-5  # of Caffe's layer and of both ports
# How torch's two formats begin: a zip archive, and before 1.6 a pickle of a long "magic number".
TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


@dataclass(frozen=True)
class ReadWeights:
    """A detector with a file's weights, and what to tell about the file."""

    detector: Detector
    naming: Naming
    tensors: int  # that the file has
    unused: tuple[str, ...]  # known, checked, and of no use here


def read_weights(path: Path, config: DetectorConfig | None = None) -> ReadWeights:
    """The detector with the file's weights; without the attribute head where the file has none of its tensors.

    Raises `WeightsError`, which says what is wrong: no such file, something other than weights in it, an unknown
    naming, or tensors that are missing, unexpected, of another shape or not finite.
    """
    config = config or DetectorConfig()
    tensors = Tensors(path.name, _flat(open_weights(path), path.name))
    naming = naming_of(tensors, config)
    names = Names(naming, config)
    if not any(name in tensors for name in names.attributes()):
        config = replace(config, attributes=0)
    state = _to_state(tensors, names, config)
    total = tensors.total
    unused = tensors.finish()
    detector = Detector(config).eval().requires_grad_(False)
    detector.load_state_dict(state)
    return ReadWeights(detector, naming, total, unused)


def open_weights(path: Path) -> dict[str, Any]:
    """The file's dictionary: a pickle of NumPy arrays, or what `torch.save` wrote. Raises `WeightsError`."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            if start.startswith(TORCH_STARTS):
                content = torch.load(file, map_location="cpu", weights_only=True)
            else:
                content = read_pickle(file.read())
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from error
    except UnsafePickleError as error:
        raise WeightsError(f"{path.name} is refused: {error}") from error
    except pickle.UnpicklingError as error:
        # torch's own message is mostly advice on how to run the file all the same.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}, which weights have no need of" if named else "it holds more than tensors"
        raise WeightsError(f"{path.name} is refused: {what}") from error
    except Exception as error:  # torch raises what its parts raise
        raise WeightsError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from error
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise WeightsError(f"{path.name} holds no weights by name")
    return content


def _flat(content: dict[str, Any], file: str) -> dict[str, np.ndarray]:
    """Arrays by name; of a layer that is a list of arrays, as Caffe's are, by `name[0]`, `name[1]`, ..."""
    found: dict[str, np.ndarray] = {}
    for name, value in content.items():
        parts = (
            {f"{name}[{i}]": each for i, each in enumerate(value)} if isinstance(value, list | tuple) else {name: value}
        )
        for part, each in parts.items():
            if isinstance(each, Tensor):
                each = each.detach().to(torch.float64 if each.dtype == torch.float64 else torch.float32).numpy()
            if not isinstance(each, np.ndarray):
                raise WeightsError(f"{file}: {part} is a {type(each).__name__}, not an array")
            found[part] = each
    return found


def _to_state(tensors: Tensors, names: Names, config: DetectorConfig) -> dict[str, Tensor]:
    """Our state dictionary, in float32; takes what it needs from `tensors`, which notes what it does not find."""
    state: dict[str, Tensor] = {}
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Detector(config).state_dict().items()}

    def put(name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
        state[f"{name}.weight"] = torch.from_numpy(np.array(weight, np.float32))
        if bias is not None:
            state[f"{name}.bias"] = torch.from_numpy(np.array(bias, np.float32))

    for ours in (name.removesuffix(".weight") for name in shapes if name.endswith(".weight")):
        if ours in names.convolutions:
            put(ours, *_fold(tensors, names, ours, shapes[f"{ours}.weight"]))

    order = names.anchor_order(tensors)
    hidden = shapes["proposal.weight"]
    put("proposal", *tensors.take_pair(names.layer("proposal"), hidden))
    weight, bias = tensors.take_pair(
        names.layer("objectness"), (names.objectness_channels, config.proposal_width, 1, 1)
    )
    if names.objectness_channels == 2 * config.anchors:  # a softmax over two: their difference decides
        weight, bias = (part[config.anchors :] - part[: config.anchors] for part in (weight, bias))
    put("objectness", weight[order], bias[order])
    weight, bias = tensors.take_pair(names.layer("deltas"), shapes["deltas.weight"])
    rows = (order[:, None] * 4 + np.arange(4)).reshape(-1)  # four numbers per anchor, side by side
    put("deltas", weight[rows], bias[rows])

    def background_first(values: np.ndarray) -> np.ndarray:
        return np.roll(values, 1, axis=0) if names.background_last else values

    pair = tensors.take_pair(names.layer("class_score"), shapes["class_score.weight"])
    put("class_score", *map(background_first, pair))
    if config.attributes:
        embedding = tensors.take(names.embedding, shapes["attribute_head.embedding.weight"])
        put("attribute_head.embedding", background_first(embedding))
        put(
            "attribute_head.hidden",
            *tensors.take_pair(names.layer("attribute_head.hidden"), shapes["attribute_head.hidden.weight"]),
        )
        pair = tensors.take_pair(names.layer("attribute_head.score"), shapes["attribute_head.score.weight"])
        put("attribute_head.score", *map(background_first, pair))
    names.check_unused(tensors)
    return state


def _fold(tensors: Tensors, names: Names, ours: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A convolution and its frozen batch norm as one: weight and bias, float64."""
    weight = tensors.take(names.convolution(ours), shape).astype(np.float64)
    norm = names.norm(ours)
    mean, variance, gamma, beta = (
        tensors.take(name, shape[:1]).astype(np.float64) for name in (norm.mean, norm.variance, norm.gamma, norm.beta)
    )
    if norm.factor is not None:  # Caffe keeps sums, and how much they are of
        factor = float(tensors.take(norm.factor, (1,))[0])
        mean, variance = (part / factor if factor else part * 0 for part in (mean, variance))
    if (variance < 0).any():
        raise WeightsError(f"{tensors.file}: {norm.variance} has variances below 0")
    scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
    return weight * scale[:, None, None, None], beta - mean * scale
