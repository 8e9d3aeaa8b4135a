"""The tensors of a weights file as they are used up: what is missing, left over, misshapen or not finite is noted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

SHOWN = 5  # names in a message, of each kind


class WeightsError(ValueError):
    """The file is not the weights of this detector; the message says what is wrong with it."""


class Tensors:
    """Taking goes on after a problem, so that `finish` can tell all of them at once."""

    def __init__(self, file: str, arrays: dict[str, np.ndarray]) -> None:
        self.file = file
        self.total = len(arrays)
        self._left = dict(arrays)
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._unused: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> list[str]:
        """Those not taken yet."""
        return list(self._left)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor not taken yet; `()` where there is none such."""
        return self._left[name].shape if name in self._left else ()

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor, in this shape; zeros, and a note, where there is none such.

        Leading sides of 1 do not count: old Caffe files write all blobs with four sides.
        """
        shape = tuple(shape)
        found = self._left.pop(name, None)
        if found is None:
            self._missing.append(f"{name} {shape}")
            return np.zeros(shape)
        if _significant(found.shape) != _significant(shape):
            self._wrong.append(f"{name} is {found.shape}, not {shape}")
            return np.zeros(shape)
        if found.dtype.kind != "f" or not np.isfinite(found).all():
            self._wrong.append(f"{name} has values that are no finite numbers")
            return np.zeros(shape)
        return found.reshape(shape)

    def take_pair(self, names: tuple[str, str], shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Weight of this shape and bias."""
        return self.take(names[0], shape), self.take(names[1], shape[:1])

    def pop(self, name: str) -> np.ndarray | None:
        """A tensor that need not be there, whatever its shape."""
        return self._left.pop(name, None)

    def leave(self, name: str, shape: Sequence[int]) -> None:
        """Checks a tensor that must be there and is of no use."""
        self.take(name, shape)
        self._unused.append(name)

    def leave_ending(self, endings: tuple[str, ...]) -> None:
        """Puts away what such files may also hold."""
        for name in [name for name in self._left if name.endswith(endings)]:
            del self._left[name]
            self._unused.append(name)

    def finish(self) -> tuple[str, ...]:
        """The known tensors that were of no use. Raises `WeightsError` for whatever was noted, or is left."""
        problems = [
            f"{len(found)} {what}: {_some(found)}"
            for what, found in (("missing", self._missing), ("unexpected", list(self._left)), ("wrong", self._wrong))
            if found
        ]
        if problems:
            raise WeightsError(f"{self.file} does not hold the detector's weights. " + "; ".join(problems))
        return tuple(self._unused)


def _significant(shape: Iterable[int]) -> tuple[int, ...]:
    sides = list(shape)
    while sides and sides[0] == 1:
        del sides[0]
    return tuple(sides)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
