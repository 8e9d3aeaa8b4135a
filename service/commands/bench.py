"""`deecap bench`: how fast the bundle captions, beside what the machine allows, shallower decoders and other models."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from service.commands.loading import load_captioner, read_settings, stop
from service.requirements_check import installed_version

SAMPLES = Path(__file__).parents[2] / "samples"  # there in a checkout, not in an installed package
RESULT, PICTURE, BREAKDOWN = "bench.json", "bench.png", "breakdown.png"


def bench(
    context: typer.Context,
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of image files or tar archives. Default: the checkout's samples.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Captions; photos repeat where there are fewer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times each is timed, of which the median counts.")] = 5,
    peers: Annotated[bool, typer.Option(help="Time other captioners too, at their real sizes.")] = True,
    peers_repeats: Annotated[int, typer.Option(min=1, help="Captions of each of those, after one to warm up.")] = 3,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Also show where the milliseconds go.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help=f"Folder to write {RESULT} and {PICTURE} to.")
    ] = None,
) -> None:
    """Measure SpeedUp, milliseconds and captions per second; prints tables.

    The rest of the machine should be idle. Figures that are compared come from the same run and take turns in it.
    """
    for needed, package, instead in (
        (peers, "transformers", "or leave the peers out with --no-peers"),
        (out, "matplotlib", "or leave out --out"),
    ):
        if needed and not installed_version(package):
            stop(f"this needs {package}: pip install '.[bench]', {instead}")
    if photos is None and not SAMPLES.is_dir():
        stop("there are no sample photos beside an installed package: name a folder with --photos")

    from model.bench.bench import Options
    from model.bench.bench import bench as measure
    from model.bench.photos import read_photos
    from model.bench.report import to_text

    try:
        files = read_photos(photos or SAMPLES, count)
    except (FileNotFoundError, ValueError) as error:
        stop(str(error))
    captioner = load_captioner(read_settings(bundle=bundle, device=device))
    options = Options(count=count, rounds=rounds, peers_repeats=peers_repeats, breakdown=breakdown)
    if not peers:
        options = replace(options, peers=())
    try:
        result = measure(captioner, files, options, _command(context))
    except ValueError as error:
        stop(str(error))
    typer.echo(to_text(result))
    if out:
        _write(result, out)


def _command(context: typer.Context) -> str:
    """The command line as it was given, but for options left at their defaults and where the figures went."""
    words = ["deecap", "bench"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name == "out" or value is None or value == parameter.default:
            continue
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)


def _write(result: dict[str, Any], out: Path) -> None:
    from model.bench.plot import plot_bench, plot_breakdown

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        plot_bench(result, out / PICTURE)
        if "breakdown" in result:
            plot_breakdown(result["breakdown"], out / BREAKDOWN)
    except OSError as error:
        stop(f"cannot write to {out}: {error.strerror}", code=1)
    typer.echo(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
