"""A file of captions, one JSON object per line, that a stopped run can be continued into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

Outcome = tuple[Path, dict[str, object] | None, str]  # a photo, and its record or else why there is none
FIRST_KEY = b'{"path": '  # how every line of ours begins, which tells a torn line of ours from anything else


class NotACaptionFileError(ValueError):
    """The file holds something else: it is left as it is. The caller's fault."""


def read_done(path: Path) -> set[str]:
    """The paths of the photos that the file already has a caption for; none where there is no file.

    A last line that was cut off while being written is removed, one that only lacks its line end gets it.
    Raises `NotACaptionFileError` for a file that is not one of ours, before anything in it is changed.
    """
    done: set[str] = set()
    if not path.exists():
        return done
    whole = 0  # bytes up to the end of the last line that is complete
    with path.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            try:
                done.add(_photo_of(line))
            except ValueError as error:
                torn = not line.endswith(b"\n") and FIRST_KEY.startswith(line[: len(FIRST_KEY)])
                if not torn:
                    raise NotACaptionFileError(f"{path}, line {number}, is not a caption of ours") from error
                file.truncate(whole)
                break
            whole += len(line)
            if not line.endswith(b"\n"):
                file.write(b"\n")
                break
    return done


def _photo_of(line: bytes) -> str:
    """Raises `ValueError` for a line that is not the caption of a photo."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("path"), str) or "caption" not in record:
        raise ValueError("not a caption")
    return str(record["path"])


def to_line(record: dict[str, object]) -> str:
    """One record as a line of JSON, without the line end. ASCII, so that any file name survives the way back."""
    return json.dumps(record, allow_nan=False)


def append(file: BinaryIO, record: dict[str, object]) -> None:
    """Writes the record and hands it to the system at once: whatever stops us then, the line is there and whole."""
    file.write(to_line(record).encode("ascii") + b"\n")
    file.flush()
