"""`deecap train`: trains a model as a configuration says, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.loading import stop


def train(
    config: Annotated[Path, typer.Option(help="TOML file, or the name of one that ships: flickr8k, ...")],
    data: Annotated[Path, typer.Option(help="Folder that the configuration's paths start from.")],
    work: Annotated[Path, typer.Option(help="Folder for checkpoints, log and kept features.")] = Path("work"),
    until: Annotated[str, typer.Option(help="The stage to end with; default: the configuration's last.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one per core.")] = 0,
) -> None:
    """Train; the same command goes on after a stop. The log is WORK/NAME/log.jsonl, one JSON object per line."""
    import torch

    from model.training.loop import Trainer
    from model.training.settings import find_settings

    if threads:
        torch.set_num_threads(threads)
    try:
        settings = find_settings(config)
        Trainer(settings, data, work / settings.name, work / "features").run(until)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        stop(str(error))
