"""How many bytes of request bodies a front holds: counted as they arrive, and bounded for all requests together."""

from __future__ import annotations

from service.errors import Problem

COME_BACK_SECONDS = 2  # Retry-After: what is held goes with the answers, and these take less


class Uploads:
    """The bodies of one front. Used from its event loop alone."""

    def __init__(self, most: int) -> None:
        """`most`: bytes of all bodies together."""
        self.most = most
        self.held = 0

    def begin(self, announced: int) -> Upload:
        """A body of that many bytes is about to come; 0 where that is not known.

        Raises `Problem` `overloaded` where there is no room for it: before it is sent, if its sender waits to hear.
        Nothing is set aside: who announces much and sends little takes no room from others.
        """
        self._check(announced)
        return Upload(self)

    def _check(self, more: int) -> None:
        if self.held + more > self.most:
            raise Problem(
                "overloaded", "Too many photos are being uploaded at the moment.", retry_after=COME_BACK_SECONDS
            )


class Upload:
    """What one request holds of it."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._held = 0
        self._closed = False

    def add(self, count: int) -> None:
        """`count` bytes came. Raises `Problem` `overloaded` where there is no room for them."""
        self._uploads._check(count)
        if not self._closed:
            self._held += count
            self._uploads.held += count

    def close(self) -> None:
        """The request is over. A second time does nothing."""
        self._closed = True
        self._uploads.held -= self._held
        self._held = 0
