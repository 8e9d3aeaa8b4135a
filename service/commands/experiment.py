"""`deecap experiment`: measures trained systems into result rows, and makes the paper's tables and figures of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from model.exits import SpeedTable
from service.commands.loading import read_settings, stop
from service.requirements_check import installed_version

NAMES = (
    "table1", "table3", "table4", "figure2", "figure3", "figure5", "figure6",
    "reliability", "policies", "ablations", "seeds",
)  # fmt: skip
ROWS_HELP = "Folder of result rows. Default: those that were committed."

experiment = typer.Typer(help="Measure systems, and rebuild the paper's tables and figures.", no_args_is_help=True)


@experiment.command()
def measure(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Folder that the configuration's paths start from.")],
    config: Annotated[str | None, typer.Option(help="A trained configuration: TOML file, or name.")] = None,
    work: Annotated[Path, typer.Option(help="The folder that training worked in.")] = Path("work"),
    run: Annotated[str | None, typer.Option(help="Its folder there. Default: the configuration's name.")] = None,
    stage: Annotated[str, typer.Option(help="Of the run. Default: the last.")] = "",
    bundle: Annotated[Path | None, typer.Option(help="A bundle, in place of a configuration.")] = None,
    captions: Annotated[Path | None, typer.Option(help="With --bundle: caption file, from DATA.")] = None,
    photos: Annotated[Path | None, typer.Option(help="With --bundle: folder of photos, from DATA.")] = None,
    split: Annotated[str, typer.Option(help="Which photos of the file.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None,
    tested: Annotated[str | None, typer.Option(help="Layers to test, as 1,2,3, or `every`.")] = None,
    skipped: Annotated[str | None, typer.Option(help="computed or copied states of words that left.")] = None,
    margin: Annotated[
        str | None, typer.Option(help="Nats above tau from which the exit head's guess spares a test, or `none`.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Which rows it may be compared with.")] = "",
    meteor: Annotated[bool, typer.Option(help="METEOR and SPICE too, where Java and their jars are there.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one per core.")] = 0,
    rows: Annotated[Path | None, typer.Option(help=ROWS_HELP)] = None,
) -> None:
    """Caption a split with one system at several thresholds, judge its exits, and write a result row."""
    if (config is None) == (bundle is None):
        stop("give --config or --bundle")
    if bundle and not (captions and photos):
        stop("--bundle needs --captions and --photos")
    import torch

    from model.bundle import BundleError
    from model.evaluation.result_rows import write_row
    from model.experiments.measure import measure as make_row
    from model.experiments.measure import parse_policy, read_split
    from model.experiments.page import ROWS
    from model.experiments.systems import from_bundle, from_run
    from model.training.settings import find_settings

    if threads:
        torch.set_num_threads(threads)
    try:
        if config is not None:
            settings = find_settings(Path(config))
            told = settings.data.captions
            system = from_run(settings, work / (run or settings.name), data, stage, budget)
        else:
            assert bundle is not None
            assert photos is not None
            told = str(captions)
            system = from_bundle(bundle, data / photos, budget)
        chosen = read_split(data / told, told, split, limit)
        policy = parse_policy(system, tested, skipped, margin)
        row = make_row(system, chosen, policy, _command(context), meteor)
    except (BundleError, ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        stop(str(error))
    path = write_row(rows or ROWS, row)
    for point in row.points:
        typer.echo(f"tau {point.tau:8.4f}  SpeedUp {point.speedup:.2f}  CIDEr-D {point.mean_cider:.1f}")
    typer.echo(f"{path}: written")


def _command(context: typer.Context) -> str:
    """The options as they were given, but for the folders of one machine."""
    words = ["deecap", "experiment", "measure"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or value == parameter.default or parameter.name in ("rows", "threads"):
            continue
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            shown = {"data": "DATA", "work": "WORK"}.get(parameter.name or "", str(value))
            if Path(shown).is_absolute():
                shown = Path(shown).name
            words += [parameter.opts[0], shown]
    return shlex.join(words)


@experiment.command("all")
def everything(
    out: Annotated[Path, typer.Option(help="Folder of results.md and of results/ beside it.")] = Path("docs"),
    rows: Annotated[Path | None, typer.Option(help=ROWS_HELP)] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Whose speed table is shown. Default: the one that ships.")
    ] = None,
) -> None:
    """Rebuild every table, figure and the page of results from the rows that there are."""
    _needs_matplotlib()
    from model.evaluation.result_rows import read_rows
    from model.experiments.page import ROWS, write_page

    try:
        name, table = _speed_table(bundle)
        page = write_page(out, read_rows(rows or ROWS), name, table)
    except (ValueError, OSError) as error:
        stop(str(error))
    typer.echo(f"{page}: written")


@experiment.command()
def speedups(
    out: Annotated[Path | None, typer.Option(help="Folder to write table and plot to.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
) -> None:
    """The paper's SpeedUp, executed layer-rows and the clock, side by side, from a bundle's measured table."""
    from model.experiments.others import speedups as compare

    try:
        name, table = _speed_table(bundle)
    except (ValueError, OSError) as error:
        stop(str(error))
    result = compare(table, name)
    typer.echo(result.to_markdown())
    if out:
        _needs_matplotlib()
        result.write(out, "speedups")


def _speed_table(bundle: Path | None) -> tuple[str, SpeedTable]:
    """A bundle's name and its speeds. Raises what reading them raises."""
    import json

    from model.bundle import CONFIG, SPEEDS

    folder = read_settings(bundle=bundle).bundle
    name = json.loads((folder / CONFIG).read_text()).get("name", folder.name)
    return name, SpeedTable.from_json(json.loads((folder / SPEEDS).read_text()))


def _needs_matplotlib() -> None:
    if not installed_version("matplotlib"):
        stop("plots need matplotlib: pip install '.[train]'", code=1)


def _from_rows(name: str) -> Callable[..., None]:
    def command(
        rows: Annotated[Path | None, typer.Option(help=ROWS_HELP)] = None,
        out: Annotated[Path | None, typer.Option(help="Folder to write tables and plots to.")] = None,
    ) -> None:
        from model.evaluation.result_rows import read_rows
        from model.experiments.page import ROWS, results

        try:
            found = results(name, read_rows(rows or ROWS))
        except ValueError as error:
            stop(str(error))
        if not found:
            stop("there is no result row yet: `deecap experiment measure` makes one", code=1)
        if out:
            _needs_matplotlib()
        for number, (comparison, result) in enumerate(found.items(), start=1):
            typer.echo(f"# {result.title}: {comparison}\n\n{result.to_markdown()}\n")
            if out:
                result.write(out, f"{name}-{number}")

    command.__doc__ = f"Rebuild {name} from result rows."
    return command


for _name in NAMES:
    experiment.command(_name)(_from_rows(_name))
