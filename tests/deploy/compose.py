"""Runs docker-compose.yml as plain processes: the same commands, environments and ports, without containers.

Each service gets a loopback address of its own in place of its name, as a container network would give it one, so that
two Redis servers can both listen on 6379. What stands for the network's name server is a replacement of names by
addresses in arguments, environments and mounted files. Images are not run: a program of this machine takes their place.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
READY_SECONDS = 60.0


def load(*names: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The services of the files, the later ones on top, with variables filled in as Compose does."""
    merged: dict[str, Any] = {}
    for name in names:
        services = yaml.safe_load((ROOT / name).read_text())["services"]
        merged = _merge(merged, _interpolated(services, environment or {}))
    return merged


class Compose:
    """Some services of docker-compose.yml, from `start` to `stop`."""

    def __init__(self, folder: Path, services: dict[str, Any]) -> None:
        """`folder`: for what they write, and for their logs."""
        self.folder = folder
        self.services = services
        net = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
        self.addresses = {name: f"{net}.{host}" for host, name in enumerate(services, start=10)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Compose:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def url(self, service: str, port: int) -> str:
        return f"http://{self.addresses[service]}:{port}"

    def log(self, service: str) -> str:
        return (self.folder / f"{service}.log").read_text(errors="replace")

    def start(self, *names: str) -> None:
        """These, each after what it depends on. Returns once each that others wait for is healthy."""
        for name in names:
            self._start(name)

    def wait_healthy(self, name: str, seconds: float = READY_SECONDS) -> None:
        """Until the service's health check passes; fails with its log."""
        check = self.services[name].get("healthcheck", {}).get("test") or stage(self._target(name))["HEALTHCHECK"]
        end = time.monotonic() + seconds
        while not self._healthy(name, check):
            if self.processes[name].poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{name} is not healthy:\n{self.log(name)[-4000:]}")
            time.sleep(0.2)

    def stop(self, *names: str) -> dict[str, int]:
        """These, or all, in the order opposite to that of their start. Their exit codes."""
        codes = {}
        for name in [name for name in reversed(self.processes) if not names or name in names]:
            process = self.processes.pop(name)
            process.send_signal(signal.SIGTERM)
            try:
                codes[name] = process.wait(seconds_of(self.services[name].get("stop_grace_period", "10s")))
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait(10)
        return codes

    def _start(self, name: str) -> None:
        if name in self.processes:
            return
        service = self.services[name]
        for needed, how in service.get("depends_on", {}).items():
            self._start(needed)
            if how["condition"] == "service_healthy":
                self.wait_healthy(needed)
        command = service.get("command") or stage(self._target(name))["CMD"]
        arguments = shlex.split(command) if isinstance(command, str) else [str(part) for part in command]
        if name == "prometheus":  # an image with an entry point
            arguments.insert(0, "prometheus")
        arguments = [self._here(argument, name) for argument in arguments]
        environment = {key: self._here(str(value), name) for key, value in service.get("environment", {}).items()}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [_program(arguments[0]), *arguments[1:]],
                cwd=self.folder,
                env={**_inherited(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _target(self, name: str) -> str:
        return str(self.services[name]["build"]["target"])

    def _here(self, text: str, name: str) -> str:
        """What the container would see, as it is on this machine."""
        for volume in self.services[name].get("volumes", []):
            source, target = volume.split(":")[:2]
            text = re.sub(rf"{re.escape(target)}(?=/|$)", lambda _, s=source: str(self._mounted(s)), text)
        text = text.replace("0.0.0.0", self.addresses[name]).replace("127.0.0.1", self.addresses[name])
        return self._named(text)

    def _named(self, text: str) -> str:
        """With addresses for names. A name stands after one of /@ and before a port."""
        names = "|".join(sorted(map(re.escape, self.addresses), key=len, reverse=True))
        return re.sub(rf"(?<=[/@])({names})(?=:\d)", lambda found: self.addresses[found[1]], text)

    def _mounted(self, source: str) -> Path:
        """A copy of a mounted folder with addresses for names, or an empty folder for a volume."""
        place = self.folder / source.replace("/", "_").lstrip("._")
        if not place.exists():
            if source.startswith("."):
                shutil.copytree(ROOT / source, place)
                for path in place.rglob("prometheus.yml"):
                    path.write_text(json.dumps(self._without_dns(yaml.safe_load(path.read_text()))))
            else:
                place.mkdir()
        return place

    def _without_dns(self, config: dict[str, Any]) -> dict[str, Any]:
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}  # a test has no minutes to wait
        for job in config["scrape_configs"]:
            for found in job.pop("dns_sd_configs", []):
                places = [
                    f"{self.addresses[name]}:{found['port']}" for name in found["names"] if name in self.addresses
                ]
                job.setdefault("static_configs", []).append({"targets": places})
            for target in job.get("static_configs", []):
                target["targets"] = [
                    place.replace("127.0.0.1", self.addresses["prometheus"]) for place in target["targets"]
                ]
        return config

    def _healthy(self, name: str, check: list[str]) -> bool:
        arguments = [self._here(part, name) for part in check[1:]]
        if arguments[0] == "wget":  # which a machine need not have
            try:
                with urllib.request.urlopen(arguments[-1], timeout=3):
                    return True
            except OSError:
                return False
        command = ["sh", "-c", arguments[0]] if check[0] == "CMD-SHELL" else [_program(arguments[0]), *arguments[1:]]
        variables = {key: str(value) for key, value in self.services[name].get("environment", {}).items()}
        return (
            subprocess.run(command, env={**_inherited(), **variables}, capture_output=True, timeout=30).returncode == 0
        )


def stage(target: str) -> dict[str, list[str]]:
    """CMD and HEALTHCHECK (as Compose writes it) of a stage of the Dockerfile; both are in JSON there."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    stages = re.split(r"^FROM ", text, flags=re.M)
    found = next(each for each in stages if each.splitlines()[0].endswith(f" AS {target}"))
    commands = {
        key: json.loads(value) for key, value in re.findall(r"^(CMD|HEALTHCHECK.*?CMD) +(\[.*\])$", found, re.M)
    }
    return {
        ("CMD" if key == "CMD" else "HEALTHCHECK"): ([] if key == "CMD" else ["CMD"]) + said
        for key, said in commands.items()
    }


def seconds_of(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", duration).groups()
    return float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]


def loopback_is_wide() -> bool:
    """Whether all of 127.0.0.0/8 is this machine, as on Linux."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.1.2.3", 0))
        except OSError:
            return False
    return True


def _program(name: str) -> str:
    """The program of the image, on this machine: of this Python's environment, or from PATH."""
    if name == "python":
        return sys.executable
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None and name == "redis-server":
        from tests.service.redis_server import find_binary

        found = find_binary()
    if found is None:
        raise FileNotFoundError(name)
    return found


def _inherited() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("DEECAP_")} | {"OMP_NUM_THREADS": "1"}


def _interpolated(value: Any, environment: dict[str, str]) -> Any:
    """With `${NAME:-default}` filled in, in all strings there are; `$$` is a dollar."""
    if isinstance(value, dict):
        return {key: _interpolated(each, environment) for key, each in value.items()}
    if isinstance(value, list):
        return [_interpolated(each, environment) for each in value]
    if not isinstance(value, str):
        return value
    filled = re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: environment.get(found[1]) or found[2] or "", value)
    return filled.replace("$$", "$")


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {
            key: _merge(below[key], above[key]) if key in below and key in above else below.get(key, above.get(key))
            for key in below | above
        }
    return below + above if isinstance(below, list) and isinstance(above, list) else above
