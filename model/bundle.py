"""A bundle: one folder with all that a worker needs. Written by training, read by the captioner; never pickles.

`config.json` sizes and exit policy, `vocabulary.json` the words, `weights.safetensors` tensors of two axes or more as
int8 with a float32 scale per row and the rest as float32, `extractor.onnx`, `speeds.json` the measured speed table, and
`MODEL_CARD.md` for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.exits import ExitPolicy, SpeedTable
from model.vocabulary import Vocabulary

FORMAT = 2
CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocabulary.json", "weights.safetensors"
EXTRACTOR, SPEEDS, MODEL_CARD = "extractor.onnx", "speeds.json", "MODEL_CARD.md"
REQUIRED = (CONFIG, VOCABULARY, WEIGHTS, EXTRACTOR, SPEEDS)
_SCALE = ".scale"


class BundleError(ValueError):
    """The folder is not a bundle that this version can read; the message says what is wrong."""


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory, but for the extractor, which ONNX Runtime reads from `folder`."""

    folder: Path
    name: str
    revision: str
    model: DeeCap
    vocabulary: Vocabulary
    policy: ExitPolicy
    speeds: SpeedTable


def pack_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of two axes or more to int8, symmetric, a scale per row (of the last axis); the others to float32."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = tensor.detach().float().contiguous()
        if value.ndim < 2:
            packed[name] = value.clone()
            continue
        scale = value.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        packed[name] = (value / scale).round().to(torch.int8)
        packed[name + _SCALE] = scale
    return packed


def unpack_weights(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `pack_weights` kept, as float32."""
    return {
        name: tensor.float() * packed[name + _SCALE] if tensor.dtype == torch.int8 else tensor
        for name, tensor in packed.items()
        if not name.endswith(_SCALE)
    }


def write_json(path: Path, data: Any) -> None:
    """Readable and in a fixed order, so that the same content is the same bytes."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def save_model(folder: Path, name: str, model: DeeCap, vocabulary: Vocabulary, policy: ExitPolicy) -> None:
    """Writes config, vocabulary and weights into `folder`; extractor, speeds and card are their makers' to write."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "name": name, "model": model.config.to_json(), "exit_policy": policy.to_json()}
    write_json(folder / CONFIG, config)
    write_json(folder / VOCABULARY, list(vocabulary.words))
    # Not `save_file`, whose file only its owner may read: a container's user is another.
    (folder / WEIGHTS).write_bytes(save(pack_weights(model.state_dict())))


def revision_of(folder: Path) -> str:
    """First 12 hexadecimal digits of the SHA-256 over the bundle's working files, in a fixed order."""
    digest = hashlib.sha256()
    for name in REQUIRED:
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def load_bundle(folder: Path) -> Bundle:
    """Raises `BundleError` for a folder that is missing, incomplete, of another format or inconsistent."""
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise BundleError(f"{folder} is not a whole bundle: {', '.join(missing)} not there")
    with _reading(folder / CONFIG) as path:
        config = json.loads(path.read_text())
        if config["format"] != FORMAT:
            raise ValueError(f"of format {config['format']!r}, and this version reads format {FORMAT}")
        model = DeeCap(DeeCapConfig.from_json(config["model"]))
        policy = ExitPolicy.from_json(config["exit_policy"])
        policy.validate(model.layers)
        if policy.margin is not None and not model.config.exit_head:
            raise ValueError("the exit policy has a margin, and the model no exit head to use it")
        if model.config.exits == "final" and policy.tested:
            raise ValueError("a model with exits='final' has no layer to test")
    with _reading(folder / VOCABULARY) as path:
        vocabulary = Vocabulary(json.loads(path.read_text()))
        if len(vocabulary) != model.config.vocabulary_size:
            raise ValueError(f"{len(vocabulary)} words, but the network has {model.config.vocabulary_size}")
    with _reading(folder / SPEEDS) as path:
        speeds = SpeedTable.from_json(json.loads(path.read_text()))
    with _reading(folder / WEIGHTS) as path:
        model.load_state_dict(unpack_weights(load_file(path)))
    model.requires_grad_(False).eval()
    return Bundle(folder, str(config.get("name", folder.name)), revision_of(folder), model, vocabulary, policy, speeds)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Whatever is wrong with the file inside becomes a `BundleError` that names it."""
    try:
        yield path
    except (LookupError, TypeError, ValueError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"{path} is not a bundle's: {error!r}") from error
