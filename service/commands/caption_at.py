"""`deecap caption --url`: the same photos, captioned by a service elsewhere. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
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
    try:
        from service import client
    except ModuleNotFoundError as error:
        raise StoppedError(f"--url needs {error.name}: pip install 'deecap[client]'", 1) from error
    try:
        with client.Client(url, timeout=FIRST_SECONDS) as asked:
            asked.speeds()
    except (ValueError, client.ClientError) as error:
        raise StoppedError(f"{url}: {error}", 2 if isinstance(error, ValueError) else 1) from error
    options: Options = {"speed": speed, "tau": tau, "beam": beam}
    of_one_photo = (client.ImageRefusedError, client.ServiceFailedError)
    with client.Client(url, timeout=SECONDS) as asked:
        for path, item in zip(photos, asked.caption_many(photos, concurrency=concurrency, **options), strict=True):
            fault = item.error
            if item.answer is not None:
                yield path, to_record(path, item.answer), ""
            elif isinstance(fault, OSError):
                yield path, None, fault.strerror or str(fault)
            elif isinstance(fault, of_one_photo) or (isinstance(fault, client.DeadlineError) and fault.code):
                yield path, None, fault.detail
            elif isinstance(fault, client.OptionRefusedError):
                raise StoppedError(fault.detail, 2)
            else:
                raise StoppedError(f"{url}: {fault}", 1)


def to_record(path: Path, answer: CaptionAnswer) -> dict[str, object]:
    """One photo's line, as `deecap caption` writes it without a `--url`."""
    said = asdict(answer)
    wanted = ("caption", "confidence", "words", "speed", "speedup", "model")
    return {"path": str(path), **{name: said[name] for name in wanted}}
