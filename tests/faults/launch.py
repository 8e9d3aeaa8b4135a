"""`python -m tests.faults.launch worker|serve`: the real process, with the stand-in for a model. SIGUSR1 hangs it.

From the environment: `STAND_IN_LOOK` and `STAND_IN_WORDS`, seconds; `STAND_IN_EARLY_EXIT`, 1 or nothing;
`STAND_IN_WORK`, a file to write down in when the model worked.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable

import service.wiring
from service.serve import serve
from service.settings import Settings
from service.worker_process import run_worker
from tests.faults.stand_in import StandIn


def main() -> None:
    look, words = (float(os.environ[f"STAND_IN_{part}"]) for part in ("LOOK", "WORDS"))
    captioner = StandIn(look, words, _writer(), early_exit=bool(os.environ.get("STAND_IN_EARLY_EXIT")))
    signal.signal(signal.SIGUSR1, lambda *_: captioner.hangs.set())
    service.wiring.bundle_loader = lambda settings: lambda: captioner
    {"worker": run_worker, "serve": serve}[sys.argv[1]](Settings.load())


def _writer() -> Callable[[float, float], None]:
    path = os.environ.get("STAND_IN_WORK")
    if not path:
        return lambda *_: None
    file = open(path, "a")  # noqa: SIM115  # until the process ends; buffered, since the model must not wait for it
    atexit.register(file.close)
    return lambda begin, end: print(f"{begin:.6f} {end:.6f}", file=file)


main()
