"""For locust's own command line and page: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000`.

The users here wait for their answers, a closed loop: good to watch a service with, not to say what it holds. The open
loop and the scenarios are in `python -m loadtests`.
"""

from __future__ import annotations

import itertools
import random

from locust import FastHttpUser, between, events, task
from locust.env import Environment

from loadtests.photos import scenes
from loadtests.scenarios import MIX, World
from loadtests.service import ask

worlds: list[World] = []


@events.test_start.add_listener
def learn(environment: Environment, **_: object) -> None:
    """What the service has, before the first user asks."""
    worlds[:] = [World(scenes(), ask(f"{environment.host}/v1/model")["layers"])]


class Person(FastHttpUser):
    """Asks for a caption once in a while, at any speed."""

    wait_time = between(0.5, 1.5)
    numbers = itertools.count()

    @task
    def caption(self) -> None:
        request = worlds[0].request(next(self.numbers), random.choices(list(MIX), list(MIX.values()))[0])
        with self.client.post(
            f"/v1/caption?{request.query}",
            data=request.body,
            headers=dict(request.headers),
            name=request.name,
            catch_response=True,
        ) as response:
            headers = {name.lower(): value for name, value in (response.headers or {}).items()}
            verdict = request.judge(response.status_code or 0, headers, response.content or b"")
            if verdict.outcome == "failed":
                response.failure(verdict.why)
