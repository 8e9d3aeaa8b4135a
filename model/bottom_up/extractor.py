"""The bottom-up extractor as served: an ONNX Runtime session from pixels to regions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from model.bottom_up.preprocess import to_pixels
from model.caption import Regions
from model.saturation import saturates

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ExtractorError(RuntimeError):
    """The extractor cannot run as asked: a broken file, or a provider that is not there."""


class Extractor:
    """Pixels to regions. The graph takes uint8 `(B, 224, 224, 3)` and gives `features (B, R, F)`, `boxes (B, R, 4)`."""

    def __init__(self, path: Path, device: str = "cpu", threads: int = 0) -> None:
        """`threads` of one operator; 0 leaves it to ONNX Runtime, one per core.

        Raises `ExtractorError` when the file is no such graph, or when the device's provider is not active: never
        a silent fallback to another.
        """
        provider = PROVIDERS[device]
        if provider not in onnxruntime.get_available_providers():
            raise ExtractorError(
                f"ONNX Runtime has no {provider} here: for a GPU, install 'deecap[gpu]' in place of 'deecap[cpu]'"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait for the next photo would keep the cores busy while the decoder needs them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; what matters of the rest is checked here
        if device == "cpu" and saturates():
            # An int8 extractor then runs in float32, rounding as int8 would: slower, but not wrong.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except Exception as error:  # its own exceptions share no base class
            raise ExtractorError(f"{path} is not an extractor that can be run: {error}") from error
        active = self._session.get_providers()
        if active[0] != provider:
            raise ExtractorError(
                f"asked for {provider}, but ONNX Runtime started {active[0]}: its CUDA libraries are missing"
            )
        inputs = [item.name for item in self._session.get_inputs()]
        outputs = [item.name for item in self._session.get_outputs()]
        if inputs != ["pixels"] or outputs != ["features", "boxes"]:
            raise ExtractorError(f"{path} maps {inputs} to {outputs}; an extractor maps pixels to features and boxes")

    @property
    def feature_width(self) -> int:
        """F, as the graph declares it."""
        return int(self._session.get_outputs()[0].shape[-1])

    def look(self, images: Sequence[Image.Image]) -> list[Regions]:
        """The regions of each image. Raises `OSError` for pixel data that cannot be decoded."""
        return self.look_at_pixels(np.stack([to_pixels(image) for image in images]))

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        """uint8 `(B, 224, 224, 3)` -> the regions of each image."""
        features, boxes = self._session.run(None, {"pixels": pixels})
        return [Regions(boxes=one_boxes, features=one) for one, one_boxes in zip(features, boxes, strict=True)]
