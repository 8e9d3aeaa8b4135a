"""What the event loop hands to the model thread, and what it gets back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.caption import Caption, Regions, Word
from model.exits import ResolvedSpeed
from service.errors import Problem
from service.worker_metrics import Place

Span = tuple[float, float]  # when a stage began and ended, by time.monotonic()
OnWords = Callable[[int, Sequence[Word]], None]  # the place in the caption of the first word, and the words


class LateError(Problem):
    """The deadline passed; `place` says what the job was at, or waited for."""

    def __init__(self, place: Place) -> None:
        super().__init__("deadline_exceeded", "The deadline passed.")
        self.place: Place = place


@dataclass(frozen=True)
class Made:
    """A caption, and when what was done for it."""

    caption: Caption
    regions: Regions
    looked: Span | None  # None where the regions came with the work
    described: Span
    attention: tuple[tuple[float, ...], ...] | None = None  # weights of the regions, of each word; where asked for


@dataclass(eq=False)
class Work:
    """One caption to be made of `pixels`, or of `regions` where they are known. Once handed over it is the thread's."""

    photo: str  # what it is of: works of the same photo need one look
    speed: ResolvedSpeed
    beam: int
    deadline: float  # by time.monotonic(); may be put off at any time
    pixels: np.ndarray | None = None
    regions: Regions | None = None
    streams: bool = False  # somebody wants its words as they are decided; may become so at any time
    attention: bool = False  # where its words looked is wanted too
    begun: bool = False  # as the event loop knows it: words are being made, or it has ended
    looked: Span | None = None
    since: float = 0.0  # when it was begun


Outcome = Made | Exception


@dataclass(eq=False)
class Handed:
    """A work and where its outcome goes."""

    work: Work
    future: asyncio.Future[Made]
    on_begun: Callable[[], None]
    on_words: OnWords
    told: int = 0  # words that the thread has handed back


@dataclass(frozen=True)
class News:
    """Words of a caption in the making, decided since the last ones."""

    handed: Handed
    begin: int  # place in the caption of the first
    words: tuple[Word, ...]


# What the thread has the event loop do.


def mark_begun(batch: Sequence[Handed]) -> None:
    for handed in batch:
        handed.work.begun = True
        handed.on_begun()


def hear(news: Sequence[News]) -> None:
    for each in news:
        if not each.handed.future.done():  # else cancelled
            each.handed.on_words(each.begin, each.words)


def resolve(handed: Handed, outcome: Outcome) -> None:
    handed.work.begun = True  # one that failed must not be given back as if nobody had tried
    future = handed.future
    if future.done():
        return  # cancelled
    if isinstance(outcome, Made):
        future.set_result(outcome)
    elif isinstance(outcome, StopIteration):  # which a future does not take
        future.set_exception(RuntimeError(repr(outcome)))
    else:
        future.set_exception(outcome)
