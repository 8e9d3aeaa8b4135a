"""Once a process has what it keeps, the garbage collector need not go over it again and again."""

from __future__ import annotations

import gc


def settled() -> None:
    """To be called by a process that serves, when all is loaded; more than once is fine.

    With a model there are 230,000 objects, and a full collection stops every thread for 0.1 s: that is what the slowest
    requests wait for. Here what is garbage now is dropped, and what is not is never looked at again.
    """
    gc.collect()
    gc.freeze()
