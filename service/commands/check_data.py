"""`deecap check-data`: says all that is wrong with a data folder, before training finds it out one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.loading import stop


def check_data(
    config: Annotated[Path, typer.Option(help="TOML file, or the name of one that ships, as for `deecap train`.")],
    data: Annotated[Path, typer.Option(help="Folder that the configuration's paths start from.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Photos and features must be there, but are not read.")
    ] = False,
) -> None:
    """Check captions, photos and features; prints every problem, and ends with code 1 where there is one."""
    from model.training.check_data import check_data as check
    from model.training.settings import find_settings

    try:
        settings = find_settings(config)
    except (ValueError, FileNotFoundError) as error:
        stop(str(error))
    report = check(settings, data, quick)
    for name, value in report.facts.items():
        shown = f"{value:.2%}" if isinstance(value, float) else f"{value:,}"
        typer.echo(f"{name.replace('_', ' ')}: {shown}")
    for problem in report.problems:
        typer.echo(f"problem: {problem}")
    if report.problems:
        stop(f"{len(report.problems)} problems: `deecap train` would stop at one of them, or learn from it", code=1)
    typer.echo("no problems")
