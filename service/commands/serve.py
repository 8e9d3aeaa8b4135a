"""`deecap serve`: the HTTP service, with the model in the same process or, over Redis, without."""

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

    With DEECAP_BROKER=redis://... it is a front alone, and `deecap worker` captions; else both are in this process.
    What is not given here comes from the environment: DEECAP_HOST, DEECAP_PORT, DEECAP_BUNDLE, DEECAP_DEVICE and more.
    """
    from service.settings import MEMORY, SettingsError

    settings = read_settings(host=host, port=port, bundle=bundle, device=device)
    if settings.broker == MEMORY:
        require_onnx_runtime()  # a front alone needs none
    from service.broker.base import BrokerError
    from service.serve import serve as run

    try:
        run(settings)
    except (SettingsError, BrokerError) as error:  # API keys or an address, which are read with the app
        stop(str(error))
