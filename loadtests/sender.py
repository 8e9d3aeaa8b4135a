"""Sends what arrives, at its time, with locust's fast client, and keeps what became of each."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests.answers import Verdict
from loadtests.measure import Sample
from loadtests.scenarios import Arrivals, Request

LONGEST = 60.0  # seconds for one answer; the service's own limit is 30
CONNECTIONS = 4000  # at once: an open loop must never wait for a free one


class _Client(FastHttpUser):
    """A client that judges what it gets. locust makes its users from classes, so each run has one of its own below."""

    abstract = True
    connection_timeout = network_timeout = LONGEST

    def answer(self, request: Request) -> Verdict:
        path = "/v1/caption" + (f"?{request.query}" if request.query else "")
        with self.client.post(
            path, data=request.body, headers=dict(request.headers), name=request.name, catch_response=True
        ) as response:
            if not response.status_code:
                verdict = Verdict("failed", f"no answer: {getattr(response, 'error', None)!r}")
            else:
                headers = {name.lower(): value for name, value in (response.headers or {}).items()}
                verdict = request.judge(response.status_code, headers, response.content or b"")
            if verdict.outcome == "failed":
                response.failure(verdict.why)
            else:
                response.success()
            return verdict


def send(url: str, arrivals: Arrivals) -> list[Sample]:
    """Each at its time, whatever became of those before it. Returns once the last answer is there."""
    samples: list[Sample] = []

    class Sender(_Client):
        host = url
        concurrency = CONNECTIONS

        @task
        def send_all(self) -> None:
            pool, begin = Pool(), time.monotonic()
            for due, request in arrivals:
                gevent.sleep(max(0.0, begin + due - time.monotonic()))
                pool.spawn(self.send_one, request, begin, due)
            pool.join(raise_error=True)
            raise StopUser

        def send_one(self, request: Request, begin: float, due: float) -> None:
            sent = time.monotonic() - begin
            verdict = self.answer(request) if request.hang_up is None else _hang_up(url, request)
            samples.append(Sample(request.name, due, sent, time.monotonic() - begin, verdict))

    _run(Sender, 1)
    return samples


def closed_loop(url: str, requests: Iterator[Request], clients: int, seconds: float) -> list[Sample]:
    """So many clients, each asking anew once it has its answer: what the service can do at most."""
    samples: list[Sample] = []
    begin = time.monotonic()

    class Client(_Client):
        host = url

        @task
        def ask(self) -> None:
            sent = time.monotonic() - begin
            if sent >= seconds:
                raise StopUser
            request = next(requests)
            verdict = self.answer(request)
            samples.append(Sample(request.name, sent, sent, time.monotonic() - begin, verdict))

    _run(Client, clients)
    return samples


def _run(user: type[_Client], count: int) -> None:
    """So many of them, until each has stopped. Raises `RuntimeError` for what was raised in one."""
    environment = Environment(user_classes=[user])
    raised: list[BaseException] = []
    environment.events.user_error.add_listener(lambda exception, **_: raised.append(exception))
    runner = environment.create_local_runner()
    runner.start(count, spawn_rate=count)
    runner.spawning_greenlet.join()
    while runner.user_count and not raised:
        gevent.sleep(0.02)
    runner.quit()
    if raised:
        raise RuntimeError("the sender failed") from raised[0]


def _hang_up(url: str, request: Request) -> Verdict:
    """Announces the whole body, sends a part, and goes. What the service makes of that, the others' answers tell."""
    place = urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((place.hostname, place.port), timeout=5) as connection:
        head = f"POST /v1/caption HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(request.body)}\r\n\r\n"
        connection.sendall(head.encode() + request.body[: request.hang_up])
    return Verdict("ok")
