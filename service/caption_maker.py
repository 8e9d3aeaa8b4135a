"""Makes a caption out of a photo's bytes: decodes it, or finds its regions in the cache, and has the model caption it.

What several jobs want alike is made once, and given up when none of them wants it any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from model.caption import Word
from model.exits import ResolvedSpeed
from model.threads import available_cores
from service.errors import Problem
from service.feature_cache import FeatureCache, cache_key
from service.handover import LateError, Made, OnWords, Span, Work
from service.images import ImageLimits, decode
from service.model_thread import ModelThread
from service.worker_metrics import WorkerMetrics

PREPARED = "2"  # to be raised whenever other pixels come of the same bytes: what was cached is then forgotten
HASHED_AT_ONCE = 256 * 1024  # bytes: 0.2 ms, which is less than to wake a thread and be woken by it


@dataclass(frozen=True)
class Done:
    """A caption and when what was done for it."""

    made: Made
    decoded: Span | None  # None where the photo was in the cache


@dataclass(eq=False)
class Wish:
    """The caption that one job wants."""

    image: bytes
    speed: ResolvedSpeed
    beam: int
    deadline: float  # by time.monotonic()
    attention: bool = False  # where its words looked is wanted too
    on_words: OnWords | None = None  # hears its words, from the first on, as they are decided; not those of a beam
    work: Work | None = None  # in the making for it

    @property
    def begun(self) -> bool:
        """Whether its words are being made, or it has ended."""
        return self.work is not None and self.work.begun


@dataclass(eq=False)
class _Making:
    """A caption in the making, for all that want the same."""

    work: Work
    wishes: list[Wish] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)  # so far
    task: asyncio.Task[Done] | None = None

    def hear(self, begin: int, words: Sequence[Word]) -> None:
        self.words[begin:] = words
        for wish in self.wishes:
            if wish.on_words is not None:
                wish.on_words(begin, words)


class CaptionMaker:
    """Of one worker, on its event loop."""

    def __init__(
        self,
        model: ModelThread,
        limits: ImageLimits,
        cache: FeatureCache,
        metrics: WorkerMetrics,
        look_ahead: int,
        on_begun: Callable[[], None],
    ) -> None:
        """`look_ahead`: photos that may be in hand and not begun; `on_begun` is called when one more is."""
        self._model, self._limits, self._cache, self._metrics = model, limits, cache, metrics
        self._on_begun = on_begun
        self._decoding = asyncio.Semaphore(min(look_ahead, available_cores()))  # a large photo takes 200 MB
        self._extractor = ""  # what looks at photos, known once the model has been loaded
        self._making: dict[tuple[str, float, int, bool], _Making] = {}  # by photo, τ, beam and attention
        self._puts: set[asyncio.Task[None]] = set()
        self._threads: set[asyncio.Task[np.ndarray]] = set()  # that decode

    def begin(self) -> None:
        """To be called once the model has been loaded."""
        captioner = self._model.captioner
        self._extractor = f"{captioner.extractor_revision}-{captioner.device}"

    async def caption(self, wish: Wish) -> Done:
        """The caption, made for this wish or for another of the same. Raises `Problem`, or what the model raised.

        Where it had joined one that was just being given up, that is a `LateError` before its deadline: to be tried
        again.
        """
        slots = self._model.captioner.slots
        if not 1 <= wish.beam <= slots:  # it would wait for ever, and all behind it
            raise Problem("invalid_option", f"beam: must be from 1 to {slots}")
        digest = await _digest(wish.image)
        key = (digest, wish.speed.tau, wish.beam, wish.attention)
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = self._start(wish, digest)
        else:
            self._metrics.coalesced()
            making.work.deadline = max(making.work.deadline, wish.deadline)
        assert making.task is not None
        self._join(wish, making)
        try:
            return await asyncio.shield(making.task)
        finally:
            making.wishes.remove(wish)
            if not making.wishes:
                making.task.cancel()  # nobody wants it, or it is done
            if self._making.get(key) is making and (making.task.done() or not making.wishes):
                del self._making[key]

    async def close(self) -> None:
        await asyncio.gather(*self._puts, *self._threads, return_exceptions=True)

    def _start(self, wish: Wish, digest: str) -> _Making:
        decoded = f"{PREPARED}-{self._limits.max_pixels}-{self._limits.min_side}"  # the limits: what was refused
        work = Work(cache_key(digest, self._extractor, decoded), wish.speed, wish.beam, wish.deadline)
        work.attention = wish.attention
        making = _Making(work)
        making.task = asyncio.create_task(self._make(making, wish.image))
        return making

    @staticmethod
    def _join(wish: Wish, making: _Making) -> None:
        wish.work = making.work
        making.wishes.append(wish)
        if wish.on_words is not None and wish.beam == 1:
            making.work.streams = True
            if making.words:
                wish.on_words(0, tuple(making.words))

    async def _make(self, making: _Making, image: bytes) -> Done:
        work, decoded = making.work, None
        work.regions = await self._cache.get(work.photo)
        self._metrics.cache_asked(self._cache.name, hit=work.regions is not None)
        if work.regions is None:
            decoded = await self._decode(work, image)
        made = await self._model.caption(work, self._on_begun, making.hear)
        if work.streams and len(making.words) < len(made.caption.words):  # a caption that ended without an end
            making.hear(len(making.words), made.caption.words[len(making.words) :])
        if made.looked is not None:
            put = asyncio.create_task(self._cache.put(work.photo, made.regions))
            self._puts.add(put)
            put.add_done_callback(self._puts.discard)
        return Done(made, decoded)

    async def _decode(self, work: Work, image: bytes) -> Span:
        """Gives the work its pixels. Raises `LateError`, and `Problem`."""
        await self._decoding.acquire()
        begin = time.monotonic()
        if begin < work.deadline:
            thread = asyncio.create_task(asyncio.to_thread(self._to_pixels, image))
            self._threads.add(thread)
            thread.add_done_callback(self._decoded)
            work.pixels = await asyncio.shield(thread)
        else:
            self._decoding.release()
        end = time.monotonic()
        if work.deadline <= end:
            raise LateError("decode")
        return begin, end

    def _decoded(self, thread: asyncio.Task[np.ndarray]) -> None:
        """A thread cannot be stopped: it has its place among those that decode until it ends, wanted or not."""
        self._threads.discard(thread)
        self._decoding.release()

    def _to_pixels(self, image: bytes) -> np.ndarray:
        """Raises `Problem`."""
        picture = decode(image, self._limits, self._model.captioner.sufficient_side)
        try:
            return self._model.captioner.prepare(picture)
        except Exception as error:  # Pillow's decoders raise all sorts of things
            raise Problem("undecodable_image", "The pixels of the image cannot be decoded.") from error


async def _digest(image: bytes) -> str:
    if len(image) <= HASHED_AT_ONCE:
        return hashlib.sha256(image).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(image).hexdigest())
