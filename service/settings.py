"""What an operator can set, from `DEECAP_...` in the environment: each with its default and the reason for it."""

from __future__ import annotations

import difflib
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "DEECAP_"
# Kubernetes puts these there for a Service named "deecap"; they are not ours, and DEECAP_PORT among them clashes.
_SERVICE_LINK = re.compile(r"DEECAP_(SERVICE_(HOST|PORT).*|PORT_\d+_(TCP|UDP).*)")


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
        "memory",
        pattern=r"^(memory|rediss?://.+)$",
        description="What stands between front and worker: `memory`, in this process. `doctor` checks a `redis://` "
        "address too, but this version cannot serve through one and refuses to.",
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
    max_pixels: int = Field(
        50_000_000,
        ge=1_000,
        le=89_478_485,  # beyond it Pillow itself warns, and refuses at twice that
        description="Largest width x height. 50 million is a phone's largest usual photo: "
        "200 MB decoded, twice that on the way.",
    )
    min_side: int = Field(
        8, ge=1, description="Shortest side in pixels. Below 8 there is nothing to see, and a caption would be made up."
    )
    queue_depth: int = Field(
        64, ge=1, description="Photos that may wait for the model; more are refused with 503 while they can be retried."
    )
    timeout_ms: int = Field(
        30_000,
        ge=1,
        description="Milliseconds a request may take, and the most that its `timeout_ms` may ask for. "
        "30 s is what many proxies allow.",
    )

    @field_validator("port", mode="before")
    @classmethod
    def _not_a_service_link(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(("tcp://", "udp://")):
            raise ValueError(
                "Kubernetes set this for a Service named deecap: set enableServiceLinks: false in the pod, "
                "or give the Service another name"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_names(cls, data: Any) -> Any:
        # pydantic-settings looks up the names it knows and never sees the misspelt ones.
        known = {PREFIX + name.upper() for name in cls.model_fields}
        for name in sorted(os.environ):
            if name.startswith(PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name):
                near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
                raise ValueError(f"{name} is no setting; the nearest is {near}")
        return data

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """The environment's settings, with `overrides` (those not None) on top.

        Raises `SettingsError` that names every setting that is wrong.
        """
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            raise SettingsError("; ".join(_in_words(each) for each in error.errors())) from error


def _in_words(error: Any) -> str:
    name = PREFIX + str(error["loc"][0]).upper() if error["loc"] else ""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
