"""The `deecap` command line: one module of `service/commands` per subcommand, one line here each.

A command imports what it needs (torch among it) when it runs, so that `deecap --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from service.commands.bench import bench
from service.commands.calibrate import calibrate
from service.commands.caption import caption
from service.commands.check_data import check_data
from service.commands.convert_vg import convert_vg
from service.commands.doctor import doctor
from service.commands.evaluate import evaluate
from service.commands.experiment import experiment
from service.commands.export import export
from service.commands.extract import extract
from service.commands.look import look
from service.commands.serve import serve
from service.commands.train import train
from service.commands.train_regions import train_regions
from service.commands.worker import worker
from service.requirements_check import installed_version

app = typer.Typer(
    name="deecap",
    help="Image captioning at a speed you choose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback is for a bug report: whole and plain
    rich_markup_mode=None,
)
app.command()(caption)
app.command()(serve)
app.command()(worker)
app.command()(doctor)
app.command()(check_data)
app.command()(train)
app.command()(train_regions)
app.command()(export)
app.command()(calibrate)
app.command()(evaluate)
app.command()(bench)
app.command()(extract)
app.command()(look)
app.command()(convert_vg)
app.add_typer(experiment, name="experiment")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"deecap {installed_version('deecap') or '(not installed)'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Image captioning at a speed you choose."""


def main() -> None:
    """The console script. Exit codes: 0 done, 1 something failed, 2 asked for what cannot be."""
    app()
