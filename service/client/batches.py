"""Many photos in one request, and again those that were turned away: for both clients, without I/O."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from service.client.answers import CaptionAnswer, read_problem
from service.client.errors import BusyError, ClientError, ProblemError, QuotaError
from service.client.images import Image, image_bytes
from service.client.many import Item
from service.client.retrying import Call, Options, batch_call


class Batch:
    """What became of each photo so far, and which are to be sent again."""

    def __init__(self, images: Iterable[Image], options: Options) -> None:
        """Reads the photos. One that cannot be read fails alone."""
        # The same id for all tries.
        self._options: Options = {**options, "request_id": options.get("request_id") or uuid.uuid4().hex}
        self._images = list(images)
        self._items: dict[int, Item] = {}
        self._data: dict[int, bytes] = {}  # those without an outcome
        for index, image in enumerate(self._images):
            try:
                self._data[index] = image_bytes(image)
            except (OSError, TypeError) as error:
                self._items[index] = Item(index, image, error=error)

    @property
    def items(self) -> list[Item]:
        return [self._items[index] for index in range(len(self._images))]

    @property
    def done(self) -> bool:
        return not self._data

    def call(self) -> tuple[Call, float | None]:
        """As `caption_call`, for those that are left."""
        return batch_call(self._data.values(), self._options)

    def read(self, said: Any) -> ProblemError | None:
        """The answer to `call`. Returns why some must be sent again, where some must.

        Raises `KeyError`, `TypeError` or `ValueError` for what is none.
        """
        results = said["results"]
        if [each["index"] for each in results] != list(range(len(self._data))):
            raise ValueError("not an outcome for each photo")
        again: list[ProblemError] = []
        for index, result in zip(list(self._data), results, strict=True):
            image = self._images[index]
            if result["caption"] is not None:
                self._items[index] = Item(index, image, CaptionAnswer.read(result["caption"]))
            else:
                problem = read_problem(result["problem"], result.get("retry_after"))
                self._items[index] = Item(index, image, error=problem)
                if isinstance(problem, BusyError | QuotaError):
                    again.append(problem)
                    continue
            del self._data[index]
        return max(again, key=lambda problem: problem.retry_after or 0.0, default=None)

    def give_up(self, error: ClientError) -> None:
        """Those that are left have no better answer than this, or than their own of the last try."""
        for index in self._data:
            if index not in self._items:
                self._items[index] = Item(index, self._images[index], error=error)
        self._data.clear()
