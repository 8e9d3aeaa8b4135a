"""`deecap caption`: captions photos from the command line, to the screen or into a file that can be continued."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.caption_file import NotACaptionFileError, append, read_done, to_line
from service.commands.loading import load_captioner, read_settings, stop
from service.commands.photo_files import find_photos

if TYPE_CHECKING:
    from model.caption import Caption
    from model.captioner import Captioner
    from service.images import ImageLimits

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@dataclass
class Run:
    """What is the same for every photo of one run, and how many could not be captioned so far."""

    captioner: Captioner
    limits: ImageLimits
    speed: str | None
    tau: float | None
    beam: int
    failed: int = 0

    def try_caption(self, path: Path) -> Caption | None:
        """The photo's caption; None, with the reason on stderr, for a file that is not a whole image."""
        from tqdm import tqdm

        from service.errors import Problem
        from service.images import decode

        try:
            regions = self.captioner.look(decode(path.read_bytes(), self.limits))
        except (OSError, Problem) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            tqdm.write(f"{shown(path)}: {reason or error}", file=sys.stderr)  # which leaves a progress bar whole
            self.failed += 1
            return None
        return self.captioner.describe(regions, self.speed, tau=self.tau, beam=self.beam)


def caption(
    photos: Annotated[
        list[Path], typer.Argument(metavar="PHOTO", help="Photos, and folders of photos.", show_default=False)
    ],
    speed: Annotated[
        str | None, typer.Option(help="full, balanced, fast, turbo, or a number from 1. Default: balanced.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="Entropy in nats below which a word leaves the decoder, instead of a speed.")
    ] = None,
    beam: Annotated[int, typer.Option(min=1, max=5, help="Hypotheses kept while searching; 1 is greedy.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per photo: the words, where each left, and how sure.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write JSON lines to this file; photos already in it are skipped."),
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. Default: auto.")] = None,
) -> None:
    """Caption photos.

    One photo prints its caption; several, or a folder, print a line each: path, tab, caption. A file that is no
    image is reported and the rest goes on; the exit code is then 1.
    """
    from model.exits import UnknownSpeedError

    try:
        found = find_photos(photos)
        done = read_done(out) if out else set()
    except (FileNotFoundError, NotACaptionFileError) as error:
        stop(str(error))
    settings = read_settings(bundle=bundle, device=device)
    captioner = load_captioner(settings)
    try:
        captioner.speeds.resolve(speed, tau)
    except UnknownSpeedError as error:
        stop(str(error))

    from service.images import ImageLimits

    run = Run(captioner, ImageLimits(settings.max_pixels, settings.min_side), speed, tau, beam)
    if out:
        wanted = [path for path in found if str(path) not in done]
        _to_file(run, wanted, out)
        if len(wanted) < len(found):
            typer.echo(f"{len(found) - len(wanted)} were already in {shown(out)}", err=True)
    else:
        alone = len(photos) == 1 and photos[0].is_file()
        _to_screen(run, found, as_json, alone)
    if run.failed:
        if len(found) > 1:
            typer.echo(f"{run.failed} of {len(found)} photos could not be captioned", err=True)
        raise typer.Exit(1)


def _to_screen(run: Run, photos: Iterable[Path], as_json: bool, alone: bool) -> None:
    for path in photos:
        answer = run.try_caption(path)
        if answer is None:
            continue
        if as_json:
            typer.echo(to_line(to_record(path, answer, run.captioner)))
        else:
            typer.echo(answer.text if alone else f"{shown(path)}\t{answer.text}")


def _to_file(run: Run, photos: list[Path], out: Path) -> None:
    from tqdm import tqdm

    written = 0
    try:
        with out.open("ab") as file, tqdm(photos, unit="photo", disable=None) as progress:
            for path in progress:
                answer = run.try_caption(path)
                if answer is not None:
                    append(file, to_record(path, answer, run.captioner))
                    written += 1
    except OSError as error:
        stop(f"cannot write {shown(out)}: {error.strerror}", code=1)
    except KeyboardInterrupt:
        stop(f"stopped with {written} more in {shown(out)}; the same command goes on from there", code=INTERRUPTED)
    typer.echo(f"{written} captioned into {shown(out)}", err=True)


def to_record(path: Path, answer: Caption, captioner: Captioner) -> dict[str, object]:
    """One photo's line, in the names of the HTTP answer; entropies and τ in nats."""
    return {
        "path": str(path),
        "caption": answer.text,
        "confidence": answer.confidence,
        "words": [{"text": word.text, "exit_layer": word.exit_layer, "entropy": word.entropy} for word in answer.words],
        "speed": asdict(answer.speed),
        "speedup": answer.speedup,
        "model": {"name": captioner.name, "revision": captioner.revision},
    }


def shown(path: Path) -> str:
    """The path as it can be printed: bytes of a file name that are no text appear escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")
