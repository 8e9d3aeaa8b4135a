"""The kinds of extractor files, and what a file's metadata says of itself, for the session to know it by."""

from __future__ import annotations

EMBEDDED = "embedded"  # cells of the trunk's grid; what a file is that names no kind
REGIONS = "regions"  # the embedded trunk with a region head
VISUAL_GENOME = "visual-genome"
KIND_KEY = "deecap.extractor"
SIDE_KEY = "deecap.shorter_side"  # of a Visual Genome detector: pixels that photos are scaled to
CLASSES_KEY = "deecap.classes"  # of a region head: JSON list of the classes' names
