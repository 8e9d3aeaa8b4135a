"""`deecap worker`: takes photos from a Redis queue and captions them; any number of these share the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.loading import read_settings, require_onnx_runtime, stop


def worker(
    broker: Annotated[str | None, typer.Option(help="The queue's Redis: redis://host:port/0.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of its own probes and metrics; 0 takes any free one.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
) -> None:
    """Caption for fronts that share a Redis queue, until SIGTERM; then finish what was begun.

    What is not given here comes from the environment: DEECAP_BROKER, DEECAP_METRICS_PORT, DEECAP_BUNDLE and more.
    """
    from service.settings import MEMORY

    settings = read_settings(broker=broker, metrics_port=metrics_port, bundle=bundle, device=device)
    if settings.broker == MEMORY:
        stop("a worker needs a queue to take photos from: set DEECAP_BROKER=redis://... (`deecap serve` has its own)")
    require_onnx_runtime()
    from service.worker_process import run_worker

    run_worker(settings)
