"""What is measured of ours: the engine at each tier, at full depth without tests, and shallower decoders beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from model.bottom_up.reduced_jpeg import reduce_jpeg
from model.caption import Regions
from model.captioner import Captioner
from model.decoding.beam import Step
from model.deecap import DeeCap
from model.engine.engine import Engine
from model.engine.precision import Precision
from model.exits import ExitPolicy
from model.vocabulary import EOS

BASELINE = "full, no tests"  # the engine without exit tests: what every clock SpeedUp is relative to
NEVER = -1e4  # a head bias that no word is emitted with


@dataclass
class Decoder:
    """A model and its exit policy, with an engine for each number of slots, made when first asked for."""

    model: DeeCap
    policy: ExitPolicy
    precision: Precision
    engines: dict[int, Engine] = field(default_factory=dict)

    def engine(self, slots: int) -> Engine:
        """Raises `ValueError` for a model that the engine cannot run."""
        if slots not in self.engines:
            self.engines[slots] = Engine(self.model, self.policy, self.precision, slots)
        return self.engines[slots]


@dataclass(frozen=True)
class Contender:
    """One line of the table: a decoder at a threshold."""

    name: str
    decoder: Decoder
    tau: float

    def caption(self, memory: Tensor) -> list[Step]:
        """One caption, with nothing beside it, from an image's memory `(R, d)`."""
        return caption_all(self.decoder.engine(1), [memory], self.tau)[0]


@dataclass(frozen=True)
class Captions:
    """What a contender said of a set of photos, and what that took."""

    steps: tuple[tuple[Step, ...], ...]  # photos x steps
    executed_rows: int  # (layer, word) pairs, catch-up included

    @property
    def exits(self) -> list[list[int]]:
        return [[step.exit_layer for step in steps] for steps in self.steps]

    @property
    def mean_steps(self) -> float:
        """Words of a caption, EOS included."""
        return sum(map(len, self.steps)) / len(self.steps)


def tiers_of(captioner: Captioner, precision: Precision) -> list[Contender]:
    """The baseline first, then the bundle's tiers as it ships them; these share their engines, as in the service."""
    bundle = captioner.bundle
    shipped = Decoder(bundle.model, bundle.policy, precision)
    untested = Decoder(bundle.model, ExitPolicy(()), precision)
    tiers = [Contender(name, shipped, tau) for name, tau in bundle.speeds.tiers.items()] if bundle.policy.tested else []
    return [Contender(BASELINE, untested, 0.0), *tiers]


def fixed_depth(model: DeeCap, layers: int, words: int, precision: Precision) -> Contender:
    """TF-kL: a decoder of `layers` layers on its own, whose captions all have exactly `words` steps.

    Its weights are random: what it says means nothing, how fast it says it does not depend on them.
    """
    config = replace(
        model.config,
        decoder_layers=layers,
        encoder_layers=0,  # it is given the memory of the real encoder
        max_words=words,
        exits="final",
        exit_head=False,
        no_repeats=False,  # a network with random weights repeats itself with nearly every word
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shallow = DeeCap(config).requires_grad_(False).eval()
    shallow.head_bias[EOS] = NEVER
    return Contender(f"TF-{layers}L", Decoder(shallow.to(precision.device), ExitPolicy(()), precision), 0.0)


def caption_all(engine: Engine, memories: Sequence[Tensor], tau: float) -> list[list[Step]]:
    """Captions in the order of `memories`, each `(R, d)`, all submitted at once; the engine keeps its slots filled."""
    numbers = [engine.submit(memory, tau) for memory in memories]
    while engine.busy:
        engine.step()
    steps = {over.number: over.steps for over in engine.finished()}
    return [steps[number] for number in numbers]


def caption_each(contender: Contender, memories: Sequence[Tensor]) -> Captions:
    """Captions one at a time, with the rows that ran for them."""
    engine = contender.decoder.engine(1)
    before = engine.executed_rows
    steps = tuple(tuple(contender.caption(memory)) for memory in memories)
    return Captions(steps, engine.executed_rows - before)


def taken_tests(policy: ExitPolicy, left: int, tau: float) -> list[int]:
    """The layers at which a word that left at layer `left` was tested for sure: a margin may have spared others."""
    if tau == 0:
        return []
    return [m for m in policy.tested if m <= left and (policy.margin is None or m == left)]


def decode_image(data: bytes, sufficient_side: int) -> Image.Image:
    """A file's bytes to a picture, decoded as far as the worker does."""
    image = Image.open(BytesIO(data))
    reduce_jpeg(image, sufficient_side)
    image.load()
    return image


@torch.inference_mode()
def encode(captioner: Captioner, regions: Regions) -> Tensor:
    """One image's memory `(R, d)`."""
    return captioner.encode([regions])[0]


def to_text(captioner: Captioner, steps: Sequence[Step]) -> str:
    """The words of a caption."""
    words = captioner.bundle.vocabulary.words
    return " ".join(words[step.token] for step in steps if step.token != EOS)


def end_to_end(captioner: Captioner, contender: Contender, data: bytes) -> str:
    """All of it for one photo: from the bytes of its file to the caption's text."""
    regions = captioner.look(decode_image(data, captioner.sufficient_side))
    return to_text(captioner, contender.caption(encode(captioner, regions)))
