"""The names under which people file the features of a photo."""

from __future__ import annotations

import re
from pathlib import Path

_COCO_NAME = re.compile(r"(?:COCO_\w+_)?0*(\d+)")


def photo_keys(name: str, number: int | None = None) -> tuple[str, ...]:
    """What to look for, best first: the file name's stem, COCO's id, the number that the stem is or ends with.

    `COCO_val2014_000000391895.jpg` -> `("COCO_val2014_000000391895", "391895")`.
    """
    stem = Path(name).stem
    keys = [stem] if number is None else [stem, str(number)]
    if found := _COCO_NAME.fullmatch(stem):
        keys.append(found[1])
    return tuple(dict.fromkeys(keys))
