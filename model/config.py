"""The network's numbers, in one place, each with its reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

EXITS = ("deecap", "shallow", "plain", "final")
FUSIONS = ("average", "concatenation", "attention", "sequential")


@dataclass(frozen=True)
class DeeCapConfig:
    """Sizes and the kind of exits. The defaults are the paper's (section 4.1).

    `exits` names the system: `deecap` (gated shallow and imitated deep states), `shallow` (DeeCap without deep
    information, z_m = h_shallow), `plain` (TF-EE, z_m = h_m), `final` (TF-Complete, and TF-kL with k layers).
    """

    vocabulary_size: int
    feature_width: int = 2048  # numbers per region
    width: int = 512
    heads: int = 8
    feed_forward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    max_words: int = 20  # a caption's longest; 99% of Flickr8k's and COCO's are shorter
    no_repeats: bool = (
        False  # whether captions are kept from saying words again: `model.decoding.repeats`. Not in the paper
    )
    dropout: float = 0.1
    exits: str = "deecap"
    fusion: str = "concatenation"  # the paper's best (table 4)
    imitation_width: int = 0  # of the imitators' hidden layer; 0: `width`. Narrow ones make the exit test cheaper
    exit_head: bool = False  # a linear guess of each exit's entropy, which can spare its test

    def __post_init__(self) -> None:
        if self.exits not in EXITS:
            raise ValueError(f"exits must be one of {', '.join(EXITS)}, not {self.exits!r}")
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, not {self.fusion!r}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if min(self.vocabulary_size, self.feature_width, self.decoder_layers, self.max_words) < 1:
            raise ValueError("sizes must be positive")
        if self.imitation_width < 0:
            raise ValueError("imitation_width must be positive, or 0 for the model's width")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeeCapConfig:
        """Raises `ValueError` for unknown or missing names, or values out of range."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration: {', '.join(sorted(unknown))}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(str(error)) from error
