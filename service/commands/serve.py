"""`deecap serve`: the HTTP service on this machine, front and worker in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.loading import read_settings, require_onnx_runtime, stop


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
) -> None:
    """Start the service and print its address.

    What is not given here comes from the environment: DEECAP_HOST, DEECAP_PORT, DEECAP_BUNDLE, DEECAP_DEVICE.
    """
    settings = read_settings(host=host, port=port, bundle=bundle, device=device)
    if settings.broker != "memory":
        stop("this version serves through the memory broker alone: leave DEECAP_BROKER unset")
    require_onnx_runtime()
    from service.serve import serve as run

    run(settings)
