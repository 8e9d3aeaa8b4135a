"""The two-step public API: `regions = captioner.look(image)`, then `captioner.describe(regions, speed)`.

A worker, which has new photos while captions are in the making, takes `describe` apart: `begin`, `step`, `finished`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.attention import attention_to_regions
from model.batching import stack_regions
from model.bottom_up.extractor import PROVIDERS, Extractor, ExtractorError, revision_of_extractor
from model.bundle import EXTRACTOR, Bundle, BundleError, load_bundle
from model.caption import Caption, Regions, Word
from model.decoding.beam import LARGEST_BEAM, Step
from model.decoding.search import Decoded, beam_search, greedy_search
from model.engine.engine import Engine
from model.engine.folding import ENGINE_FUSIONS
from model.engine.precision import choose_precision
from model.exits import ResolvedSpeed, SpeedTable
from model.threads import available_cores
from model.vocabulary import EOS

SLOTS = 32  # captions, or hypotheses of beams, that share the decoder's steps
PLAIN_SLOTS = LARGEST_BEAM  # of the plain decoder, which makes one caption at a time: room for the widest beam, no more


@dataclass(frozen=True)
class _Begun:
    """A caption in the making."""

    regions: Regions
    speed: ResolvedSpeed
    beam: int
    deadline: float  # by time.monotonic()


class Captioner:
    """A bundle ready to caption. `look` is the dear, speed-independent part; `describe` is the cheap one.

    Not thread-safe but for `prepare`: one thread calls it.
    """

    def __init__(self, bundle: Bundle, extractor: Extractor, device: str, precision: str | None = None) -> None:
        """`device` is "cpu" or "cuda"; the extractor runs where it was made to. `precision`: of the decoding engine.

        Raises `ValueError` for a precision that the device does not have.
        """
        self.bundle = bundle
        self.device = device
        self._extractor = extractor
        self._model = bundle.model.to(device)
        self._precision = choose_precision(device, precision)
        self._engine: Engine | None = None
        if self._model.config.exits in ("plain", "final") or self._model.config.fusion in ENGINE_FUSIONS:
            self._engine = Engine(self._model, bundle.policy, self._precision, SLOTS)
        self._begun: dict[int, _Begun] = {}  # by ticket, in the order in which they were begun
        self._over: deque[tuple[int, Caption | str]] = deque()  # of the plain decoder; the engine keeps its own
        self._tickets = 0  # given out by the plain decoder

    @classmethod
    def load(cls, bundle: Path, device: str = "auto", precision: str | None = None, threads: int = 0) -> Captioner:
        """`device`: auto (a GPU where torch sees one and ONNX Runtime has the provider, else the CPU), cpu, or cuda.
        `precision` of the decoder: int8 (a CPU's default), float32 or bfloat16 (a GPU's). `threads` of the extractor
        and the encoder; 0: as many as this process may use.

        Raises `model.bundle.BundleError` for a folder that is not a whole bundle, or a device that is not there.
        """
        chosen = choose_device(device)
        threads = threads or available_cores()
        torch.set_num_threads(threads)
        loaded = load_bundle(bundle)
        try:
            extractor = Extractor(bundle / EXTRACTOR, chosen, threads)
        except ExtractorError as error:
            raise BundleError(str(error)) from error
        if extractor.feature_width != loaded.model.config.feature_width:
            raise BundleError(
                f"{bundle}: the extractor gives {extractor.feature_width} numbers per region, "
                f"the network reads {loaded.model.config.feature_width}"
            )
        try:
            return cls(loaded, extractor, chosen, precision)
        except ValueError as error:
            raise BundleError(str(error)) from error

    def warm_up(self) -> None:
        """Captions a grey ramp at every tier: the first run of anything is slow, the decoder's graphs above all."""
        if self._engine is not None:
            self._engine.prepare()
        regions = self.look(Image.linear_gradient("L"))
        for tier in self.speeds.tiers:
            self.describe(regions, tier)

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def revision(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 over the bundle's files."""
        return self.bundle.revision

    @property
    def extractor_revision(self) -> str:
        """First 12 hexadecimal digits of the extractor's SHA-256: regions are the same as long as it is."""
        return revision_of_extractor(self.bundle.folder / EXTRACTOR)

    @property
    def layers(self) -> int:
        """N of the decoder."""
        return self._model.layers

    @property
    def precision(self) -> str:
        """What the decoder runs in."""
        return self._precision.name if self._engine else "float32"

    @property
    def vocabulary_size(self) -> int:
        """Words, special ones included."""
        return len(self.bundle.vocabulary)

    @property
    def speeds(self) -> SpeedTable:
        return self.bundle.speeds

    @property
    def sufficient_side(self) -> int:
        """Pixels of each side that a photo may be reduced to while it is decoded; 0 where all that there are count."""
        return self._extractor.sufficient_side

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Any Pillow image -> what `look_at_pixels` reads of it, uint8 `(224, 224, 3)`, or `(H, W, 3)` where the bundle
        has a detector; from whichever thread.

        Raises `OSError` where the pixels cannot be decoded.
        """
        return self._extractor.prepare(image)

    def look(self, image: Image.Image) -> Regions:
        """Any Pillow image -> its regions. Raises `OSError` where the pixels cannot be decoded."""
        return self._extractor.look([image])[0]

    def look_batch(self, images: Sequence[Image.Image]) -> list[Regions]:
        """`look` for several images in one run of the extractor."""
        return self._extractor.look(images)

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        """Photos as `prepare` gives them, stacked: uint8 `(B, H, W, 3)` -> the regions of each."""
        return self._extractor.look_at_pixels(pixels)

    def describe(
        self, regions: Regions, speed: str | float | None = None, *, tau: float | None = None, beam: int = 1
    ) -> Caption:
        """The caption at a speed (default balanced) or at a threshold τ in nats.

        Raises `UnknownSpeedError` for a speed or τ that the bundle does not offer, `ValueError` for a beam not in 1..5.
        """
        return self.describe_batch([regions], [self.speeds.resolve(speed, tau)], beam)[0]

    def describe_batch(self, batch: Sequence[Regions], speeds: Sequence[ResolvedSpeed], beam: int = 1) -> list[Caption]:
        """Captions of several images, each at its own resolved speed; images may have different numbers of regions."""
        return self.describe_counted(batch, speeds, beam)[0]

    @torch.inference_mode()
    def describe_counted(
        self, batch: Sequence[Regions], speeds: Sequence[ResolvedSpeed], beam: int = 1
    ) -> tuple[list[Caption], int]:
        """As `describe_batch`, and the (layer, word) pairs that were computed, catch-up included.

        Raises `RuntimeError` while there are captions that were begun and not fetched by `finished`.
        """
        if self._begun:
            raise RuntimeError(f"{len(self._begun)} captions are in the making")
        return self._describe(batch, speeds, beam)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Regions]) -> list[torch.Tensor]:
        """The memory `(R, d)` of each image, which its words come from. Raises `ValueError` for one without regions."""
        _refuse_empty(batch)
        features, boxes, mask = stack_regions(batch)
        if self._engine is None:
            features, boxes, mask = (part.to(self.device) for part in (features, boxes, mask))
            memory = self._model.encode(features, boxes, mask)
        else:
            memory = self._engine.encode(features, boxes, mask)
        return [row[kept] for row, kept in zip(memory, mask.to(memory.device), strict=True)]

    @torch.inference_mode()
    def _describe(
        self, batch: Sequence[Regions], speeds: Sequence[ResolvedSpeed], beam: int
    ) -> tuple[list[Caption], int]:
        _refuse_empty(batch)
        taus = [speed.tau for speed in speeds]
        if self._engine is None:
            policy = self.bundle.policy
            features, boxes, mask = (part.to(self.device) for part in stack_regions(batch))
            memory = self._model.encode(features, boxes, mask)
            if beam == 1:
                decoded = greedy_search(self._model, memory, taus, policy, mask)
            else:
                decoded = beam_search(self._model, memory, taus, policy, beam, mask)
        else:
            decoded = _decode(self._engine, self.encode(batch), taus, beam)
        captions = [self._caption(steps, speed) for steps, speed in zip(decoded.captions, speeds, strict=True)]
        return captions, decoded.executed_rows

    @torch.inference_mode()
    def attention(self, regions: Regions, caption: Caption) -> tuple[tuple[float, ...], ...]:
        """Where each of the caption's words looked: the weights of the regions, which sum to 1, in the layer that the
        word left at, mean over its heads.

        By the plain decoder with the bundle's weights: the engine, in another precision, may have looked a little
        otherwise. At another time than the caption's words, and never needed for them.
        """
        if not caption.words:
            return ()
        features, boxes, _ = (part.to(self.device) for part in stack_regions([regions]))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for rows this few, threads that wait for one another take longer than one alone
        try:
            found = attention_to_regions(
                self._model,
                self._model.encode(features, boxes),
                self.bundle.vocabulary.encode([word.text for word in caption.words]),
                [word.exit_layer for word in caption.words],
                copied=self.bundle.policy.skipped == "copied",
            )
        finally:
            torch.set_num_threads(threads)
        return tuple(tuple(row) for row in found.tolist())

    # Step by step, as a worker needs it -------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Captions that can be in the making at once; a beam counts as many as its width."""
        return SLOTS if self._engine else PLAIN_SLOTS

    @property
    def free(self) -> int:
        """Slots that nothing is in the making for."""
        return self._engine.free if self._engine else PLAIN_SLOTS - sum(each.beam for each in self._begun.values())

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self._engine.busy if self._engine else len(self._begun) > len(self._over)

    @torch.inference_mode()
    def begin(
        self,
        batch: Sequence[Regions],
        speeds: Sequence[ResolvedSpeed],
        beams: Sequence[int],
        deadlines: Sequence[float],
    ) -> list[int]:
        """Takes captions to be made and returns their tickets. Each has its own speed, beam and deadline (by
        `time.monotonic()`, `math.inf` for none). They share steps with whatever is in the making; those that find no
        free slots wait for their turn.

        Raises `ValueError` for a beam not in 1..5, a negative τ or an image without regions. Whatever it raises, none
        of them was begun.
        """
        asked = [_Begun(*each) for each in zip(batch, speeds, beams, deadlines, strict=True)]
        for each in asked:
            if not 1 <= each.beam <= LARGEST_BEAM:
                raise ValueError(f"beam must be from 1 to {LARGEST_BEAM}, not {each.beam}")
            if not each.speed.tau >= 0:
                raise ValueError(f"tau must be 0 or more, not {each.speed.tau}")
        _refuse_empty(batch)
        if self._engine is None:
            tickets = [self._tickets + count for count in range(1, len(asked) + 1)]
            self._tickets += len(asked)
        else:
            tickets = [
                self._engine.submit(memory, each.speed.tau, each.beam, each.deadline)
                for memory, each in zip(self.encode(batch), asked, strict=True)
            ]
        self._begun.update(zip(tickets, asked, strict=True))
        return tickets

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Gives a caption up: it is among the `finished`. Without effect on one that is over, or never was."""
        if self._engine is not None:
            self._engine.cancel(ticket)
        elif ticket in self._begun and all(ticket != over for over, _ in self._over):
            self._over.append((ticket, "cancelled"))

    @torch.inference_mode()
    def step(self) -> None:
        """One word more for every caption in the making; by the plain decoder, the whole of the oldest one.

        After whatever it raises, `reset` makes the captioner whole again.
        """
        if self._engine is not None:
            self._engine.step()
            return
        if not self.busy:
            return
        over = {ticket for ticket, _ in self._over}
        ticket, asked = next((ticket, asked) for ticket, asked in self._begun.items() if ticket not in over)
        if asked.deadline <= time.monotonic():
            self._over.append((ticket, "deadline"))
        else:
            self._over.append((ticket, self._describe([asked.regions], [asked.speed], asked.beam)[0][0]))

    def words_so_far(self, ticket: int, begin: int = 0) -> tuple[Word, ...]:
        """The words decided so far of a caption in the making, from word `begin` on: the caption will begin with them.

        None of a beam's, which are only known at its end, nor of the plain decoder's, which makes a caption in one
        step; and none of what waits for its slots or is over.
        """
        if self._engine is None:
            return ()
        return tuple(self._word(step) for step in self._engine.words_so_far(ticket, begin))

    def finished(self) -> list[tuple[int, Caption | str]]:
        """The tickets that are over since the last call, in the order in which they were: each with its caption, or
        with why there is none: `cancelled` or `deadline`."""
        if self._engine is None:
            ended = list(self._over)
            self._over.clear()
            for ticket, _ in ended:
                del self._begun[ticket]
            return ended
        found: list[tuple[int, Caption | str]] = []
        for over in self._engine.finished():
            speed = self._begun.pop(over.number).speed
            found.append((over.number, self._caption(over.steps, speed) if over.reason == "ended" else over.reason))
        return found

    def reset(self) -> None:
        """Gives up all captions in the making, and forgets what was `finished`: for use after `step` failed."""
        for ticket in list(self._begun):
            self.cancel(ticket)
        self.finished()

    def _caption(self, steps: Sequence[Step], speed: ResolvedSpeed) -> Caption:
        return Caption(tuple(self._word(step) for step in steps), speed, self.layers)

    def _word(self, step: Step) -> Word:
        text = "" if step.token == EOS else self.bundle.vocabulary.words[step.token]
        return Word(text, step.exit_layer, step.entropy, step.log_probability)


def _refuse_empty(batch: Sequence[Regions]) -> None:
    if not all(len(regions.boxes) for regions in batch):
        raise ValueError("an image without regions cannot be described")


def _decode(engine: Engine, memories: Sequence[torch.Tensor], taus: Sequence[float], beam: int) -> Decoded:
    """The captions of a batch, none other being in the engine."""
    before = engine.executed_rows
    rows: dict[int, int] = {}  # by the request's number
    try:
        for row, (memory, tau) in enumerate(zip(memories, taus, strict=True)):
            rows[engine.submit(memory, tau, beam)] = row
        while engine.busy:
            engine.step()
    except Exception:  # or they would be found in the engine by the next batch
        for number in rows:
            engine.cancel(number)
        engine.finished()
        raise
    captions = {rows[over.number]: over.steps for over in engine.finished()}
    return Decoded([captions[row] for row in range(len(rows))], engine.executed_rows - before)


def choose_device(device: str) -> str:
    """`auto`, `cpu` or `cuda` to what is used. Raises `BundleError` for another name, or a GPU that is not there."""
    if device == "cpu":
        return device
    if device not in ("auto", "cuda"):
        raise BundleError(f"device must be auto, cpu or cuda, not {device!r}")
    import onnxruntime

    torch_can = torch.cuda.is_available()
    if torch_can and PROVIDERS["cuda"] in onnxruntime.get_available_providers():
        return "cuda"
    if device == "auto":
        return "cpu"
    lacking = "ONNX Runtime has no CUDA provider: pip install '.[gpu]'" if torch_can else "torch sees no GPU"
    raise BundleError(f"device cuda was asked for, but {lacking}")
