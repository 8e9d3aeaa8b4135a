"""`deecap export`: writes a finished training run as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.loading import stop


def export(
    config: Annotated[Path, typer.Option(help="The configuration that was trained.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    work: Annotated[Path, typer.Option(help="The folder that training worked in.")] = Path("work"),
) -> None:
    """Write a finished run as a bundle; `deecap calibrate` then measures its speeds."""
    from model.training.release import write_bundle
    from model.training.settings import find_settings

    try:
        settings = find_settings(config)
        write_bundle(settings, work / settings.name, out)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        stop(str(error))
    typer.echo(f"{out}: written; next: deecap calibrate --bundle {out} ...")
