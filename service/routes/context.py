"""What every route needs of its app, in one typed place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fastapi import FastAPI, Request

from service.errors import Problem
from service.front import Front
from service.images import ImageLimits
from service.keys import Quota
from service.metrics import Metrics
from service.settings import Settings
from service.uploads import Uploads


@dataclass(frozen=True)
class Context:
    """One app's parts."""

    settings: Settings
    front: Front
    metrics: Metrics
    limits: ImageLimits
    quota: Quota
    uploads: Uploads

    def install(self, app: FastAPI) -> None:
        app.state.context = self

    @classmethod
    def of(cls, app: FastAPI) -> Context:
        return cast(Context, app.state.context)

    def charge(self, request: Request, captions: int = 1) -> None:
        """Charges the request's key for that many captions in all: what it was charged until now is given back first.

        Raises `Problem` `quota_exceeded`; it is then charged for none.
        """
        key = getattr(request.state, "key", None)
        if key is None:
            return  # nobody needs a key here
        self.give_back(request, getattr(request.state, "charged", 0))
        if seconds := self.quota.take(key, captions):
            per_minute = self.settings.quota_per_minute
            raise Problem(
                "quota_exceeded",
                f"This key may ask for {per_minute} captions per minute; try again in {seconds} s.",
                retry_after=seconds,
            )
        request.state.charged = captions

    def give_back(self, request: Request, captions: int) -> None:
        """Of those that the request was charged for, where its status does not say that it was refused."""
        if captions and getattr(request.state, "key", None) is not None:
            self.quota.give_back(request.state.key, captions)
            request.state.charged -= captions


def context_of(request: Request) -> Context:
    return Context.of(request.app)
