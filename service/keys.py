"""Who may caption and how often: API keys, compared in constant time, and a quota for each."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.settings import Settings, SettingsError

SHORTEST_KEY = 8  # characters; anything shorter is found by trying
_ROUNDING = 1e-6  # of a token: who waits the seconds that it was told to is not told one more
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEY = re.compile(r"[!-~]+")  # what fits into a header, RFC 9110 5.5


@dataclass(frozen=True)
class ApiKey:
    """A key by the SHA-256 of it: the key itself is not kept, and all compare over the same length."""

    name: str  # for logs
    digest: bytes


class ApiKeys:
    """The keys of one front. Without any, everybody may caption."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> str | None:
        """The name of the key, None for no key of ours.

        It compares with every key, in constant time each, so that how long it takes tells nothing of any.
        """
        digest = _digest(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        return found


class Quota:
    """A token bucket for each key: `per_minute` captions, refilled evenly, saved up for at most a minute.

    `clock` in seconds. Each front counts for itself.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # key's name -> tokens left, and when that was

    def take(self, name: str, count: int = 1) -> int:
        """Takes `count` tokens of the key's: 0 where it could, else the whole seconds until it can, at least 1.

        More than a whole bucket can never be taken at once: such a count waits for a full one.
        """
        if self._per_minute == 0:
            return 0
        now = self._clock()
        rate = self._per_minute / 60
        left, then = self._buckets.get(name, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - then) * rate)
        missing = min(count, self._per_minute) - left
        if missing > _ROUNDING:
            self._buckets[name] = (left, now)
            return max(1, math.ceil(missing / rate))
        self._buckets[name] = (left - count, now)
        return 0

    def give_back(self, name: str, count: int) -> None:
        """Tokens that were taken for what the service then could not do."""
        if name in self._buckets:
            left, then = self._buckets[name]
            self._buckets[name] = (min(self._per_minute, left + count), then)


def read_keys(settings: Settings) -> ApiKeys:
    """The keys of the settings and of the file that they name.

    Raises `SettingsError` for a file that cannot be read, a key that is short or not plain ASCII, or one given twice.
    """
    entries = settings.api_keys.get_secret_value().split(",")
    if settings.api_keys_file is not None:
        try:
            lines = settings.api_keys_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"DEECAP_API_KEYS_FILE: {error}") from error
        entries += [line for line in lines if not line.strip().startswith("#")]
    keys: list[ApiKey] = []
    for entry in filter(None, map(str.strip, entries)):
        key = _read_key(entry, len(keys) + 1)
        if any(key.name == other.name or key.digest == other.digest for other in keys):
            raise SettingsError(f"DEECAP_API_KEYS: the key {key.name} is there twice")
        keys.append(key)
    if settings.api_keys_file is not None and not keys:
        raise SettingsError("DEECAP_API_KEYS_FILE: there is no key in it, and everybody could caption")
    return ApiKeys(keys)


def _read_key(entry: str, number: int) -> ApiKey:
    """`name:key`, or `key`, whose name then comes of its digest: wherever it stands, what is its own stays its own.

    The messages never show the key.
    """
    name, colon, key = entry.partition(":")
    if not colon:
        name, key = f"key-{_digest(entry).hex()[:8]}", entry
    if not _NAME.fullmatch(name):
        raise SettingsError(f"DEECAP_API_KEYS: key {number}: a name is letters, digits and _.- up to 64")
    if len(key) < SHORTEST_KEY or not _KEY.fullmatch(key):
        raise SettingsError(f"DEECAP_API_KEYS: key {number}: a key is {SHORTEST_KEY} or more characters of plain ASCII")
    return ApiKey(name, _digest(key))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
