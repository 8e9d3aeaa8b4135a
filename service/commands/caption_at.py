"""`deecap caption --url`: the same photos, captioned by a service elsewhere. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from service.commands.caption_file import Outcome

if TYPE_CHECKING:
    from service.client import CaptionAnswer, Options

FIRST_SECONDS = 10.0  # for the first question, whether the service is there
SECONDS = 120.0  # that one photo may take with all its tries: a rolling update of the service is waited for


class StoppedError(Exception):
    """No photo can be captioned there, or none any more. `code`: what the command should end with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def captions_at(
    url: str, photos: Sequence[Path], speed: str | None, tau: float | None, beam: int, concurrency: int
) -> Iterator[Outcome]:
    """What became of each photo, in order; what is wrong with one does not stop the others.

    The key is that of DEECAP_CLIENT_KEY. Raises `StoppedError`.
    """
    client = _client_of(url)
    options: Options = {"speed": speed, "tau": tau, "beam": beam}
    with client.Client(url, timeout=SECONDS) as asked:
        for path, item in zip(photos, asked.caption_many(photos, concurrency=concurrency, **options), strict=True):
            if item.answer is not None:
                yield path, to_record(path, item.answer), ""
            else:
                assert item.error is not None
                yield path, None, _reason(url, item.error)


@dataclass(frozen=True)
class Piece:
    """What is new of one photo's caption."""

    path: Path
    word: str = ""
    again: bool = False  # the caption begins again with this word
    done: bool = False  # there is no more of it
    failed: str = ""  # why there is none


def words_at(url: str, photos: Sequence[Path], speed: str | None, tau: float | None, beam: int) -> Iterator[Piece]:
    """The words of one photo's caption after the other's, as they are decided. Raises as `captions_at` does."""
    client = _client_of(url)
    options: Options = {"speed": speed, "tau": tau, "beam": beam}
    with client.Client(url, timeout=SECONDS) as asked:
        for path in photos:
            attempt = 0
            try:
                for said in asked.stream(path, **options):
                    if isinstance(said, client.StreamedWord):
                        yield Piece(path, said.text, again=0 < attempt < said.attempt)
                        attempt = said.attempt
                yield Piece(path, done=True)
            except (client.ClientError, OSError) as error:
                yield Piece(path, failed=_reason(url, error))


def _client_of(url: str) -> ModuleType:
    """The client's package, after the question whether the service is there. Raises `StoppedError`."""
    try:
        from service import client
    except ModuleNotFoundError as error:
        raise StoppedError(f"--url needs {error.name}: pip install '.[client]'", 1) from error
    try:
        with client.Client(url, timeout=FIRST_SECONDS) as asked:
            asked.speeds()
    except (ValueError, client.ClientError) as error:
        raise StoppedError(f"{url}: {error}", 2 if isinstance(error, ValueError) else 1) from error
    return client


def _reason(url: str, fault: Exception) -> str:
    """Why one photo has no caption. Raises `StoppedError` where no other will have one either."""
    from service import client

    of_one_photo = (client.ImageRefusedError, client.ServiceFailedError)
    if isinstance(fault, OSError):
        return fault.strerror or str(fault)
    if isinstance(fault, of_one_photo) or (isinstance(fault, client.DeadlineError) and fault.code):
        return fault.detail
    if isinstance(fault, client.OptionRefusedError):
        raise StoppedError(fault.detail, 2)
    raise StoppedError(f"{url}: {fault}", 1)


def to_record(path: Path, answer: CaptionAnswer) -> dict[str, object]:
    """One photo's line, as `deecap caption` writes it without a `--url`."""
    said = asdict(answer)
    del said["speed"]["moved_by_load"]  # nothing here asks for a `max_speed`
    wanted = ("caption", "confidence", "words", "speed", "speedup", "model")
    return {"path": str(path), **{name: said[name] for name in wanted}}
