"""The bottom-up extractors as served: an ONNX Runtime session from pixels to regions.

Three kinds of file, told apart by what they say of themselves: the embedded ones, of cells or of regions, which read
photos squashed to a square, many at once; and the Visual Genome detector, which reads photos in their own proportions,
one by one. Both detectors also name what they see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from model.bottom_up.bound_session import BoundSession
from model.bottom_up.detections import Detections
from model.bottom_up.extractor_kinds import CLASSES_KEY, EMBEDDED, KIND_KEY, REGIONS, SIDE_KEY, VISUAL_GENOME
from model.bottom_up.preprocess import SUFFICIENT_SIDE, to_pixels
from model.bottom_up.region_limits import MOST
from model.bottom_up.visual_genome.preprocess import to_photo
from model.caption import Regions
from model.saturation import saturates

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "cpu": {},
    "cuda": {
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it holds, of memory that others need
        "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all ways anew for every batch size that comes
    },
}


class ExtractorError(RuntimeError):
    """The extractor cannot run as asked: a broken file, or a provider that is not there."""


OUTPUTS = {
    EMBEDDED: [["features", "boxes"]],
    REGIONS: [["features", "boxes", "counts"]],
    VISUAL_GENOME: [
        ["features", "boxes", "class_probabilities"],
        ["features", "boxes", "class_probabilities", "attribute_probabilities"],
    ],
}


def revision_of_extractor(path: Path) -> str:
    """First 12 hexadecimal digits of the file's SHA-256: regions are the same as long as it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


class Extractor:
    """Pixels to regions.

    The embedded graph takes uint8 `(B, 224, 224, 3)` and gives `features (B, R, F)`, `boxes (B, R, 4)`, and with a
    region head `counts (B,)`; the detector's takes uint8 `(1, H, W, 3)` and gives `(R, F)`, `(R, 4)` and probabilities
    of classes and attributes.
    """

    def __init__(self, path: Path, device: str = "cpu", threads: int = 0) -> None:
        """`threads` of one operator; 0 leaves it to ONNX Runtime, one per core.

        Raises `ExtractorError` when the file is no such graph, or when the device's provider is not active: never
        a silent fallback to another.
        """
        provider = PROVIDERS[device]
        if provider not in onnxruntime.get_available_providers():
            raise ExtractorError(
                f"ONNX Runtime has no {provider} here: for a GPU, pip install '.[gpu]' in place of '.[cpu]'"
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
            self._session = onnxruntime.InferenceSession(
                path, options, providers=[(provider, PROVIDER_OPTIONS[device])]
            )
        except Exception as error:  # its own exceptions share no base class
            raise ExtractorError(f"{path} is not an extractor that can be run: {error}") from error
        active = self._session.get_providers()
        if active[0] != provider:
            raise ExtractorError(
                f"asked for {provider}, but ONNX Runtime started {active[0]}: its CUDA libraries are missing"
            )
        known = self._session.get_modelmeta().custom_metadata_map
        self.kind: str = known.get(KIND_KEY, EMBEDDED)  # of `extractor_kinds`
        inputs = [item.name for item in self._session.get_inputs()]
        outputs = [item.name for item in self._session.get_outputs()]
        if self.kind not in OUTPUTS:
            raise ExtractorError(f"{path} is an extractor of kind {self.kind!r}, which this version does not know")
        if inputs != ["pixels"] or outputs not in OUTPUTS[self.kind]:
            raise ExtractorError(f"{path} maps {inputs} to {outputs}; an extractor maps pixels to features and boxes")
        self._shorter_side = int(known.get(SIDE_KEY, 0))
        self.classes: tuple[str, ...] = tuple(json.loads(known.get(CLASSES_KEY, "[]")))  # where the file names them
        self._bound = BoundSession(self._session, pinned=True) if device == "cuda" else None
        self._arenas = "cpu:0" if device == "cpu" else "cpu:0;gpu:0"

    @property
    def feature_width(self) -> int:
        """F, as the graph declares it."""
        return int(self._session.get_outputs()[0].shape[-1])

    @property
    def most_regions(self) -> int:
        """R, as an embedded graph declares it: what no photo has more of."""
        return int(self._session.get_outputs()[0].shape[-2])

    @property
    def sufficient_side(self) -> int:
        """Pixels of each side that a photo may be reduced to while it is decoded; 0 where all that there are count."""
        return 0 if self.kind == VISUAL_GENOME else SUFFICIENT_SIDE

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Any Pillow image -> what `look_at_pixels` reads of it, uint8 `(H, W, 3)`; from whichever thread.

        All of one size for the embedded kinds, which can so be stacked; of their own sizes for the detector. Raises
        `OSError` for pixel data that cannot be decoded.
        """
        return to_photo(image, self._shorter_side) if self.kind == VISUAL_GENOME else to_pixels(image)

    def look(self, images: Sequence[Image.Image]) -> list[Regions]:
        """The regions of each image. Raises `OSError` for pixel data that cannot be decoded."""
        if self.kind == VISUAL_GENOME:
            return [self._detect(self.prepare(image)) for image in images]
        return self.look_at_pixels(np.stack([self.prepare(image) for image in images]))

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        """uint8 `(B, 224, 224, 3)`, for the detector `(B, H, W, 3)` -> the regions of each image."""
        if self.kind == VISUAL_GENOME:
            return [self._detect(one) for one in pixels]
        found = self._bound.run(pixels) if self._bound else self._session.run(None, {"pixels": pixels})
        features, boxes, *counts = found
        if counts:
            return [self._chosen(*photo) for photo in zip(features, boxes, counts[0], strict=True)]
        return [Regions(boxes=one_boxes, features=one) for one, one_boxes in zip(features, boxes, strict=True)]

    def _chosen(self, features: np.ndarray, boxes: np.ndarray, count: int) -> Detections:
        """One photo's rows `(36 + cells, F)` -> its regions, so many of the first 36, and its large cells."""
        rows = np.r_[:count, MOST : len(features)]
        named = features[rows, -len(self.classes) - 1 :]  # chances of the classes, and of any at all
        probabilities = np.concatenate((1 - named[:, -1:], named[:, :-1]), axis=1)
        return Detections(boxes[rows], features[rows], probabilities)

    def _detect(self, photo: np.ndarray) -> Detections:
        """uint8 `(H, W, 3)` -> its regions, the most confident first."""
        options = onnxruntime.RunOptions()
        # Photos of all sizes: what a large one needed is given back.
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arenas)
        features, boxes, *named = self._session.run(None, {"pixels": photo[None]}, options)
        return Detections(boxes, features, *named)
