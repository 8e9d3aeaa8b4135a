"""What both clients' `caption_many` give."""

from __future__ import annotations

from dataclasses import dataclass

from service.client.answers import CaptionAnswer
from service.client.images import Image

AHEAD = 2  # times as many photos as are asked for at once may be done before the one whose turn it is


@dataclass(frozen=True)
class Item:
    """What became of one photo: an answer, or why there is none."""

    index: int
    image: Image  # as it was given
    answer: CaptionAnswer | None = None
    error: Exception | None = None  # ClientError; OSError or TypeError for a photo that could not be read

    def result(self) -> CaptionAnswer:
        """The answer; raises the error where there is none."""
        if self.answer is None:
            assert self.error is not None
            raise self.error
        return self.answer
