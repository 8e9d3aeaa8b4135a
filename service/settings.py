"""What an operator can set, from `DEECAP_...` in the environment: each with its default and the reason for it."""

from __future__ import annotations

import difflib
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.jobs import Priority

PREFIX = "DEECAP_"
MEMORY = "memory"  # the broker within one process
# Kubernetes puts these there for a Service named "deecap"; they are not ours, and DEECAP_PORT among them clashes.
_SERVICE_LINK = re.compile(r"DEECAP_(SERVICE_(HOST|PORT).*|PORT_\d+_(TCP|UDP).*)")
# What our own client reads (service/client): on one machine with a server they must not stop it. Not DEECAP_API_KEY,
# which is too near to DEECAP_API_KEYS: mistaken for that, it would leave a server open to everybody.
_OF_CLIENTS = frozenset({"DEECAP_CLIENT_URL", "DEECAP_CLIENT_KEY"})

_ORIGIN = re.compile(r"https?://[^/\s?#@*]+")  # scheme, host and perhaps port: no path, RFC 6454


class SettingsError(ValueError):
    """The settings cannot be used. The operator's fault; the message names each and says what is allowed."""


def shipped_bundle() -> Path:
    """The folder of the trained bundle that comes with the project. Imports no torch."""
    return Path(str(files("model"))) / "bundles" / "deecap-flickr8k"


class Settings(BaseSettings):
    """The service's settings. `load` reads them from the environment with errors for people."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    bundle: Path = Field(
        default_factory=shipped_bundle, description="Folder of the bundle to serve. Default: the one that ships."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs. `auto` takes a GPU if there is one; `cuda` refuses to start without."
    )
    precision: Literal["auto", "int8", "float32", "bfloat16"] = Field(
        "auto", description="What the decoder runs in. `auto`: int8 weights on a CPU, bfloat16 on a GPU."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of extractor and encoder. 0: as many cores as the container may use."
    )
    broker: str = Field(
        MEMORY,
        pattern=r"^(memory|rediss?://.+)$",
        description="What stands between fronts and workers. `memory`: both in one process. `redis://host:port/0`: "
        "`deecap serve` is a front alone, and any number of `deecap worker` caption.",
    )
    queue: str = Field(
        "deecap",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="Name of the queue in Redis. Fronts and workers of one service share it; another service on the "
        "same Redis needs another.",
    )
    redis_cache: str = Field(
        "",
        pattern=r"^(|rediss?://.+)$",
        description="Redis that keeps what was seen in photos, shared by all workers. Empty: each worker's own memory. "
        "An instance of its own, so that a full cache cannot push out the queue.",
    )
    feature_cache_mb: int = Field(
        64,
        ge=0,
        description="Megabytes of what was seen in photos that a worker keeps, so that the same photo at another "
        "speed is not looked at again. 0: none. With DEECAP_REDIS_CACHE that Redis's `maxmemory` counts, and not this.",
    )
    feature_cache_ttl_s: float = Field(
        3600.0, gt=0, description="Seconds that Redis keeps what was seen in a photo. An hour spans one user's session."
    )
    look_batch: int = Field(
        4, ge=1, le=64, description="Photos looked at in one run of the extractor, at most. More makes the first wait."
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. The default reaches no further than this machine; 0.0.0.0 does."
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one.")
    max_body_bytes: int = Field(
        20_000_000,
        ge=1_000,
        description="Largest request body. 20 MB takes camera JPEGs of any size; base64 makes a photo a third larger.",
    )
    max_uploads_bytes: int = Field(
        268_435_456,
        ge=1_000,
        description="Bytes of all request bodies together that one front holds, from their arrival to the answer; "
        "beyond it more are refused with 503. Without Redis also of the photos that wait, those of asynchronous jobs "
        "among them. At least the largest body. 256 MiB are twelve of those and thousands of usual photos.",
    )
    max_pixels: int = Field(
        50_000_000,
        ge=1_000,
        le=89_478_485,  # beyond it Pillow itself warns, and refuses at twice that
        description="Largest width x height. 50 million is a phone's largest usual photo: "
        "200 MB decoded, twice that on the way.",
    )
    max_images: int = Field(
        16, ge=1, le=256, description="Photos in one request, where it may hold several (`/v2`). All must fit its body."
    )
    max_batch_images: int = Field(
        32, ge=1, le=256, description="Photos in one request to `/v1/captions`, each within DEECAP_MAX_BODY_BYTES."
    )
    max_batch_bytes: int = Field(
        64_000_000,
        ge=1_000,
        description="Largest body of such a request: 32 photos of 2 MB. A front holds it twice while it reads it.",
    )
    min_side: int = Field(
        8, ge=1, description="Shortest side in pixels. Below 8 there is nothing to see, and a caption would be made up."
    )
    queue_depth: int = Field(
        64,
        ge=1,
        description="Photos of priority `interactive` that may wait for a worker; more are refused with 503 while they "
        "can be retried.",
    )
    batch_queue_depth: int = Field(
        256, ge=1, description="The same for priority `batch`, whose clients can wait longer."
    )
    worker_timeout_s: float = Field(
        5.0,
        ge=1.0,
        description="Seconds without a heartbeat after which a worker is dead and others get its photos. A heart beats "
        "every 0.2 s, and not during a look: at least 1, and twice the longest look at DEECAP_LOOK_BATCH photos.",
    )
    tries: int = Field(
        3,
        ge=2,
        le=10,
        description="Workers that one photo may kill before it is refused as `poison` and put aside. At least 2: what "
        "a worker held when it died is tried again, one by one, before any of it is blamed.",
    )
    target_wait_ms: float = Field(
        150.0,
        gt=0,
        description="Milliseconds in the queue above which photos whose clients gave `max_speed` are captioned faster. "
        "150 is what seven captions take on two cores.",
    )
    hang_timeout_s: float = Field(
        20.0,
        gt=0,
        description="Seconds without progress after which a worker's model hangs: its process ends, to be restarted.",
    )
    load_timeout_s: float = Field(
        300.0,
        gt=0,
        description="Seconds that a worker's model may take to load and to caption a first photo, or its process ends. "
        "Seconds are usual; a GPU's first start takes minutes.",
    )
    drain_timeout_s: float = Field(
        25.0,
        ge=0,
        description="Seconds that what is under way may take after SIGTERM. Kubernetes kills after 30.",
    )
    metrics_port: int = Field(
        8001, ge=0, le=65535, description="TCP port of a worker's own `/metrics` and probes; 0 takes any free one."
    )
    timeout_ms: int = Field(
        30_000,
        ge=1,
        description="Milliseconds a request may take, and the most that its `timeout_ms` may ask for. "
        "30 s is what many proxies allow.",
    )
    job_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Seconds that an asynchronous job may take (`Prefer: respond-async`), and the most that its "
        "`timeout_ms` may ask for. Nobody holds a connection for it: long enough for a crowd to pass.",
    )
    job_kept_s: float = Field(
        3600.0, gt=0, description="Seconds that what became of such a job can be asked for, at `/v1/jobs/{id}`."
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys that may caption, `key` or `name:key`, separated by commas. The name goes into the logs. "
        "Empty, and no file either: everybody may.",
    )
    api_keys_file: Path | None = Field(
        None, description="File of such keys, one per line; `#` begins a comment. Read once, at the start."
    )
    quota_per_minute: int = Field(
        0,
        ge=0,
        description="Captions that each key may ask each front for per minute, all at once if it likes; more get 429. "
        "0, or no keys: no quota.",
    )
    cors_origins: str = Field(
        "",
        description="Origins whose pages may ask this service from a browser, separated by commas: "
        "`https://example.org`; `*` for all. Empty: none but its own.",
    )
    open_probes: bool = Field(
        True,
        description="Whether `/livez`, `/readyz`, `/startupz`, `/metrics` and `/v2/health/…` need no key: "
        "probes seldom send one. A front's: a worker's own port, which captions nothing, never asks for any.",
    )
    tracing: Literal["off", "otlp"] = Field(
        "off",
        description="`otlp`: OpenTelemetry spans over HTTP, to where `OTEL_EXPORTER_OTLP_ENDPOINT` says; needs "
        "`pip install '.[tracing]'` in the project's folder.",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="`json`: one object per line. `auto`: text on a terminal, json otherwise."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is logged.")

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("broker", "redis_cache")
    @classmethod
    def _an_address(cls, value: str) -> str:
        try:
            _ = urlsplit(value).port
        except ValueError as error:
            raise ValueError("is no address that can be read") from error
        return value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("port", mode="before")
    @classmethod
    def _not_a_service_link(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(("tcp://", "udp://")):
            raise ValueError(
                "Kubernetes set this for a Service named deecap: set enableServiceLinks: false in the pod, "
                "or give the Service another name"
            )
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: str) -> str:
        for origin in read_origins(value):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin} is no origin: https://example.org, with a port where it has one, or *")
        return value

    @model_validator(mode="after")
    def _a_cache_of_its_own(self) -> Self:
        if self.redis_cache and self.broker != MEMORY and _server(self.redis_cache) == _server(self.broker):
            raise ValueError(
                "DEECAP_REDIS_CACHE: must not be the Redis of DEECAP_BROKER: a full cache would push out jobs. "
                "It needs an instance of its own; another database of the same one shares its memory"
            )
        return self

    @model_validator(mode="after")
    def _room_for_one(self) -> Self:
        largest = max(self.max_body_bytes, self.max_batch_bytes)
        if self.max_uploads_bytes < largest:
            raise ValueError(
                f"DEECAP_MAX_UPLOADS_BYTES: must be {largest} at least, the larger of DEECAP_MAX_BODY_BYTES and "
                "DEECAP_MAX_BATCH_BYTES"
            )
        return self

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """The environment's settings, with `overrides` (those not None) on top.

        Raises `SettingsError` that names every setting that is wrong, and every name that is none.
        """
        wrong = cls._unknown_names()
        try:
            settings = cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            raise SettingsError("; ".join(wrong + [_in_words(each) for each in error.errors()])) from error
        if wrong:
            raise SettingsError("; ".join(wrong))
        return settings

    @classmethod
    def _unknown_names(cls) -> list[str]:
        """What is wrong with the environment's names: pydantic-settings never sees those that it does not look up."""
        known = sorted(PREFIX + name.upper() for name in cls.model_fields)
        return [
            f"{name} is no setting; the nearest is {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]}"
            for name in sorted(set(os.environ) - _OF_CLIENTS - set(known))
            if name.startswith(PREFIX) and not _SERVICE_LINK.fullmatch(name)
        ]

    @property
    def depths(self) -> dict[Priority, int]:
        """Photos that may wait, by priority."""
        return {"interactive": self.queue_depth, "batch": self.batch_queue_depth}

    def redacted(self) -> dict[str, str]:
        """Every setting by its name in the environment, fit for a log: no key and no password."""
        shown = {PREFIX + name.upper(): _shown(getattr(self, name)) for name in type(self).model_fields}
        return {name: without_password(value) if "://" in value else value for name, value in shown.items()}


def read_origins(text: str) -> list[str]:
    """Of `DEECAP_CORS_ORIGINS`."""
    return [origin for origin in map(str.strip, text.split(",")) if origin]


def _server(url: str) -> tuple[str, int]:
    """Host and port of a Redis: its databases share one memory, whatever the user."""
    parts = urlsplit(url)
    host = (parts.hostname or "localhost").rstrip(".")
    return "127.0.0.1" if host == "localhost" else host, parts.port or 6379


def without_password(url: str) -> str:
    """The address with `***` for its password, also where that stands in the query, as redis-py allows."""
    parts = urlsplit(url)
    place = parts.netloc
    if "@" in place:
        user, _, host = place.rpartition("@")
        place = f"{user.split(':')[0]}:***@{host}"
    query = [(name, "***" if name == "password" else value) for name, value in parse_qsl(parts.query)]
    return urlunsplit(parts._replace(netloc=place, query=urlencode(query, safe="*")))


def _in_words(error: Any) -> str:
    name = PREFIX + str(error["loc"][0]).upper() if error["loc"] else ""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _shown(value: object) -> str:
    return "" if value is None else str(value)
