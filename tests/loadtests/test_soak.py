"""Ten minutes at 70% of the knee, front and worker apart: no failed request, and memory that does not grow.

`SOAK_SECONDS=60 pytest -m long tests/loadtests` to try it; memory is watched after a tenth of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.redis_server import MISSING, RedisServer, find_binary

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
SETTLED = 0.1  # of the time: the first minute of ten
GROWTH = 0.03


@pytest.mark.long
def test_nothing_fails_and_memory_is_flat(tmp_path: Path) -> None:
    if not find_binary():
        pytest.skip(MISSING)
    redis = RedisServer()
    redis.start()
    try:
        out = tmp_path / "soak.json"
        # In a process of its own: locust changes how all of Python's sockets work.
        command = [sys.executable, "-m", "loadtests.soak", "--queue", redis.url, "--seconds", str(SECONDS)]
        done = subprocess.run(
            [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        redis.close()
    said = json.loads(out.read_text())
    print(said["words"])
    assert said["not ok"] == {}, said["not ok"]
    for name, sizes in said["resident"].items():
        settled = [size for at, size in sizes if at >= SETTLED * SECONDS]
        assert len(settled) >= 10
        assert max(settled) <= (1 + GROWTH) * min(settled), (name, min(settled), max(settled))
