"""A job in a worker's hands, and what becomes of it: an answer or a refusal, whatever happens."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from dataclasses import dataclass, replace

from model.exits import UnknownSpeedError
from service.broker.base import Delivery
from service.caption_maker import CaptionMaker, Done, Wish
from service.errors import Problem
from service.handover import LateError, Made, Span
from service.jobs import Answer, Box, ModelInfo, Refusal, Timings
from service.speed_control import Chosen, LoadLevel, choose_speed
from service.tracing import Tracing
from service.word_teller import WordStream, WordTeller
from service.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

INTERNAL = Refusal("internal", "The worker failed on this photo.")


@dataclass(eq=False)
class Hand:
    """A delivered job, until it has ended."""

    delivery: Delivery
    since: float  # by time.monotonic(): when it was delivered
    deadline: float  # by time.monotonic()
    task: asyncio.Task[None] | None = None  # None: it waits until it is alone
    chosen: Chosen | None = None  # its speed
    wish: Wish | None = None  # what it wants to be made
    stream: WordStream | None = None  # where its words are told as they are decided
    done: Done | None = None  # the caption made for it
    answering: bool = False

    @property
    def begun(self) -> bool:
        return self.answering or (self.wish is not None and self.wish.begun)


class Outcomes:
    """Has jobs captioned, each at its speed. Of one worker, on its event loop."""

    def __init__(
        self, info: ModelInfo, maker: CaptionMaker, teller: WordTeller, load: LoadLevel, metrics: WorkerMetrics
    ) -> None:
        self._info, self._maker, self._teller, self._load, self._metrics = info, maker, teller, load, metrics

    async def of(self, hand: Hand) -> Answer | Refusal:
        """Whatever happens, there is one."""
        try:
            hand.done = await self._caption(hand)
            return self._to_answer(hand, hand.done)
        except LateError as late:
            if time.monotonic() < hand.deadline:  # it had joined one that was just being given up
                return await self.of(hand)
            self._metrics.missed_deadline(late.place)
            return Refusal(late.code, late.detail)
        except Problem as problem:
            return Refusal(problem.code, problem.detail, problem.retry_after)
        except UnknownSpeedError as error:
            return Refusal("unknown_speed", str(error))
        except Exception:
            log.exception("job %s failed", hand.delivery.job.id)
            return INTERNAL

    async def _caption(self, hand: Hand) -> Done:
        """The caption that the job wants. Raises why there is none."""
        job = hand.delivery.job
        hand.chosen = choose_speed(self._info.speeds, job, self._load.level)
        hand.wish = Wish(job.image, hand.chosen.used, job.beam, hand.deadline, job.attention)
        if job.stream:
            hand.stream = hand.stream or self._teller.begin(hand.delivery)
            hand.wish.on_words = functools.partial(self._teller.hear, hand.stream)
        return await self._maker.caption(hand.wish)

    def _to_answer(self, hand: Hand, done: Done) -> Answer:
        """The job's own answer: what it asked for, and its own timings. Raises `LateError`."""
        now = time.monotonic()
        if now >= hand.deadline:
            raise LateError("describe")
        made, chosen = done.made, hand.chosen
        assert chosen is not None
        decoding, looking, describing = (
            _length(span, hand.since) for span in (done.decoded, made.looked, made.described)
        )
        waited = hand.delivery.waited + max(0.0, now - hand.since - decoding - looking - describing)
        timings = Timings(waited, decoding, looking, describing)
        self._metrics.answered(timings)
        if chosen.moved:
            self._metrics.speed_moved()
        caption = replace(made.caption, speed=chosen.used)  # which may be made for another job, by another name of τ
        asked = chosen.asked if chosen.moved else None
        boxes = _boxes(made) if hand.delivery.job.regions else ()  # most of an answer's bytes, and it may be kept
        return Answer(caption, boxes, timings, self._info.name, self._info.revision, asked, made.attention)


def trace_job(tracing: Tracing, worker: str, hand: Hand, outcome: Answer | Refusal) -> None:
    """The spans of a job that has just ended. Never raises."""
    done, delivery = hand.done, hand.delivery
    times = (None, None, None) if done is None else (done.decoded, done.made.looked, done.made.described)
    try:
        tracing.worked(
            delivery.job,
            outcome,
            worker=worker,
            attempt=delivery.attempt,
            waited=delivery.waited,
            since=hand.since,
            stages=list(zip(("decode_image", "look", "describe"), times, strict=True)),
        )
    except Exception:
        log.exception("job %s cannot be traced", delivery.job.id)  # and is answered all the same


def _length(span: Span | None, since: float) -> float:
    """Seconds of the span that came after `since`: a job that joined late has waited for the rest only."""
    return 0.0 if span is None else max(0.0, span[1] - max(span[0], since))


def _boxes(made: Made) -> tuple[Box, ...]:
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in made.regions.boxes.tolist())
