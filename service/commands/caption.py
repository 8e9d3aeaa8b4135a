"""`deecap caption`: captions photos, here or at a service, to the screen or into a file that can be continued."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.caption_at import Piece, StoppedError, captions_at, words_at
from service.commands.caption_file import NotACaptionFileError, Outcome, append, read_done, to_line
from service.commands.loading import load_captioner, read_settings, stop
from service.commands.photo_files import UnreadableError, find_photos, read_photo
from service.progress import bar, say

if TYPE_CHECKING:
    from model.caption import Caption
    from model.captioner import Captioner
    from service.settings import Settings

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


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
    url: Annotated[
        str | None,
        typer.Option(help="Have a service caption, such as http://127.0.0.1:8000; its key is DEECAP_CLIENT_KEY."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Photos asked for at once, with --url.")] = 8,
    stream: Annotated[
        bool, typer.Option("--stream", help="With --url: print the words as they are decided, one photo at a time.")
    ] = False,
) -> None:
    """Caption photos.

    One photo prints its caption; several, or a folder, print a line each: path, tab, caption. A file that is no
    image is reported and the rest goes on; the exit code is then 1.
    """
    if stream and (url is None or out is not None or as_json):
        stop("--stream prints words of a service: it needs --url, and goes with neither --out nor --json")
    try:
        found = find_photos(photos)
        done = read_done(out) if out else set()
    except (FileNotFoundError, NotACaptionFileError) as error:
        stop(str(error))
    wanted = [path for path in found if str(path) not in done]
    if url is None:
        outcomes = _captions_here(wanted, speed, tau, beam, read_settings(bundle=bundle, device=device))
    elif bundle is None and device is None:
        outcomes = captions_at(url, wanted, speed, tau, beam, concurrency)
    else:
        stop("give --url, or --bundle and --device: a service has its own")
    alone = len(photos) == 1 and photos[0].is_file()
    try:
        if stream and url is not None:
            failed = _words_to_screen(words_at(url, wanted, speed, tau, beam), alone)
        elif out:
            failed = _to_file(outcomes, len(wanted), out)
            if len(wanted) < len(found):
                typer.echo(f"{len(found) - len(wanted)} were already in {shown(out)}", err=True)
        else:
            failed = _to_screen(outcomes, as_json, alone)
    except StoppedError as error:
        stop(str(error), error.code)
    if failed:
        if len(found) > 1:
            typer.echo(f"{failed} of {len(found)} photos could not be captioned", err=True)
        raise typer.Exit(1)


def _captions_here(
    photos: list[Path], speed: str | None, tau: float | None, beam: int, settings: Settings
) -> Iterator[Outcome]:
    """What becomes of each photo in this process. The model is loaded, and the speed looked up, at once."""
    from model.exits import UnknownSpeedError

    captioner = load_captioner(settings)
    try:
        captioner.speeds.resolve(speed, tau)
    except UnknownSpeedError as error:
        stop(str(error))
    from service.images import ImageLimits

    limits = ImageLimits(settings.max_pixels, settings.min_side)

    def one(path: Path) -> Outcome:
        try:
            regions = captioner.look(read_photo(path, limits, captioner.sufficient_side))
        except (UnreadableError, OSError) as error:
            return path, None, str(error)
        return path, to_record(path, captioner.describe(regions, speed, tau=tau, beam=beam), captioner), ""

    return map(one, photos)


def _to_screen(outcomes: Iterable[Outcome], as_json: bool, alone: bool) -> int:
    """Returns how many failed."""
    failed = 0
    for path, record, reason in outcomes:
        if record is None:
            say(f"{shown(path)}: {reason}")
            failed += 1
        elif as_json:
            typer.echo(to_line(record))
        else:
            typer.echo(record["caption"] if alone else f"{shown(path)}\t{record['caption']}")
    return failed


def _words_to_screen(pieces: Iterable[Piece], alone: bool) -> int:
    """Each word as soon as it is there. Returns how many photos failed."""
    failed = 0
    begun = False  # there are words in the line
    for piece in pieces:
        if begun and (piece.again or piece.failed):
            typer.echo(" ...")  # that was not it
            begun = False
        if piece.failed:
            say(f"{shown(piece.path)}: {piece.failed}")
            failed += 1
        elif piece.done:
            typer.echo()
            begun = False
        else:
            before = " " if begun else "" if alone else f"{shown(piece.path)}\t"
            typer.echo(before + piece.word, nl=False)
            sys.stdout.flush()
            begun = True
    return failed


def _to_file(outcomes: Iterable[Outcome], count: int, out: Path) -> int:
    """Returns how many failed."""
    written = failed = 0
    more = "{} more in " + f"{shown(out)}; the same command goes on from there"
    try:
        with out.open("ab") as file, bar(sys.stderr.isatty(), count) as progress:
            for path, record, reason in outcomes:
                if record is None:
                    say(f"{shown(path)}: {reason}")
                    failed += 1
                else:
                    append(file, record)
                    written += 1
                progress.update()
    except OSError as error:
        stop(f"cannot write {shown(out)}: {error.strerror}", code=1)
    except StoppedError as error:
        stop(f"{error}: stopped with {more.format(written)}" if written else str(error), error.code)
    except KeyboardInterrupt:
        stop(f"stopped with {more.format(written)}", code=INTERRUPTED)
    typer.echo(f"{written} captioned into {shown(out)}", err=True)
    return failed


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
