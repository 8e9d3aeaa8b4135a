"""`deecap doctor`: says in plain words whether this machine can caption, one check per line."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import typer

from service.requirements_check import onnx_runtime

if TYPE_CHECKING:
    from PIL import Image

    from model.captioner import Captioner
    from service.settings import Settings

OLDEST_PYTHON = (3, 11)
SAMPLE = Path(__file__).parents[2] / "samples" / "cameraman.jpg"  # there in a checkout, not in an installed package
REDIS_PATIENCE = 2.0  # seconds


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    status: Literal["OK", "WARN", "FAIL"]
    words: str


def doctor(
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
) -> None:
    """Check the installation, the model and one caption; exit code 1 if anything must be mended."""
    failed = False
    for name, finding in Examination(bundle, device).checks():
        typer.echo(f"{finding.status:<4}  {name}: {finding.words}")
        failed |= finding.status == "FAIL"
    if failed:
        raise typer.Exit(1)


@dataclass
class Examination:
    """One round of checks, with what the earlier ones found out for the later ones."""

    bundle: Path | None
    device: str | None
    settings: Settings | None = None
    captioner: Captioner | None = None

    def checks(self) -> Iterator[tuple[str, Finding]]:
        """Name and finding of each check, as each is done; what rests on a failed one is left out."""
        yield "Python", check_python()
        yield "PyTorch", guarded(check_torch)
        yield "ONNX Runtime", guarded(lambda: Finding("OK", onnx_runtime()))
        yield "broker", guarded(lambda: check_broker(os.environ.get("DEECAP_BROKER", "")))
        yield "settings", guarded(self._read_settings)
        if settings := self.settings:
            if settings.redis_cache:
                yield "cache", guarded(lambda: check_broker(settings.redis_cache))
            yield "providers", guarded(lambda: check_providers(settings.device))
            yield "bundle", guarded(lambda: self._load(settings))
        if captioner := self.captioner:
            yield "caption", guarded(lambda: check_caption(captioner))

    def _read_settings(self) -> Finding:
        from service.keys import read_keys
        from service.settings import Settings

        self.settings = Settings.load(bundle=self.bundle, device=self.device)
        keys = len(read_keys(self.settings))
        who = f"{keys} API keys" if keys else "no API keys, everybody may caption"
        return Finding("OK", f"device {self.settings.device}, bundle {self.settings.bundle}, {who}")

    def _load(self, settings: Settings) -> Finding:
        from model.captioner import Captioner

        self.captioner = Captioner.load(settings.bundle, settings.device)
        return describe_bundle(self.captioner, settings.bundle)


def guarded(check: Callable[[], Finding]) -> Finding:
    """The check's finding, or FAIL with what it raised: the doctor must get to the end of its round."""
    try:
        return check()
    except Exception as error:
        return Finding("FAIL", str(error) or type(error).__name__)


def check_python() -> Finding:
    words = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("FAIL", f"{words}; DeeCap needs {'.'.join(map(str, OLDEST_PYTHON))} or later")
    return Finding("OK", words)


def check_torch() -> Finding:
    """Version, and threads against the cores this process may use: more threads than cores wait for each other."""
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    words = f"{torch.__version__}, {threads} threads for {cores} cores"
    if threads > cores:
        return Finding("WARN", f"{words}; set OMP_NUM_THREADS={cores}")
    return Finding("OK", words)


def usable_cores() -> int:
    """Cores this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_providers(device: str) -> Finding:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    words = ", ".join(provider.removesuffix("ExecutionProvider") for provider in providers)
    if device == "cuda" and "CUDAExecutionProvider" not in providers:
        return Finding("FAIL", f"{words}; device cuda needs CUDA: pip install '.[gpu]', and install the NVIDIA driver")
    return Finding("OK", words)


def describe_bundle(captioner: Captioner, folder: Path) -> Finding:
    """Name, revision, size on disk in megabytes, and what each tier was measured to promise."""
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    tiers = ", ".join(f"{tier} {captioner.speeds.resolve(tier).promised:.2f}x" for tier in captioner.speeds.tiers)
    return Finding(
        "OK", f"{captioner.name} {captioner.revision}, {megabytes:.1f} MB, on {captioner.device}; speeds: {tiers}"
    )


def check_broker(url: str) -> Finding:
    """Whether the broker answers; a password in `url` is not shown."""
    if not url or url == "memory":
        return Finding("OK", "in memory, within one process (DEECAP_BROKER names no Redis)")
    import redis

    parts = urlsplit(url)
    where = f"{parts.hostname}:{parts.port or 6379}"
    client = redis.Redis.from_url(url, socket_connect_timeout=REDIS_PATIENCE, socket_timeout=REDIS_PATIENCE)
    try:
        version = client.info("server")["redis_version"]
    except redis.RedisError as error:
        return Finding("FAIL", f"no Redis answers at {where}: {error}")
    finally:
        client.close()
    return Finding("OK", f"Redis {version} at {where}")


def check_caption(captioner: Captioner) -> Finding:
    """One caption at the default speed, timed after a first one that warms up."""
    image, what = canary()
    captioner.describe(captioner.look(image))
    start = time.perf_counter()
    regions = captioner.look(image)
    seen = time.perf_counter()
    caption = captioner.describe(regions)
    done = time.perf_counter()
    times = f"look {(seen - start) * 1e3:.0f} ms, describe {(done - seen) * 1e3:.0f} ms"
    if not caption.text:
        return Finding("WARN", f"{what} got an empty caption; {times}")
    return Finding("OK", f'"{caption.text}" for {what}; {times}')


def canary() -> tuple[Image.Image, str]:
    """A photo to try, and its name: a sample of the checkout, or a colour gradient where there is none."""
    from PIL import Image

    if SAMPLE.is_file():
        return Image.open(SAMPLE), SAMPLE.name
    ramp = Image.linear_gradient("L")
    turned = ramp.rotate(90)
    return Image.merge("RGB", (ramp, turned, ramp.rotate(180))), "a colour gradient"
