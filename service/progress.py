"""A progress bar on stderr where tqdm is installed, and lines beside it that leave it whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What is used of a tqdm."""

    def update(self, n: float = 1, /) -> object: ...


class _NoBar:
    def update(self, n: float = 1, /) -> None:
        pass


@contextmanager
def bar(shown: bool, total: int | None) -> Iterator[Bar]:
    """A bar of `total` photos, None for who knows how many; without tqdm, or not `shown`, one that shows nothing."""
    if shown:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            pass
        else:
            with tqdm(total=total, unit="photo") as progress:
                yield progress
            return
    yield _NoBar()


def say(line: str) -> None:
    """The line on stderr, above whatever bar there is."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print(line, file=sys.stderr)
    else:
        tqdm.write(line, file=sys.stderr)
